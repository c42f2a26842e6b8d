"""The rung board: who goes on, whatever the order of arrival, and what becomes of NaN and failures."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.halving import Decision, RungBoard

NAN = math.nan
LAST_EPOCH = 27


def play(values, *, rungs=(1, 3, 9), eta=3, mode="min", order=None, leaves=None):
    """Drive one cohort to its end; give the last epoch of each trial and the board.

    `values` maps (config_id, seed) to a function of the epoch; `leaves` to the epoch after which a trial ends
    by itself, with its value there, or None as value of a failure. `order` picks who moves next.
    """
    board = RungBoard(rungs, eta, mode)
    board.open_cohort(0, values)
    epochs = dict.fromkeys(values, 0)
    waiting, over = set(), set()
    leaves = leaves or {}

    def follow(decisions):
        for decision in decisions:
            key = (decision.config_id, decision.seed)
            (waiting.add if decision.action == "wait" else waiting.discard)(key)
            if decision.action == "stop":
                over.add(key)

    def ends(key):
        return epochs[key] == LAST_EPOCH or (key in leaves and epochs[key] >= leaves[key][0])

    # A trial may end, or fail, while it waits for the others: sooner or later, as `order` has it.
    while ready := sorted(key for key in values if key not in over and (key not in waiting or ends(key))):
        key = ready[order(len(ready)) if order else 0]
        if ends(key):
            over.add(key)
            value = leaves[key][1] if key in leaves else values[key](LAST_EPOCH)
            follow(board.leave(0, *key, value))
            continue
        epochs[key] += 1
        follow(board.report(0, *key, epochs[key], values[key](epochs[key])))
    return epochs, board


def constant(value):
    """A metric that is the same at every epoch."""
    return lambda epoch: value


def test_no_nan_trial_passes_its_first_rung():
    """Twelve trials, four of them NaN: an asynchronous halving is known to run all four to the end."""
    values = {(f"c{i:02}", 0): constant(NAN if i % 3 == 0 else i / 10) for i in range(12)}
    epochs, _ = play(values)
    assert all(epochs[f"c{i:02}", 0] == 1 for i in range(0, 12, 3))
    assert sum(epoch == 1 for epoch in epochs.values()) == 8
    assert sorted(key[0] for key, epoch in epochs.items() if epoch > 1) == ["c01", "c02", "c04", "c05"]
    assert epochs["c01", 0] == LAST_EPOCH


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf, None], ids=["nan", "inf", "-inf", "none"])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_rung_of_nothing_finite_empties(bad, mode):
    """Where no value is finite nobody goes on, in either direction of the metric."""
    epochs, board = play({(c, 0): constant(bad) for c in "abc"}, mode=mode)
    assert set(epochs.values()) == {1}
    assert board.awaited(0) == []


@pytest.mark.parametrize("mode, best", [("min", "a"), ("max", "i")])
def test_the_best_third_goes_on(mode, best):
    """Nine configs: nine, three, one."""
    epochs, _ = play({(c, 0): constant(float(i)) for i, c in enumerate("abcdefghi")}, mode=mode)
    assert sorted(epochs.values()) == [1] * 6 + [3] * 2 + [LAST_EPOCH]
    assert epochs[best, 0] == LAST_EPOCH


def test_ties_go_to_the_smaller_config_id():
    """Equal values are ordered by config_id, whoever came first."""
    for order in (None, lambda n: n - 1):
        epochs, _ = play({(c, 0): constant(1.0) for c in "abcd"}, rungs=(1,), order=order)
        assert [c for (c, _), epoch in sorted(epochs.items()) if epoch > 1] == ["a", "b"]


def test_a_config_counts_with_the_mean_of_its_seeds():
    """One lucky seed does not carry a config; its seeds go on or stop together."""
    values = {
        ("a", 0): constant(0.0),
        ("a", 1): constant(10.0),
        ("b", 0): constant(3.0),
        ("b", 1): constant(4.0),
    }
    epochs, _ = play(values, rungs=(2,), eta=2)
    assert epochs == {("a", 0): 2, ("a", 1): 2, ("b", 0): LAST_EPOCH, ("b", 1): LAST_EPOCH}


def test_one_nan_seed_stops_the_config():
    """Seeds [0.01, nan] are worse than any finite pair: no mean over the survivors."""
    values = {
        ("a", 0): constant(0.01),
        ("a", 1): constant(NAN),
        ("b", 0): constant(9.0),
        ("b", 1): constant(9.0),
    }
    epochs, _ = play(values, rungs=(2,), eta=2)
    assert epochs == {("a", 0): 2, ("a", 1): 2, ("b", 0): LAST_EPOCH, ("b", 1): LAST_EPOCH}


def test_a_doomed_trial_does_not_wait():
    """A NaN at a rung is stopped at once, and so is a seed of the same config that waits or arrives later."""
    board = RungBoard((1,), 2)
    board.open_cohort(5, [("a", 0), ("a", 1), ("a", 2), ("b", 0)])
    assert board.report(5, "a", 0, 1, 0.5) == [Decision(5, "a", 0, "wait")]
    assert board.report(5, "a", 1, 1, NAN) == [Decision(5, "a", 1, "stop"), Decision(5, "a", 0, "stop")]
    assert board.report(5, "a", 2, 1, 0.1) == [Decision(5, "a", 2, "stop")]
    assert board.report(5, "b", 0, 1, 7.0) == [Decision(5, "b", 0, "continue")]


def test_a_large_mean_does_not_overflow():
    """Two finite seeds have a finite mean, however large they are."""
    huge = 1.7e308
    values = {
        ("a", 0): constant(huge),
        ("a", 1): constant(huge),
        ("b", 0): constant(NAN),
        ("b", 1): constant(1.0),
    }
    epochs, _ = play(values, rungs=(1,), eta=2)
    assert epochs["a", 0] == LAST_EPOCH


def test_a_failure_frees_those_who_waited_for_it():
    """The board never waits for a trial that is gone, and a failure takes the config out."""
    board = RungBoard((1,), 2)
    board.open_cohort(0, [("a", 0), ("b", 0)])
    assert board.report(0, "a", 0, 1, 5.0) == [Decision(0, "a", 0, "wait")]
    assert board.awaited(0) == [("b", 0)]
    assert board.leave(0, "b", 0, None) == [Decision(0, "a", 0, "continue")]
    assert board.awaited(0) == []


def test_a_trial_that_ended_well_keeps_its_place():
    """Who finished early competes with its last value at the rungs it did not live to see."""
    values = {(c, 0): constant(float(i)) for i, c in enumerate("abcdef")}
    epochs, _ = play(values, rungs=(4,), leaves={("a", 0): (2, 0.0)})
    assert epochs["a", 0] == 2
    assert epochs["b", 0] == LAST_EPOCH
    assert {epochs[c, 0] for c in "cdef"} == {4}


def test_a_report_told_twice_changes_nothing():
    """A trial restarted after a lost worker repeats its epochs; first values and decisions stand."""
    board = RungBoard((1, 3), 2)
    board.open_cohort(0, [("a", 0), ("b", 0)])
    board.report(0, "a", 0, 1, 1.0)
    assert board.report(0, "a", 0, 1, NAN) == [Decision(0, "a", 0, "wait")]
    board.report(0, "b", 0, 1, 2.0)
    assert board.report(0, "a", 0, 1, 1.0) == [Decision(0, "a", 0, "continue")]
    assert board.report(0, "b", 0, 3, 0.0) == [Decision(0, "b", 0, "stop")]


def test_between_rungs_trials_go_on():
    """Only rungs decide: a NaN between them is the trainer's business."""
    board = RungBoard((3,), 2)
    board.open_cohort(0, [("a", 0)])
    assert board.report(0, "a", 0, 1, NAN) == [Decision(0, "a", 0, "continue")]
    assert board.report(0, "a", 0, 3, 1.0) == [Decision(0, "a", 0, "continue")]
    assert board.report(0, "a", 0, 9, NAN) == [Decision(0, "a", 0, "continue")]


