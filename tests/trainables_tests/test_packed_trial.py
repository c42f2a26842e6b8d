"""Trials trained together say what each says alone, and nothing fails for not being packable."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scm.packed.engine import PackedTrainer
from scm.packed.lanes import NotPackable, PackTrial, look_at
from scm.trial_config import TrialConfig
from search_spaces.named import SPACES
from trainables import packed_trial
from trainables.configs import resolve_and_activate
from trainables.lane_states import AloneState, LaneState
from trainables.packed_trial import (
    Member,
    PackRun,
    Shelf,
    pack_key,
)
from trainables.step_timing import step_parts, time_parts
from trainables.tasks.protocol import Task
from trainables.tasks.registry import make_task
from trainables.trial import DeviceError, TrialRun, make_splits, run_trial

ROWS = 60
SMALL: dict[str, Any] = {
    "max_epochs": 3,
    "batch_size": 8,
    "hidden_width": 6,
    "hidden_depth": 1,
    "dtype": "float64",
    "coverage_term": "soft",
    "tau_train_min": 1e-3,
    "tau_train_max": 1e-2,
}
# What differs between a trial of a pack and the same alone, whatever is trained.
# A task that scores trials one by one has a curve of fewer points.
CURVE = ("curve_coverage", "curve_error", "curve_area")
OF_THE_PACK = ("step_time_ms", "duration_s", "pack_id", "pack_size", "pack_step_time_ms", "pack_note")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A censored table of 60 rows."""
    lines = ["x,z,y,censored"]
    for i in range(ROWS):
        x, z = i / ROWS, (i * 7 % 11) / 11
        lines.append(f"{x:.4f},{z:.4f},{0.5 + x - 0.3 * z:.4f},{'low' if i % 5 == 0 else 'no'}")
    folder = tmp_path_factory.mktemp("table")
    (folder / "data.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    status = {"column": "censored", "values": {"low": "censored_below", "no": "finite"}}
    params = {"data": "data.csv", "inputs": ["x", "z"], "target": "y", "status": status}
    return make_task("table", params, folder)


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    """What was traced once is of use to every test of this module."""
    return Shelf()


class Changed:
    """A task that is another one but for what a test changes."""

    def __init__(self, task: Task, **changes: Any) -> None:
        self._task = task
        self.__dict__.update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)


def config_of(index: int, **changes: Any) -> dict[str, Any]:
    """Configs that differ in whatever trials of one pack may differ in."""
    draw = random.Random(index)
    return {
        **SMALL,
        "learning_rate": 10 ** draw.uniform(-4, -2),
        "optimizer": ("adam", "sgd", "adamw", "rmsprop")[index % 4],
        "gradient_policy": (None, "clamp", "project", "reject")[index // 2 % 4],
        "lambda_margin": draw.uniform(0, 1),
        "lambda_rej": draw.uniform(0.1, 1),
        "weight_decay": draw.uniform(0, 1e-3),
        "clip_norm": (None, 0.5)[index % 2],
        "lr_schedule": ("constant", "cosine", "linear")[index % 3],
        "max_epochs": 3 + index % 2,
        **changes,
    }


def members_of(*indices: int, seed: int = 0, **changes: Any) -> list[Member]:
    return [Member(str(index), config_of(index, **changes), seed) for index in indices]


Ends = dict[str, dict[str, Any]]
Histories = dict[str, list[Mapping[str, Any]]]


def play(run: PackRun) -> tuple[Ends, Histories, dict[str, LaneState | AloneState]]:
    """Step to the end; outcomes, what each epoch said, and states, by trial."""
    ends: Ends = {}
    histories: Histories = {}
    states: dict[str, LaneState | AloneState] = {}
    while not run.done:
        for told in run.step():
            assert told.trial_id not in ends
            if told.said:
                histories.setdefault(told.trial_id, []).append(told.said)
            if told.outcome is not None:
                ends[told.trial_id] = dict(told.outcome)
            if told.state is not None:
                states[told.trial_id] = told.state
    return ends, histories, states


def run_together(
    task: Any, members: Sequence[Member], shelf: Shelf | None = None
) -> tuple[Ends, Histories, dict[str, LaneState | AloneState]]:
    splits = {member.seed: make_splits(task, member.seed) for member in members}
    return play(PackRun(members, lambda seed: (task, splits[seed]), shelf=shelf))


def alike(
    one: Mapping[str, Any], other: Mapping[str, Any], tolerance: float = 0.0, *, apart: Sequence[str] = ()
) -> bool:
    """Whether two outcomes, or epochs, say the same, but for what is the pack's own and what is `apart`."""
    one = {name: value for name, value in one.items() if name not in (*OF_THE_PACK, *apart)}
    other = {name: value for name, value in other.items() if name not in (*OF_THE_PACK, *apart)}
    return one.keys() == other.keys() and all(
        same_value(value, other[name], tolerance) for name, value in one.items()
    )


def same_value(one: Any, other: Any, tolerance: float) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(
            same_value(*pair, tolerance) for pair in zip(one, other, strict=True)
        )
    if isinstance(one, float):
        near = math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)
        return near or (math.isnan(one) and math.isnan(other))
    return bool(one == other)


