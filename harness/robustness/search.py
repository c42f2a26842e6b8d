"""How a case that breaks a property is found and made small: Hypothesis, run as a product.

The same property, subject, examples and seed give the same verdict. Nothing is kept between calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.errors import HypothesisException, Unsatisfiable
from hypothesis.internal.conjecture import providers

from harness.errors import one_line
from harness.robustness.law import BrokenLawError, Case, DoesNotApplyError, Property, Subject, missing_needs

HOLDS = "holds"
BROKEN = "broken"
NOT_APPLICABLE = "not_applicable"
ERROR = "error"
VERDICTS = (HOLDS, BROKEN, NOT_APPLICABLE, ERROR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What trying a property came to.

    status: "holds" on all examples, "broken" by `case`, "not_applicable" or "error" (cases cannot be made)
    with the reason in `message`. examples: cases tried, those of making it small included.
    """

    property: str
    status: str
    message: str = ""
    case: Case | None = field(default=None, repr=False)
    examples: int = 0
    seed: int = 0
    duration_s: float = 0.0


def try_property(
    prop: Property,
    subject: Subject,
    *,
    examples: int,
    seed_of_cases: int = 0,
    on_case: Callable[[], None] = lambda: None,
) -> Verdict:
    """Try a property on `examples` cases drawn from the seed; the first that breaks it is made small.

    Raises nothing that a property or a subject raises: it is in the verdict.
    """
    begun = time.perf_counter()
    lacks = missing_needs(prop, subject)
    if lacks:
        return Verdict(
            property=prop.name,
            status=NOT_APPLICABLE,
            message=f"the subject has no {', '.join(lacks)}",
            seed=seed_of_cases,
        )
    tried = 0
    worst: tuple[Case, str] | None = None

    def check(case: Case) -> None:
        nonlocal tried, worst
        tried += 1
        on_case()
        said = broken_by(prop, subject, case)
        if said is not None:
            worst = (case, said)  # Hypothesis tries its smallest case last
            raise BrokenLawError(said)

    def verdict(status: str, message: str = "", case: Case | None = None) -> Verdict:
        return Verdict(
            property=prop.name,
            status=status,
            message=message,
            case=case,
            examples=tried,
            seed=seed_of_cases,
            duration_s=time.perf_counter() - begun,
        )

    try:
        run = settings(
            max_examples=examples,
            database=None,
            deadline=None,
            derandomize=False,
            phases=(Phase.generate, Phase.shrink),
            print_blob=False,
            report_multiple_bugs=False,
            verbosity=Verbosity.quiet,
            suppress_health_check=list(HealthCheck),
        )(seed(seed_of_cases)(given(prop.cases(subject))(check)))
        with _the_same_numbers():
            run()
    except DoesNotApplyError as reason:
        return verdict(NOT_APPLICABLE, one_line(reason))
    except Unsatisfiable:
        return verdict(NOT_APPLICABLE, "no case satisfies what the property asks of one")
    except (Exception, HypothesisException) as error:
        if worst is None:
            return verdict(ERROR, f"its cases cannot be made: {type(error).__name__}: {one_line(error)}")
    if worst is None:
        return verdict(HOLDS)
    case, said = worst
    return verdict(BROKEN, said, case)


@contextmanager
def _the_same_numbers() -> Iterator[None]:
    """Let Hypothesis draw no numbers from the source of whatever modules happen to be loaded.

    It takes some of its values from there, so that the same seed would draw other cases after other imports.
    Where it has no such function under this name, a verdict repeats itself within equal imports alone.
    """
    before = getattr(providers, "_get_local_constants", None)
    if before is None:
        yield
        return
    none = type(before())()
    providers._get_local_constants = lambda: none
    try:
        yield
    finally:
        providers._get_local_constants = before


def broken_by(prop: Property, subject: Subject, case: Case) -> str | None:
    """Say how a case breaks a property, None where it does not; DoesNotApplyError comes through."""
    try:
        prop.check(subject, case)
    except BrokenLawError as broken:
        return one_line(broken) or "the law does not hold"
    except DoesNotApplyError:
        raise
    except HypothesisException:  # `assume`, and what else steers the search
        raise
    except Exception as error:  # whatever a subject raises where the law promises an answer breaks it
        return f"raises {type(error).__name__}: {one_line(error)}"[:500]
    return None


def plain_seed(*parts: Any) -> int:
    """A seed below 2**31 from texts and numbers, the same on every machine."""
    import hashlib

    text = "|".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 2**31
