"""The laws of the system: they hold for this project, and each finds the defect that it is there for."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from harness.robustness.cases import decode_case, encode_case
from harness.robustness.law import BrokenLawError, Property
from harness.robustness.machines import MACHINES, Machine, state_machine
from harness.robustness.own_system import RowStore, own_system
from harness.robustness.profiles import PROFILES
from harness.robustness.same import first_difference
from harness.robustness.search import broken_by, try_property
from harness.robustness.system_laws import SYSTEM_LAWS
from harness.robustness.training_laws import unbiased_in_noise

OWN = own_system()
BY_NAME = {prop.name: prop for prop in SYSTEM_LAWS}
# Laws whose cases take about a millisecond are tried on more of them at every run.
QUICK = {
    "controller_history",
    "controller_is_unbiased_in_noise",
    "flat_config_resolves_once",
    "harm_never_helps",
}
by_law = pytest.mark.parametrize("prop", SYSTEM_LAWS, ids=lambda prop: prop.name)


def assert_holds(prop: Property, examples: int) -> None:
    found = try_property(prop, OWN, examples=examples)
    assert (found.status, found.message) == ("holds", ""), found.case


@by_law
def test_the_laws_of_the_system_hold(prop: Property) -> None:
    """On a few cases each; on more in the profile of CI."""
    assert_holds(prop, 100 if prop.name in QUICK else 15)


@pytest.mark.slow
@by_law
def test_the_laws_of_the_system_hold_on_many_cases(prop: Property) -> None:
    """On as many cases as the profile "ci" asks for, or that of SCM_HARNESS_PROFILE."""
    assert_holds(prop, PROFILES[os.environ.get("SCM_HARNESS_PROFILE", "ci")].examples)


def test_names_and_groups_are_those_of_the_table() -> None:
    """Each of the eight groups has a law, each law a name of its own and a sentence."""
    assert {prop.group for prop in SYSTEM_LAWS} == set(range(23, 31))
    assert len(BY_NAME) == len(SYSTEM_LAWS)
    assert all(prop.law.endswith(".") and prop.needs for prop in SYSTEM_LAWS)


@by_law
def test_of_a_subject_that_has_nothing_a_law_says_nothing(prop: Property) -> None:
    """A library without a ranking, say, is not judged by it."""
    assert try_property(prop, object(), examples=1).status == "not_applicable"


# --- planted defects ------------------------------------------------------------------------------------


def without_cap(settings: Mapping[str, Any]) -> Any:
    return OWN.make_controller({**settings, "lambda_max": None})


class Controller:
    """Our controller, to be spoiled in one place."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.inner = OWN.make_controller(settings)

    @property
    def lambda_rej(self) -> float:
        return self.inner.lambda_rej

    def observe(self, coverage: float, answers: float = 1.0) -> None:
        self.inner.observe(coverage, answers)

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state)


class HearsNaNAsZero(Controller):
    def observe(self, coverage: float, answers: float = 1.0) -> None:
        super().observe(coverage if math.isfinite(coverage) else 0.0, answers)


class ForgetsItsVelocity(Controller):
    def state_dict(self) -> Any:
        held = super().state_dict()
        return {**held, "state": {**held["state"], "velocity": 0.0}}


class NeverMoves(Controller):
    def observe(self, coverage: float, answers: float = 1.0) -> None:
        pass


class MovesAway(Controller):
    def observe(self, coverage: float, answers: float = 1.0) -> None:
        super().observe(1.0 - coverage, answers)