def test_each_trial_says_what_it_says_alone(table: Task, shelf: Shelf) -> None:
    """Outcome and every epoch's numbers, with other optimizers, policies and seeds beside it, to 1e-9."""
    members = [*members_of(0, 1, 2, 3, 4, 5), *[Member("6", config_of(6), 1)]]
    ends, histories, _ = run_together(table, members, shelf)
    assert {end["pack_size"] for end in ends.values()} == {7}
    for member in members:
        said: list[dict[str, Any]] = []
        alone = run_trial(table, member.config, member.seed, on_epoch=said.append)
        assert alike(ends[member.trial_id], alone, 1e-9)
        assert len(said) == len(histories[member.trial_id])
        assert all(
            alike(epoch, other, 1e-9) for epoch, other in zip(histories[member.trial_id], said, strict=True)
        )


def test_neighbours_and_place_change_nothing_not_even_a_bit(table: Task, shelf: Shelf) -> None:
    """By itself, in other company, in another order: the same outcome, in single precision too."""
    for dtype in ("float32", "float64"):
        reference, _, _ = run_together(table, members_of(0, 1, 2, 3, 4, dtype=dtype), shelf)
        for indices in ([3], [4, 3], [7, 3, 9, 8, 2, 5]):
            ends, _, _ = run_together(table, members_of(*indices, dtype=dtype), shelf)
            assert alike(ends["3"], reference["3"])


def test_trials_of_other_packs_go_on_together_as_if_nothing_had_been(table: Task, shelf: Shelf) -> None:
    """Paused in two packs, taken up in one: every bit is that of the uninterrupted trial."""
    whole, whole_said, _ = run_together(table, members_of(0, 1, 2, 3), shelf)
    states: dict[str, Any] = {}
    first_said: Histories = {}
    for indices in ([0, 3], [2, 1]):
        paused = [Member(one.trial_id, one.config, 0, until=2) for one in members_of(*indices)]
        ends, said, found = run_together(table, paused, shelf)
        assert {(end["status"], end["epochs"]) for end in ends.values()} == {("stopped", 2)}
        states |= found
        first_said |= said
    again = [
        Member(one.trial_id, one.config, 0, state=states[one.trial_id]) for one in members_of(3, 2, 1, 0)
    ]
    ends, said, _ = run_together(table, again, shelf)
    for key, end in whole.items():
        assert alike(ends[key], end)
        assert all(map(alike, [*first_said[key], *said[key]], whole_said[key]))


def test_a_paused_trial_says_what_it_would_have_come_to(table: Task, shelf: Shelf) -> None:
    """Its outcome is that of a trial alone that is stopped there."""
    (member,) = members_of(1)
    ends, _, _ = run_together(table, [Member("1", member.config, 0, until=2)], shelf)
    alone = TrialRun(table, member.config, 0)
    alone.step()
    alone.step()
    alone.stop("paused at epoch 2")
    assert alike(ends["1"], alone.outcome(), 1e-9)


