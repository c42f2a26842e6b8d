"""What a property is: a law that a subject keeps for every case, or breaks with one that can be shown.

A subject is anything with the attributes that a law needs: a library under its adapter, or a trained model
with its task. Which properties exist is decided in `properties`; how a case that breaks one is found and made
small, in `search`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Case = Mapping[str, Any]
"""What a law is tried on: tensors and plain values by name, so that it can be stored and tried again."""

Subject = Any
"""What a law is about; `needs` names what it must have."""


class BrokenLawError(AssertionError):
    """A law does not hold for this case; the message says what was found instead."""


class DoesNotApplyError(Exception):
    """A law says nothing about this subject; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Property:
    """A law with the cases that it is tried on.

    name: of the table, in snake case. group: the number of its group in docs/robustness_laws.md. law: one
    sentence that says what holds. of: what kind of subject it is about. needs: attributes without which it
    does not apply (absent or None). cases: for a subject, where they come from; raises DoesNotApplyError
    where the subject leaves none. check: raises BrokenLawError where the law does not hold; any other
    exception is the subject's, and breaks the law as well.
    """

    name: str
    group: int
    law: str
    of: Literal["library", "model"]
    cases: Callable[[Subject], SearchStrategy[Case]]
    check: Callable[[Subject, Case], None]
    needs: tuple[str, ...] = ()


def library_law(
    name: str,
    group: int,
    law: str,
    needs: str | tuple[str, ...],
    cases: Callable[[Subject], SearchStrategy[Case]],
    check: Callable[[Subject, Case], None],
) -> Property:
    """A property about a library, in the order in which a table of them reads well."""
    needs = (needs,) if isinstance(needs, str) else needs
    return Property(name=name, group=group, law=law, of="library", needs=needs, cases=cases, check=check)


def missing_needs(prop: Property, subject: Subject) -> list[str]:
    """Name what the property needs and the subject has not."""
    return [name for name in prop.needs if getattr(subject, name, None) is None]