METRICS = st.one_of(st.floats(-5, 5), st.sampled_from([NAN, math.inf]))


@st.composite
def cohorts(draw):
    """A cohort of up to seven configs with up to three seeds, some of which leave or fail on their way."""
    names = draw(st.lists(st.sampled_from("abcdefg"), min_size=1, unique=True))
    seeds = range(draw(st.integers(1, 3)))
    keys = [(name, seed) for name in names for seed in seeds]
    table = {key: draw(st.lists(METRICS, min_size=4, max_size=4)) for key in keys}
    leaves = {}
    for key in keys:
        if draw(st.integers(0, 4)) == 0:
            leaves[key] = (draw(st.integers(0, 12)), draw(st.one_of(st.none(), METRICS)))
    values = {key: (lambda epoch, row=row: row[min(epoch // 3, 3)]) for key, row in table.items()}
    return values, leaves


@settings(max_examples=150)
@given(cohorts(), st.integers(2, 4), st.randoms(use_true_random=False))
def test_the_order_of_arrival_changes_nothing(cohort, eta, random):
    """Any interleaving of the same trials ends each at the same epoch."""
    values, leaves = cohort
    expected, _ = play(values, eta=eta, leaves=leaves)
    shuffled, board = play(values, eta=eta, leaves=leaves, order=random.randrange)
    assert shuffled == expected
    assert board.awaited(0) == []


@settings(max_examples=150)
@given(cohorts(), st.integers(2, 4))
def test_who_passes_the_first_rung_is_finite_and_one_of_few(cohort, eta):
    """At most ceil(n / eta) of n configs go past it, and none with a value there that is not finite."""
    values, leaves = cohort
    epochs, _ = play(values, rungs=(3, 9), eta=eta, leaves=leaves)
    passed = {config for (config, _), epoch in epochs.items() if epoch > 3}
    assert len(passed) <= math.ceil(len({config for config, _ in values}) / eta)
    for key in values:
        if key[0] in passed:
            at_rung = values[key](3) if epochs[key] >= 3 else leaves[key][1]
            assert at_rung is not None
            assert math.isfinite(at_rung)


def test_cohorts_do_not_see_each_other():
    """Each cohort halves on its own."""
    board = RungBoard((1,), 2)
    board.open_cohort(0, [("a", 0), ("b", 0)])
    board.open_cohort(1, [("c", 0)])
    board.report(0, "a", 0, 1, 0.0)
    assert board.report(1, "c", 0, 1, 99.0) == [Decision(1, "c", 0, "continue")]
    assert board.awaited(0) == [("b", 0)]


def test_a_closed_cohort_is_forgotten():
    """Nothing is kept of trials that have ended: a long sweep has many."""
    board = RungBoard((1,), 2)
    board.open_cohort(0, [("a", 0)])
    board.close_cohort(0)
    with pytest.raises(ValueError, match="a cohort must be opened first, got cohort=0"):
        board.report(0, "a", 0, 1, 0.0)


BAD = {
    "no rungs": (lambda: RungBoard(()), "rungs must be epochs >= 1 that increase"),
    "not increasing": (lambda: RungBoard((3, 3)), "rungs must be epochs >= 1 that increase"),
    "rung zero": (lambda: RungBoard((0, 3)), "rungs must be epochs >= 1 that increase"),
    "eta": (lambda: RungBoard((1,), 1), "eta must be >= 2, got eta=1"),
    "mode": (lambda: RungBoard((1,), 2, "best"), "mode must be 'min' or 'max'"),
    "no members": (lambda: RungBoard((1,)).open_cohort(0, []), "a cohort must have members"),
    "member twice": (lambda: RungBoard((1,)).open_cohort(0, [("a", 0)] * 2), "members must differ"),
    "unknown cohort": (lambda: RungBoard((1,)).report(0, "a", 0, 1, 0.0), "a cohort must be opened first"),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD)
def test_misuse_is_refused(make, message):
    """Settings and calls that cannot be meant raise ValueError."""
    with pytest.raises(ValueError, match=message):
        make()


def test_strangers_and_the_departed_cannot_report():
    """A trial that is no member, or that left, is refused."""
    board = RungBoard((1,))
    board.open_cohort(0, [("a", 0)])
    with pytest.raises(ValueError, match="a trial must be a member"):
        board.report(0, "a", 1, 1, 0.0)
    board.leave(0, "a", 0, 1.0)
    with pytest.raises(ValueError, match="a trial that left cannot report"):
        board.report(0, "a", 0, 2, 0.0)
    with pytest.raises(ValueError, match="a cohort can be opened once"):
        board.open_cohort(0, [("b", 0)])