def test_a_trial_that_goes_wrong_is_a_row_and_its_neighbours_do_not_notice(table: Task, shelf: Shelf) -> None:
    """One that cannot be built, one that diverges and one that cannot be scored, beside one that is well."""
    reference, _, _ = run_together(table, members_of(1), shelf)

    def build_model(config: TrialConfig) -> nn.Module:
        if config.weight_decay == 0.5:
            raise RuntimeError("this one cannot be built")
        return table.build_model(config)

    def metrics(decoded: Any, split: Any, config: TrialConfig) -> dict[str, float]:
        if config.weight_decay == 0.25:
            raise RuntimeError("this one cannot be scored")
        return table.metrics(decoded, split, config)

    members = [
        *members_of(1),
        *members_of(2, weight_decay=0.5),
        *members_of(3, learning_rate=1e300, optimizer="sgd", nonfinite_budget=0, clip_norm=None),
        *members_of(4, weight_decay=0.25),
    ]
    task = Changed(table, build_model=build_model, metrics=metrics, pack_metrics=None)
    ends, _, _ = run_together(task, members)
    assert alike(ends["1"], reference["1"], 1e-12, apart=CURVE)
    assert {key: end["status"] for key, end in ends.items()} == {
        "1": "completed",
        "2": "failed",
        "3": "diverged",
        "4": "failed",
    }
    assert "this one cannot be built" in ends["2"]["error"]
    assert "this one cannot be scored" in ends["4"]["error"]
    assert ends["3"]["nan_count"] > 0
    for key, end in ends.items():
        alone = run_trial(task, members[int(key) - 1].config, 0)
        assert (end["status"], end["stop_reason"], end["epochs"]) == (
            alone["status"],
            alone["stop_reason"],
            alone["epochs"],
        )


def test_a_config_that_no_training_accepts_fails_alone(table: Task, shelf: Shelf) -> None:
    """A knob that does not exist is that trial's message; the others are packed."""
    members = [*members_of(0, 1), Member("bad", {**SMALL, "no_such_knob": 1}, 0)]
    ends, _, _ = run_together(table, members, shelf)
    assert ends["bad"]["status"] == "failed"
    assert "no_such_knob" in ends["bad"]["error"]
    assert [ends[key]["pack_size"] for key in ("0", "1")] == [2, 2]


def test_data_that_cannot_be_loaded_fail_the_trials_of_that_seed(table: Task, shelf: Shelf) -> None:
    """What the task raises for one seed is the outcome of its trials; other seeds are trained."""
    splits = make_splits(table, 0)

    def load(seed: int) -> tuple[Task, Any]:
        if seed:
            raise RuntimeError("no data for this seed")
        return table, splits

    members = [*members_of(0), Member("other", config_of(1), 1)]
    ends, histories, _ = play(PackRun(members, load, shelf=shelf))
    assert (ends["0"]["status"], ends["other"]["status"]) == ("completed", "failed")
    assert "no data for this seed" in ends["other"]["error"]
    assert "other" not in histories


