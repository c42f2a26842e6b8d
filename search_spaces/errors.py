"""The one exception of this package, and the hint that turns a misspelt name into a known one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SpaceError(ValueError):
    """Says everything that is wrong with a space or a config at once; `problems` holds one sentence each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems: tuple[str, ...] = tuple(problems)
        super().__init__("; ".join(self.problems))


def nearest_hint(name: str, known: Iterable[str]) -> str:
    """The known name nearest to `name` as a parenthesis, or all known names where none is near.

    >>> nearest_hint("learning_rat", ["learning_rate", "momentum"])
    "(did you mean 'learning_rate'?)"
    """
    names = list(known)
    close = get_close_matches(str(name), names, n=1)
    if close:
        return f"(did you mean {close[0]!r}?)"
    return f"(known: {', '.join(names) or 'none'})"
