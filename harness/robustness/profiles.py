"""How hard properties are tried: how many cases, and whether they are the same at every call."""

from __future__ import annotations

from dataclasses import dataclass

from harness.errors import UserError, nearest


@dataclass(frozen=True, slots=True)
class Profile:
    """examples: cases a law is tried on. seeds: trainings of a config. faults: those without --faults."""

    name: str
    examples: int
    seeds: int
    faults: str
    summary: str


PROFILES: dict[str, Profile] = {
    "smoke": Profile("smoke", 20, 2, "all:high", "every property on 20 cases, seconds"),
    "ci": Profile("ci", 200, 3, "all", "every property on 200 cases, a minute or two"),
    "nightly": Profile("nightly", 20_000, 5, "all", "every property on 20,000 cases, hours"),
}


def parse_profile(name: str) -> Profile:
    """The profile of that name; a `UserError` that lists them for any other."""
    if name not in PROFILES:
        raise UserError(f"unknown profile {name!r}{nearest(name, PROFILES)} (known: {', '.join(PROFILES)})")
    return PROFILES[name]