class Dropping(nn.Module):
    """A model that draws random numbers, which no pack does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 6), nn.Dropout(0.5), nn.Linear(6, 2))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        P, Q = self.body(inputs).unbind(-1)
        return P, Q


def test_what_cannot_be_packed_is_trained_alone_with_the_reason(table: Task) -> None:
    """A model that draws, a knob that no pack knows: the outcome of the trial alone, and why."""
    task = Changed(table, build_model=lambda config: Dropping())
    members = members_of(0, 1)
    shelf = Shelf()
    ends, histories, _ = run_together(task, members, shelf)
    for member in members:
        end = ends[member.trial_id]
        assert "it draws random numbers" in end["pack_note"]
        assert (end["pack_id"], end["pack_size"], end["pack_step_time_ms"]) == (None, None, None)
        assert math.isfinite(end["step_time_ms"])
        assert alike(end, run_trial(task, member.config, 0))
        assert len(histories[member.trial_id]) == end["epochs"]
    assert len(shelf.refused) == 1  # and is not tried again
    ends, _, _ = run_together(table, members_of(0, sampling="near_pole"))
    assert ends["0"]["status"] == "completed"
    assert ends["0"]["pack_note"] == "sampling='near_pole'"


def test_a_trial_alone_pauses_and_goes_on_alone(table: Task) -> None:
    """Its state is its own files; why it is alone is not forgotten."""
    (member,) = members_of(0, sampling="near_pole")
    _, _, states = run_together(table, [Member("0", member.config, 0, until=2)])
    state = states["0"]
    assert isinstance(state, AloneState)
    ends, _, _ = run_together(table, [Member("0", member.config, 0, state=state)])
    assert alike(ends["0"], run_trial(table, member.config, 0))
    assert ends["0"]["pack_note"] == "sampling='near_pole'"


@pytest.mark.parametrize("epoch", [1, 3])
def test_trials_of_a_pack_that_fails_are_trained_alone(
    epoch: int, table: Task, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong in the pack itself: who has ended stays ended, the others begin anew, alone."""
    epochs = PackedTrainer.epochs

    def fails(self: PackedTrainer) -> Iterator[Any]:
        own = epochs(self)
        for _ in range(1, epoch):
            yield next(own)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(PackedTrainer, "epochs", fails)
    members = [*members_of(0, max_epochs=2), *members_of(1, max_epochs=4)]
    ends, _, _ = run_together(table, members, Shelf(programs=shelf.programs, task=shelf.task))
    together = [key for key, end in ends.items() if end["pack_id"] is not None]
    assert together == (["0"] if epoch == 3 else [])
    for member in members:
        assert alike(ends[member.trial_id], run_trial(table, member.config, 0), 1e-9)
        note = ends[member.trial_id]["pack_note"]
        assert ("the pack failed: RuntimeError: out of luck" in note) == (member.trial_id not in together)