class WindsUp(Controller):
    """Bounds what it says, and not what it adds up."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.low, self.high = settings["lambda_min"], settings["lambda_max"]
        self.rate, self.target = settings["learning_rate"], settings["target_coverage"]
        self.sum = settings["initial_lambda"]

    @property
    def lambda_rej(self) -> float:
        return min(max(self.sum, self.low), self.high)

    def observe(self, coverage: float, answers: float = 1.0) -> None:
        self.sum += self.rate * (self.target - coverage)


def reference_rule(settings: Mapping[str, Any]) -> Any:
    return OWN.make_controller({**settings, "rule": "reference"})


def pack_with_one_rate(members: Any) -> Any:
    shared = members[0]["config"]["learning_rate"]
    return OWN.train_pack(
        [{**member, "config": {**member["config"], "learning_rate": shared}} for member in members]
    )


def pack_that_leaks_nan(members: Any) -> Any:
    found = OWN.train_pack(members)
    if any(member["seed"] >= OWN.spoiled for member in members):
        return [{name: item * math.nan for name, item in weights.items()} for weights in found]
    return found


def summed_gradient(seed: int, rows: Any) -> Any:
    return len(rows) * OWN.batch_gradient(seed, rows)


def averaged_micro_batches(seed: int, batch_size: int, config: Any) -> Any:
    """The mean of the micro-batches' gradients, whatever their rows."""
    parts = [
        range(first, min(first + batch_size, OWN.rows_of_a_batch))
        for first in range(0, OWN.rows_of_a_batch, batch_size)
    ]
    return {"step": torch.stack([OWN.batch_gradient(seed, part) for part in parts]).mean(0)}


class ForgetsTheThresholds(OWN.make_training):  # type: ignore[misc]
    """Takes up everything but the generator of the thresholds."""

    def load(self, path: Path) -> None:
        super().load(path)
        self._trainer._tau_generator.manual_seed(0)


class ForgetsTheSchedule(OWN.make_training):  # type: ignore[misc]
    """Goes on with the learning rate that it began with."""

    def load(self, path: Path) -> None:
        rate = self._trainer.optimizer.param_groups[0]["lr"]
        super().load(path)
        self._trainer.optimizer.param_groups[0]["lr"] = rate


def writes_zero_without_sign(table: pa.Table, path: Path) -> None:
    place = table.schema.get_field_index("x")
    OWN.write_table(table.set_column(place, table.schema.field(place), pc.add(table.column("x"), 0.0)), path)


def writes_nan_as_null(table: pa.Table, path: Path) -> None:
    """What becomes of NaN on its way through pandas."""
    place = table.schema.get_field_index("x")
    column = table.column("x")
    nulled = pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float64()), column)
    OWN.write_table(table.set_column(place, table.schema.field(place), nulled), path)


def writes_no_metadata(table: pa.Table, path: Path) -> None:
    kept = {key: value for key, value in table.schema.metadata.items() if key != b"note"}
    OWN.write_table(table.replace_schema_metadata(kept), path)


def writes_statistics(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path)


