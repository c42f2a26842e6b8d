"""Laws of what says no: a gate's verdict gains nothing by order, harm, gaps or company, and knows its arms.

A subject's `decide` takes plain values: pairs and counts of non-finite values as mappings, by the names of
`harness.gate.decision.Pairs` and `NanCount`, and how many seeds are looked at. It gives back a mapping with
the `verdict` of the gate and its `cells`, each with scenario, metric and verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from harness.robustness.law import BrokenLawError, Case, Property, Subject, library_law

# --- 30: what decides -----------------------------------------------------------------------------------

METRIC = "coverage"  # compared by its difference, worse where it is lower
SEEDS = (5, 10, 20)
BETTER = {"PASS": 0, "INCONCLUSIVE": 1, "FAIL": 2}

# In 1024ths, so that a difference is exact and a harm added to each seed leaves their spread as it was.
_values = st.integers(256, 512).map(lambda number: number / 1024)
_harms = st.sampled_from([0, 1, 4, 12, 24, 256, -1, -24, -256]).map(lambda number: number / 1024)


@st.composite
def _scenario(draw: st.DrawFn, seeds: int) -> dict[str, Any]:
    """The baseline's values, and how much lower the candidate's are, by seed."""
    usual, spread = draw(_harms), draw(st.sampled_from([0.0, 1 / 1024, 16 / 1024]))
    signs = st.lists(st.sampled_from([0, 1, -1]), min_size=seeds, max_size=seeds)
    return {
        "base": draw(st.lists(_values, min_size=seeds, max_size=seeds)),
        "harm": [usual + sign * spread for sign in draw(signs)],
    }


@st.composite
def _scenarios(draw: st.DrawFn, subject: Subject) -> dict[str, Any]:
    seeds = draw(st.sampled_from(SEEDS))
    return {"scenarios": draw(st.lists(_scenario(seeds), min_size=1, max_size=3))}


def pairs_of(scenarios: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The pairs of a gate, of scenario number i."""
    return [
        {
            "scenario": f"s{number}",
            "metric": METRIC,
            "seeds": list(range(len(scenario["base"]))),
            "base": list(scenario["base"]),
            "candidate": [
                value - harm for value, harm in zip(scenario["base"], scenario["harm"], strict=True)
            ],
            "planned": len(scenario["base"]),
        }
        for number, scenario in enumerate(scenarios)
    ]