def test_shapes_that_differ_are_packs_of_their_own(
    table: Task, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials are packed by what they are; of too many for the memory, each pack gets its part."""
    members = [*members_of(0, 1), *members_of(2, hidden_width=5)]
    ends, _, _ = run_together(table, members, shelf)
    assert [ends[key]["pack_size"] for key in "012"] == [2, 2, 1]
    assert ends["0"]["pack_id"] == ends["1"]["pack_id"] != ends["2"]["pack_id"]
    monkeypatch.setattr(packed_trial, "lanes_that_fit", lambda entrant, device: 2)
    ends, _, _ = run_together(table, members_of(0, 1, 2, 3, 4), shelf)
    assert sorted(end["pack_size"] for end in ends.values()) == [1, 2, 2, 2, 2]


def test_scoring_many_trials_at_once_is_scoring_each(table: Task, shelf: Shelf) -> None:
    """A task's `pack_metrics` and its `metrics` say the same."""
    apart = Changed(table, pack_metrics=None)
    members = members_of(0, 1, 2)
    one, one_said, _ = run_together(table, members, shelf)
    other, other_said, _ = run_together(apart, members, shelf)
    for key in one:
        assert alike(one[key], other[key], 1e-12, apart=CURVE)
        assert all(alike(a, b, 1e-12) for a, b in zip(one_said[key], other_said[key], strict=True))


def test_the_step_time_is_measured_alone_once_for_what_is_alike(table: Task) -> None:
    """Configs that differ in numbers share it; another optimizer has the same passes and its own step."""
    splits = make_splits(table, 0)

    def parts(**changes: Any) -> tuple[Any, Any]:
        config = TrialConfig.from_flat(config_of(0, **changes))
        return step_parts(look_at(PackTrial(config, 0, "0"), table.build_model, splits), "cpu")

    assert parts() == parts(learning_rate=0.5, lambda_margin=0.7, max_epochs=9)
    passes, step = parts()
    assert parts(optimizer="rmsprop")[0] == passes
    assert parts(optimizer="rmsprop")[1] != step
    assert parts(gradient_policy="clamp")[0] != passes
    assert parts(batch_size=16)[1] == step
    passes_ms, step_ms = time_parts(table, TrialConfig.from_flat(config_of(0)), 0, splits["train"], "cpu")
    assert 0 < passes_ms < 1e3
    assert 0 <= step_ms < 1e3

    def build_model(config: TrialConfig) -> nn.Module:
        raise RuntimeError("not again")

    task: Any = Changed(table, build_model=build_model)
    broken = time_parts(task, TrialConfig.from_flat(config_of(0)), 0, splits["train"], "cpu")
    assert all(map(math.isnan, broken))


def test_what_has_one_key_may_be_one_model(table: Task) -> None:
    """Configs of one key, as a sweep draws them, have one signature where the data and shapes are one's."""
    splits = make_splits(table, 0)
    space = SPACES["default"]
    draw = random.Random(0)
    signatures: dict[Any, set[Any]] = {}
    for _ in range(60):
        point = [draw.choice((0.1, 0.9)) for _ in space.dimensions]
        drawn = {**space.sample(point), "hidden_width": 4, "hidden_depth": 1}
        config, active = resolve_and_activate(drawn)
        entrant = look_at(PackTrial(TrialConfig.from_flat(config), 0, "0"), table.build_model, splits)
        if entrant.reason is None:
            signatures.setdefault(pack_key(active), set()).add(entrant.signature)
    assert len(signatures) > 1
    assert {len(found) for found in signatures.values()} == {1}


def test_old_programs_are_let_go(table: Task) -> None:
    """A process that meets many kinds of trials does not keep them all."""
    shelf = Shelf(programs=dict.fromkeys(range(100)))  # type: ignore[arg-type]
    shelf.tidy()
    assert list(shelf.programs) == list(range(36, 100))


def test_a_pack_that_is_done_is_not_stepped(table: Task) -> None:
    """Stepping past the end is a mistake of the caller."""
    run = PackRun([], lambda seed: (table, {}))
    assert run.done
    with pytest.raises(RuntimeError, match=r"step\(\) must not be called on a pack that is done"):
        run.step()


def test_an_absent_device_is_an_error_of_the_pack(table: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """No trial can run there, so none is a row."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="a GPU was asked for"):
        PackRun(members_of(0), lambda seed: (table, {}), "cuda")


def test_the_reason_of_the_engine_is_kept(table: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine finds only when it traces is the reason, word for word."""

    def refuse(self: PackedTrainer) -> Iterator[Any]:
        raise NotPackable("0", "its loss is a riddle")
        yield

    monkeypatch.setattr(PackedTrainer, "epochs", refuse)
    ends, _, _ = run_together(table, members_of(0))
    assert ends["0"]["pack_note"] == "its loss is a riddle"
    assert ends["0"]["status"] == "completed"


def test_an_operation_that_this_torch_cannot_trace_makes_trials_train_alone(
    table: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torch that cannot trace a term of the loss costs the pack, not the trial, and the row says why."""

    def stops(*arguments: Any) -> None:
        raise NotImplementedError("no batching rule")

    monkeypatch.setattr("scm.packed.program.free_lanes", stops)
    ends, _, _ = run_together(table, members_of(0, lambda_spread=0.1))
    assert ends["0"]["pack_note"] == "NotImplementedError: no batching rule"
    assert ends["0"]["status"] == "completed"


def test_a_state_travels(table: Task, shelf: Shelf) -> None:
    """Pickled and back, it is where the trial goes on."""
    (member,) = members_of(0)
    _, _, states = run_together(table, [Member("0", member.config, 0, until=1)], shelf)
    state = pickle.loads(pickle.dumps(states["0"]))
    ends, _, _ = run_together(table, [Member("0", member.config, 0, state=state)], shelf)
    whole, _, _ = run_together(table, [member], shelf)
    assert alike(ends["0"], whole["0"])