def reads_unchecked(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise OWN.read_refusal(str(error)) from None


class LosesOnOpening(RowStore):
    """Begins its first fragment anew."""

    def __init__(self, folder: Path, name: str) -> None:
        for path in folder.glob(f"{name}-*.parquet"):
            path.unlink()
        super().__init__(folder, name)


class KeepsInMemory(RowStore):
    """Says that rows are flushed which wait in memory."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder, name)
        self._waiting: list[tuple[str, float]] = []

    def append(self, key: str, value: float) -> None:
        if key in self._writer._seen or key in dict(self._waiting):
            raise ValueError(key)
        self._waiting.append((key, value))

    def flush(self) -> None:
        pass


class ForgetsItsKeys(RowStore):
    """Knows the keys that it wrote, and none that were there when it was opened."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder, name)
        self._writer._seen = set()


def dump_without_seeds(plan: Any) -> str:
    return OWN.dump_plan(plan.model_copy(update={"seeds": [0]}))


def parse_with_key_errors(text: str) -> Any:
    if "space" not in text:
        raise KeyError("space")
    return OWN.parse_plan(text)


class SeveralLinesError(Exception):
    lines = ("first\nsecond",)


def parse_in_several_lines(text: str) -> Any:
    try:
        return OWN.parse_plan(text)
    except OWN.plan_refusal:
        raise SeveralLinesError from None


def resolve_rounded(flat: Any) -> Any:
    return {
        name: float(f"{value:.1e}") if isinstance(value, float) else value
        for name, value in OWN.resolve_flat(flat).items()
    }


def rank_by_arrival(rows: Any, options: Any) -> Any:
    arrived = list(dict.fromkeys(row["config_id"] for row in rows))
    return sorted(OWN.rank(rows, options), key=lambda entry: arrived.index(entry["config_id"]))


def rank_without_failures(rows: Any, options: Any) -> Any:
    """Orders by the mean error of the trials that did not fail."""
    errors: dict[str, list[float]] = {row["config_id"]: [] for row in rows}
    for row in rows:
        if row["status"] != "failed":
            errors[row["config_id"]].append(row["accepted_error"])
    means = {name: sum(held) / len(held) if held else math.inf for name, held in errors.items()}
    order = sorted(means, key=lambda name: math.inf if math.isnan(means[name]) else means[name])
    return [
        {"config_id": name, "rank": place, "feasible": True, "front": 1}
        for place, name in enumerate(order, 1)
    ]


def rank_from_the_last(rows: Any, options: Any) -> Any:
    entries = OWN.rank(rows, options)
    last = max((entry["front"] or 0 for entry in entries), default=0)
    return [
        {**entry, "front": None if entry["front"] is None else last - entry["front"]} for entry in entries
    ]


def decide_without_the_last(pairs: Any, counts: Any, look: int) -> Any:
    """Is one off in counting the seeds."""
    cut = [
        {
            **pair,
            **{name: pair[name][:-1] for name in ("seeds", "base", "candidate")},
            "planned": pair["planned"] - 1,
        }
        for pair in pairs
    ]
    return OWN.decide(cut, counts, look - 1)


def decide_on_what_is_finite(pairs: Any, counts: Any, look: int) -> Any:
    """Leaves out, unsaid, the seeds in which an arm has no value."""
    known = [
        [place for place, value in enumerate(pair["candidate"]) if math.isfinite(value)] for pair in pairs
    ]
    left = [
        {
            **pair,
            **{name: [pair[name][place] for place in places] for name in ("seeds", "base", "candidate")},
            "planned": len(places),
        }
        for pair, places in zip(pairs, known, strict=True)
        if places
    ]
    return OWN.decide(left, counts, look) if left else {"verdict": "PASS", "cells": []}


def decide_on_what_is_there(pairs: Any, counts: Any, look: int) -> Any:
    """Takes the seeds that came for those that were planned."""
    return OWN.decide([{**pair, "planned": len(pair["seeds"])} for pair in pairs], counts, look)


def decide_by_the_most(pairs: Any, counts: Any, look: int) -> Any:
    """Passes where most scenarios do."""
    found = OWN.decide(pairs, counts, look)
    passed = sum(cell["verdict"] == "PASS" for cell in found["cells"])
    return {**found, "verdict": "PASS" if 2 * passed > len(found["cells"]) else found["verdict"]}


def decide_without_equality(pairs: Any, counts: Any, look: int) -> Any:
    """Takes arms that agree for arms of which nothing is known."""
    found = OWN.decide(pairs, counts, look)
    return {**found, "verdict": "INCONCLUSIVE" if found["cells"][0]["exact"] else found["verdict"]}


def decide_on_any_change(pairs: Any, counts: Any, look: int) -> Any:
    """Says no to what is surely better as well."""
    turned = [{**pair, "base": pair["candidate"], "candidate": pair["base"]} for pair in pairs]
    one, other = (OWN.decide(some, counts, look) for some in (pairs, turned))
    cells = [
        {**cell, "verdict": "FAIL" if "FAIL" in (cell["verdict"], back["verdict"]) else cell["verdict"]}
        for cell, back in zip(one["cells"], other["cells"], strict=True)
    ]
    return {**one, "cells": cells}


# The law, the defect, and whether a case is as small as one that shows it can be.
Small = Callable[[Mapping[str, Any]], bool]
PLANTED: dict[str, tuple[str, dict[str, Any], Small]] = {
    "no cap": ("controller_history", {"make_controller": without_cap}, lambda c: len(c["operations"]) == 1),
    "NaN is zero": (
        "controller_history",
        {"make_controller": HearsNaNAsZero},
        lambda c: len(c["operations"]) <= 2,
    ),
    "velocity forgotten": (
        "controller_history",
        {"make_controller": ForgetsItsVelocity},
        lambda c: len(c["operations"]) <= 4,
    ),
    "never moves": (
        "controller_history",
        {"make_controller": NeverMoves},
        lambda c: len(c["operations"]) <= 2,
    ),
    "moves away": ("controller_history", {"make_controller": MovesAway}, lambda c: len(c["operations"]) <= 2),
    "winds up": ("controller_unwinds", {"make_controller": WindsUp}, lambda c: c["saturated"] <= 3),
    "asymmetric steps": (
        "controller_is_unbiased_in_noise",
        {"make_controller": reference_rule},
        lambda c: len(c["noise"]) == 2,
    ),
    "one rate": ("pack_is_single_training", {"train_pack": pack_with_one_rate}, lambda c: True),
    "leaked NaN": ("bad_member_leaves_neighbours", {"train_pack": pack_that_leaks_nan}, lambda c: True),
    "summed gradient": (
        "gradients_of_parts_are_the_whole",
        {"batch_gradient": summed_gradient},
        lambda c: len(c["parts"]) == 2,
    ),
    "averaged micro-batches": (
        "accumulation_is_the_full_batch",
        {"train_in_micro_batches": averaged_micro_batches},
        lambda c: c["batch_size"] in (3, 4),
    ),
    "thresholds forgotten": (
        "resumed_is_uninterrupted",
        {"make_training": ForgetsTheThresholds},
        lambda c: c["epochs"] == 1,
    ),
    "schedule forgotten": (
        "resumed_is_uninterrupted",
        {"make_training": ForgetsTheSchedule},
        lambda c: c["epochs"] == 1,
    ),
    "thresholds forgotten on the way": (
        "training_history",
        {"make_training": ForgetsTheThresholds},
        lambda c: len(c["operations"]) <= 4,
    ),
    "no signed zero": (
        "parquet_keeps_every_bit",
        {"write_table": writes_zero_without_sign},
        lambda c: len(c["missing"]) == 1,
    ),
    "NaN is null": (
        "parquet_keeps_every_bit",
        {"write_table": writes_nan_as_null},
        lambda c: len(c["missing"]) == 1,
    ),
    "no metadata": (
        "parquet_keeps_every_bit",
        {"write_table": writes_no_metadata},
        lambda c: len(c["missing"]) == 0,
    ),
    "statistics without NaN": (
        "filter_is_pythons",
        {"write_table": writes_statistics},
        lambda c: len(c["parts"]) == 1 and len(c["parts"][0]["missing"]) == 2,
    ),
    "unchecked pages": ("damage_is_told", {"read_table": reads_unchecked}, lambda c: True),
    "lost on opening": ("store_history", {"open_store": LosesOnOpening}, lambda c: len(c["operations"]) <= 3),
    "kept in memory": ("store_history", {"open_store": KeepsInMemory}, lambda c: len(c["operations"]) <= 2),
    "a key twice": ("store_history", {"open_store": ForgetsItsKeys}, lambda c: len(c["operations"]) <= 4),
    "seeds not written": (
        "plan_survives_its_text",
        {"dump_plan": dump_without_seeds},
        lambda c: len(c["plan"]) == 3,
    ),
    "KeyError": (
        "text_is_a_plan_or_refused",
        {"parse_plan": parse_with_key_errors},
        lambda c: c["text"] == "",
    ),
    "several lines": (
        "text_is_a_plan_or_refused",
        {"parse_plan": parse_in_several_lines, "plan_refusal": SeveralLinesError},
        lambda c: c["text"] == "",
    ),
    "rounded values": (
        "flat_config_resolves_once",
        {"resolve_flat": resolve_rounded},
        lambda c: len(c["flat"]) <= 1,
    ),
    "by arrival": ("order_is_irrelevant", {"rank": rank_by_arrival}, lambda c: len(c["run"]) == 2),
    "hidden failures": ("harm_never_helps", {"rank": rank_without_failures}, lambda c: len(c["run"]) <= 3),
    "fronts from the last": (
        "worse_config_changes_nothing",
        {"rank": rank_from_the_last},
        lambda c: len(c["run"]) == 1,
    ),
    "all but the last": (
        "gate_knows_no_order",
        {"decide": decide_without_the_last},
        lambda c: len(c["scenarios"]) == 1,
    ),
    "no value left out": (
        "gate_gains_nothing_by_harm",
        {"decide": decide_on_what_is_finite},
        lambda c: len(c["scenarios"]) == 1 and c["harm"] == "has no value",
    ),
    "gaps not counted": (
        "gate_passes_nothing_missing",
        {"decide": decide_on_what_is_there},
        lambda c: len(c["lost"]) == 1,
    ),
    "most of them": (
        "gate_passes_each_alone",
        {"decide": decide_by_the_most},
        lambda c: len(c["scenarios"]) == 3,
    ),
    "equal is unknown": (
        "gate_passes_the_same_code",
        {"decide": decide_without_equality},
        lambda c: len(c["scenarios"]) == 1,
    ),
    "any change": (
        "gate_fails_one_way",
        {"decide": decide_on_any_change},
        lambda c: len(c["scenarios"]) == 1,
    ),
}


# Whose cases take so long that making them small does.
LONG = {
    "one rate",
    "thresholds forgotten on the way",
    "statistics without NaN",
    "unchecked pages",
    "lost on opening",
    "a key twice",
    "seeds not written",
    "by arrival",
    "hidden failures",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in PLANTED]
)
def test_a_planted_defect_is_found_made_small_and_replayed(name: str) -> None:
    """By a small case, which breaks the law again from its text, and not where the defect is mended."""
    law, instead, is_small = PLANTED[name]
    prop, spoiled = BY_NAME[law], own_system(**instead)
    found = try_property(prop, spoiled, examples=PROFILES["ci"].examples, seed_of_cases=1)
    assert found.status == "broken", found.message
    assert found.case is not None
    assert is_small(found.case), found.case
    again = decode_case(encode_case(found.case))
    assert broken_by(prop, spoiled, again) == found.message
    assert broken_by(prop, OWN, again) is None