def clean_counts(scenarios: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """No non-finite value in either arm of any scenario."""
    return [
        {"scenario": f"s{number}", "values": 0, "checks": 100, "base_values": 0, "base_checks": 100}
        for number in range(len(scenarios))
    ]


def _decided(
    subject: Subject, pairs: Sequence[Mapping[str, Any]], counts: Sequence[Mapping[str, Any]]
) -> tuple[str, dict[str, str]]:
    """The verdict of the gate, and that of each scenario."""
    found = subject.decide(pairs, counts, max(len(pair["seeds"]) for pair in pairs))
    return found["verdict"], {cell["scenario"]: cell["verdict"] for cell in found["cells"]}


@st.composite
def _turned(draw: st.DrawFn, subject: Subject) -> dict[str, Any]:
    case = draw(_scenarios(subject))
    return {**case, "by": draw(st.integers(1, len(case["scenarios"][0]["base"]) - 1))}


def _order_is_irrelevant(subject: Subject, case: Case) -> None:
    """With the last seeds first, and with the scenarios from the last to the first."""
    pairs, counts = pairs_of(case["scenarios"]), clean_counts(case["scenarios"])
    by = case["by"]
    turned = [{**pair, **{name: pair[name][-by:] + pair[name][:-by] for name in _BY_SEED}} for pair in pairs]
    right = _decided(subject, pairs, counts)
    for what, other in (("seeds", turned), ("scenarios", pairs[::-1])):
        found = _decided(subject, other, counts)
        if found != right:
            raise BrokenLawError(f"the order of {what} must not matter, {right} became {found}")


_BY_SEED = ("seeds", "base", "candidate")

# What is done to the pair and to the counts of a scenario. Harm of a few seeds alone also adds to the spread,
# and what is less sure may be decided later; these are sure in every seed.
HARMS: Mapping[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    "covers a little less": lambda pair, count: _lower(pair, 1 / 1024),
    "covers less": lambda pair, count: _lower(pair, 12 / 1024),
    "covers much less": lambda pair, count: _lower(pair, 256 / 1024),
    "has no value": lambda pair, count: pair.update(candidate=[math.nan] * len(pair["seeds"])),
    "meets a NaN": lambda pair, count: count.update(values=1),
}


def _lower(pair: dict[str, Any], amount: float) -> None:
    pair["candidate"] = [value - amount for value in pair["candidate"]]


@st.composite
def _harmed(draw: st.DrawFn, subject: Subject) -> dict[str, Any]:
    case = draw(_scenarios(subject))
    return {
        **case,
        "scenario": draw(st.integers(0, len(case["scenarios"]) - 1)),
        "harm": draw(st.sampled_from(sorted(HARMS))),
    }


def _harm_never_helps(subject: Subject, case: Case) -> None:
    before = _decided(subject, pairs_of(case["scenarios"]), clean_counts(case["scenarios"]))[0]
    pairs, counts = pairs_of(case["scenarios"]), clean_counts(case["scenarios"])
    HARMS[case["harm"]](pairs[case["scenario"]], counts[case["scenario"]])
    after = _decided(subject, pairs, counts)[0]
    if BETTER[after] < BETTER[before]:
        raise BrokenLawError(
            f"a gate must not gain by harm, {before} became {after} where s{case['scenario']} {case['harm']}"
        )


@st.composite
def _with_gaps(draw: st.DrawFn, subject: Subject) -> dict[str, Any]:
    case = draw(_scenarios(subject))
    seeds = len(case["scenarios"][0]["base"])
    return {
        **case,
        "scenario": draw(st.integers(0, len(case["scenarios"]) - 1)),
        "lost": draw(st.lists(st.integers(0, seeds - 1), min_size=1, max_size=seeds, unique=True)),
    }


def _missing_never_passes(subject: Subject, case: Case) -> None:
    pairs = pairs_of(case["scenarios"])
    pair = pairs[case["scenario"]]
    kept = [place for place in range(len(pair["seeds"])) if place not in case["lost"]]
    pair.update({name: [pair[name][place] for place in kept] for name in _BY_SEED})
    # The look is that of the other scenarios; a gate of one scenario may have no seed left.
    found = subject.decide(pairs, clean_counts(case["scenarios"]), pair["planned"])["verdict"]
    if found == "PASS":
        raise BrokenLawError(
            f"a gate without {len(case['lost'])} of {pair['planned']} seeds must not pass, it does"
        )


def _company_never_helps(subject: Subject, case: Case) -> None:
    """A gate passes only where each of its scenarios passes alone."""
    whole, _ = _decided(subject, pairs_of(case["scenarios"]), clean_counts(case["scenarios"]))
    for number, scenario in enumerate(case["scenarios"]):
        alone, _ = _decided(subject, pairs_of([scenario]), clean_counts([scenario]))
        if whole == "PASS" and alone != "PASS":
            raise BrokenLawError(f"s{number} is {alone} alone, a gate with others beside it must not pass")


def _same_code_passes(subject: Subject, case: Case) -> None:
    pairs = [{**pair, "candidate": pair["base"]} for pair in pairs_of(case["scenarios"])]
    found, _ = _decided(subject, pairs, clean_counts(case["scenarios"]))
    if found != "PASS":
        raise BrokenLawError(f"arms that agree bit for bit must pass, got {found}")


def _one_arm_is_worse(subject: Subject, case: Case) -> None:
    pairs, counts = pairs_of(case["scenarios"]), clean_counts(case["scenarios"])
    turned = [{**pair, "base": pair["candidate"], "candidate": pair["base"]} for pair in pairs]
    one, other = (_decided(subject, some, counts)[1] for some in (pairs, turned))
    both = [name for name, verdict in one.items() if verdict == other[name] == "FAIL"]
    if both:
        raise BrokenLawError(f"{both[0]} fails with the arms exchanged as well: both cannot be the worse")


def _law(
    name: str,
    law: str,
    cases: Callable[[Subject], SearchStrategy[Case]],
    check: Callable[[Subject, Case], None],
) -> Property:
    return library_law(name, 30, law, ("decide",), cases, check)


GATE_LAWS: tuple[Property, ...] = (
    _law(
        "gate_knows_no_order",
        "Neither the order of seeds nor of scenarios changes a gate's verdicts.",
        lambda subject: _turned(subject),
        _order_is_irrelevant,
    ),
    _law(
        "gate_gains_nothing_by_harm",
        "Harm in every seed of a scenario, or a non-finite value in it, never improves a gate's verdict.",
        lambda subject: _harmed(subject),
        _harm_never_helps,
    ),
    _law(
        "gate_passes_nothing_missing",
        "A gate with a seed missing does not pass.",
        lambda subject: _with_gaps(subject),
        _missing_never_passes,
    ),
    _law(
        "gate_passes_each_alone",
        "A gate passes only where each of its scenarios passes alone.",
        lambda subject: _scenarios(subject),
        _company_never_helps,
    ),
    _law(
        "gate_passes_the_same_code",
        "Arms that agree bit for bit pass.",
        lambda subject: _scenarios(subject),
        _same_code_passes,
    ),
    _law(
        "gate_fails_one_way",
        "A scenario that fails does not fail with the arms exchanged.",
        lambda subject: _scenarios(subject),
        _one_arm_is_worse,
    ),
)
