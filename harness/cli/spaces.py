"""`scm-harness spaces`: the named search spaces, and what each varies."""

from __future__ import annotations

from collections.abc import Sequence

from harness.cli.arguments import CommandParser
from harness.errors import EXIT_OK


def main(argv: Sequence[str]) -> int:
    """Print every space with its knobs, or the spaces that are named; results go to stdout."""
    parser = CommandParser("spaces", "List the named search spaces, the knobs of each and their domains.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="spaces to show (default: all)")
    names = parser.parse_args(argv).names

    from harness.errors import UserError
    from search_spaces.errors import SpaceError
    from search_spaces.named import SPACES, named_space
    from search_spaces.space import condition_text

    for name in names or SPACES:
        try:
            space = named_space(name)
        except SpaceError as error:
            raise UserError(str(error)) from None
        print(f"{name}: {space.description}")
        if name == "default" and not names:
            continue  # it would repeat all others
        for knob, domain in space.domains.items():
            condition = condition_text(domain)
            print(f"  {knob:<22} {domain}" + (f", when {condition}" if condition else ""))
        for constraint in space.constraints:
            print(f"  {constraint}")
    return EXIT_OK