def test_every_law_has_a_defect_that_it_finds() -> None:
    """A law that nothing can break would say nothing."""
    assert {law for law, _, _ in PLANTED.values()} == set(BY_NAME)


def test_the_asymmetric_rule_cannot_satisfy_the_law_of_noise() -> None:
    """Half steps up and double steps down: the limit that is documented, by its smallest case."""
    found = try_property(unbiased_in_noise("reference"), OWN, examples=50)
    assert found.status == "broken"
    assert found.case is not None
    assert len(found.case["noise"]) == 2


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (0.0, -0.0, "is 0.0, not -0.0"),
        (math.nan, math.nan, None),
        (1, 1.0, "is 1, not 1.0"),
        ([1, 2], [1], "has 2 entries, not 1"),
        ({"a": 1}, {"b": 1}, "has a, not b"),
        ({"a": [1.0]}, {"a": [2.0]}, "a.0 is 1.0, not 2.0"),
        (torch.tensor([math.nan]), torch.tensor([math.nan]), None),
        (torch.tensor([0.0]), torch.tensor([-0.0]), "differs by up to 0"),
        (torch.tensor(1.0), torch.tensor(1), "is torch.float32 (), not torch.int64 ()"),
    ],
)
def test_differences_are_seen_to_the_last_bit(one: Any, other: Any, said: str | None) -> None:
    """Values are the same only where nothing can tell them apart."""
    assert first_difference(one, other) == said


MACHINE_SETTINGS = settings(
    max_examples=5,
    stateful_step_count=10,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_the_machines_run_under_hypothesis_too(machine: Machine) -> None:
    """The same rules as a RuleBasedStateMachine: histories are begun, and every operation is a rule of it."""
    begun = []
    made = state_machine(machine, OWN)

    class Counted(made):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            begun.append(self)

    run_state_machine_as_test(Counted, settings=MACHINE_SETTINGS)
    assert len(begun) >= MACHINE_SETTINGS.max_examples
    assert all(hasattr(Counted, name) for name in machine.operations)


def test_a_machine_under_hypothesis_finds_the_defect_of_a_store() -> None:
    """What breaks the law of its histories breaks a run of its rules."""
    (machine,) = [machine for machine in MACHINES if machine.name == "store_history"]
    made = state_machine(machine, own_system(open_store=KeepsInMemory))
    many = settings(MACHINE_SETTINGS, max_examples=100)
    with pytest.raises(BrokenLawError):
        run_state_machine_as_test(made, settings=many)
