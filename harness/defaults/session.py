"""Finding a default, from a run to a decision: choose, look around, calibrate, confirm, report.

Every stage has seeds of its own, none of them the run's: what a stage decides is never told in the figures of
the same trainings. What is decided from the figures is in `decide`; here is what is trained, in which order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from harness.defaults.candidates import Candidate, Candidates, find_candidates
from harness.defaults.confirm import Bench, Measured, Say, measure, measure_step_times
from harness.defaults.decide import (
    DIFFERENCE,
    LOG_RATIO,
    Choice,
    Confirmation,
    Floats,
    Guard,
    GuardPairs,
    Rules,
    choose,
    confirm,
    failures,
    judge,
    on_cliff,
    scores_of,
)
from harness.defaults.neighbours import MOST, Neighbour, find_neighbours
from harness.defaults.scenarios import Scenario, find_held_out, run_scenario
from harness.defaults.threshold import Threshold, freeze_threshold
from harness.errors import EXIT_THIN_EVIDENCE, UserError
from harness.plan import plan_space
from reports.metrics import SHORTFALL, Metric
from trainables.configs import resolve_config

LEAST_SEEDS = 5
CHOICE_SEEDS = 8
NEIGHBOUR_SEEDS = 2
CALIBRATION_SEEDS = 5
CHALLENGERS = 3
"""How many configs are looked around at, and perhaps found on a cliff, before the current default stays."""
CHOICE_ROUNDS, CONFIRM_ROUNDS = 7, 15
STEP_TIME = "step_time_ms"

GUARDS: tuple[Guard, ...] = (
    Guard(name=SHORTFALL, compare=DIFFERENCE, margin=0.01),
    Guard(name="charged_error", compare=LOG_RATIO, margin=1.05),
    Guard(name="false_accept_rate", compare=DIFFERENCE, margin=0.05),
    Guard(name=STEP_TIME, compare=LOG_RATIO, margin=2.0, by_median=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for: a run, how many of its configs, how many fresh seeds, what is held out, the rules.

    seeds: of the confirmation, and as many more for the report. max_false_reject: what the threshold may
    reject of the rows with a value; None for what the config rejected where it was chosen.
    """

    run: Path
    objective: Metric
    top: int = 5
    seeds: int = 10
    holdout: tuple[str, ...] = ()
    current: Path | None = None
    guards: tuple[Guard, ...] = GUARDS
    rules: Rules = field(default_factory=Rules)
    max_false_reject: float | None = None
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Seeds:
    """Fresh seeds by stage; no two share one, but neighbours are trained with some of the choice's."""

    run: tuple[int, ...]
    choice: tuple[int, ...]
    calibration: tuple[int, ...]
    confirmation: tuple[int, ...]
    report: tuple[int, ...]

    @property
    def neighbours(self) -> tuple[int, ...]:
        """Those of the choice that neighbours are trained with."""
        return self.choice[:NEIGHBOUR_SEEDS]


@dataclass(frozen=True, slots=True)
class Tried:
    """One neighbour of a config: how much worse its score is, and why it is a cliff, if it is one."""

    neighbour: Neighbour
    apart: float
    why: str


@dataclass(frozen=True, slots=True)
class Around:
    """The neighbours of one config that were tried, and how many were left out."""

    candidate: Candidate
    tried: tuple[Tried, ...]
    left_out: int

    @property
    def cliffs(self) -> tuple[Tried, ...]:
        """The neighbours that break it."""
        return tuple(one for one in self.tried if one.why)


@dataclass(slots=True)
class Found:
    """All that was measured and decided. chosen: the default, with every value. changed: it is a new one."""

    request: Request
    candidates: Candidates
    scenarios: tuple[Scenario, ...]
    held_out: str
    seeds: Seeds
    choice: Choice
    chosen_in: Measured
    scores: Floats
    troubles: Mapping[str, str]
    choice_times: Mapping[str, Floats]
    passed_over: dict[str, str] = field(default_factory=dict)
    around: list[Around] = field(default_factory=list)
    threshold: Threshold | None = None
    candidate: Candidate | None = None
    confirmed_in: Measured | None = None
    confirm_times: Mapping[str, Floats] = field(default_factory=dict)
    confirmation: Confirmation | None = None
    chosen: Candidate | None = None
    reported_in: Measured | None = None

    @property
    def changed(self) -> bool:
        """Whether the default is another config than the current one."""
        return self.confirmation is not None and self.confirmation.change


def fresh_seeds(run: Sequence[int], count: int, looks: int) -> Seeds:
    """Seeds for every stage, counted on from those of the run; `looks` times `count` to confirm with."""
    first = max(run) + 1
    sizes = (CHOICE_SEEDS, CALIBRATION_SEEDS, count * looks, count)
    starts = np.cumsum([first, *sizes]).tolist()
    parts = [tuple(range(start, start + size)) for start, size in zip(starts, sizes, strict=False)]
    return Seeds(tuple(run), *parts)


def find_default(request: Request, say: Say) -> Found:
    """Run all stages; UserError where the run, the data or the seeds are too little to decide by."""
    bench = Bench(request.device, say)
    if request.seeds < LEAST_SEEDS:
        raise UserError(
            f"--seeds must be at least {LEAST_SEEDS}, got {request.seeds}: of fewer a reported figure "
            "has no 90 % interval",
            EXIT_THIN_EVIDENCE,
        )
    candidates = find_candidates(
        request.run, top=request.top, current=request.current, objective=request.objective
    )
    seeds = fresh_seeds(candidates.run_seeds, request.seeds, request.rules.looks[-1])
    held_out, sentence = find_held_out(candidates.plan, request.holdout, seeds.choice)
    scenarios = (run_scenario(candidates.plan), *held_out)
    found = _choose(request, candidates, scenarios, sentence, seeds, bench)
    _look_around(found, bench)
    if found.candidate is not None:
        _calibrate(found, found.candidate, bench)
    if found.candidate is not None:
        _confirm(found, bench)
    found.chosen = found.candidate if found.changed else candidates.current
    assert found.chosen is not None
    if found.threshold is None:
        _calibrate(found, found.chosen, bench)
    _report(found, found.chosen, bench)
    return found


def _choose(
    request: Request,
    candidates: Candidates,
    scenarios: tuple[Scenario, ...],
    held_out: str,
    seeds: Seeds,
    bench: Bench,
) -> Found:
    configs = {one.config_id: one.config for one in candidates.held}
    measured = measure(configs, scenarios, seeds.choice, bench=bench, what="choosing")
    times = measure_step_times(configs, scenarios[0], seeds.choice[0], rounds=CHOICE_ROUNDS, bench=bench)
    needed = (request.objective.name,)
    troubles = {name: measured.trouble(name, needed) for name in configs}
    values = measured.figures(request.objective.name)
    scores = scores_of(values, measured.scenarios, request.objective, 0)
    worth = np.array([not troubles[name] for name in configs])
    # A challenger that is no better than no answer at all is none, but where the current default is no better
    # either.
    worthless = measured.worthless()
    kinds = [
        kind
        for kind in dict.fromkeys(measured.scenarios)
        if troubles[candidates.current.config_id] or not _lost(worthless[0], measured, kind)
    ]
    for index, name in enumerate(configs):
        lost = [kind for kind in kinds if _lost(worthless[index], measured, kind)]
        if index and lost and worth[index]:
            troubles[name] = f"no better than abstaining everywhere in {', '.join(lost)}"
            worth[index] = False
    cost = [(_parameters(measured, name), _rounded_time(times[name])) for name in configs]
    prior = [one.prior for one in candidates.held]
    choice = choose(
        scores, measured.scenarios, current=0, eligible=worth, prior=prior, cost=cost, rules=request.rules
    )
    return Found(request, candidates, scenarios, held_out, seeds, choice, measured, scores, troubles, times)


def _lost(worthless: np.ndarray, measured: Measured, scenario: str) -> bool:
    """Whether most trials of a scenario are no better than abstaining."""
    return float(worthless[np.asarray(measured.scenarios) == scenario].mean()) > 0.5


def _rounded_time(times: Floats) -> float:
    """The median step time in steps of a tenth of its logarithm: less is a clock's noise."""
    known = times[np.isfinite(times) & (times > 0)]
    return round(math.log(float(np.median(known))), 1) if known.size else math.inf


def _parameters(measured: Measured, name: str) -> float:
    return float(measured.outcome(name, measured.blocks[0]).get("parameters") or 0)


def _look_around(found: Found, bench: Bench) -> None:
    """Take the first challenger that stands on no cliff; where there is none, look around the current one."""
    for index in found.choice.challengers:
        if len(found.around) == CHALLENGERS:
            break
        failed = _failures_in_choice(found, index)
        if failed:  # it would fail where it counts as well
            found.passed_over[found.candidates.held[index].config_id] = "; ".join(failed)
            continue
        around = _neighbours_of(found, index, bench)
        found.around.append(around)
        if not around.cliffs:
            found.candidate = around.candidate
            return
    if not found.troubles[found.candidates.current.config_id]:
        found.around.append(_neighbours_of(found, 0, bench))


def _failures_in_choice(found: Found, index: int) -> list[str]:
    """In which guarded figures a challenger fails already on the seeds of the choice."""
    current = found.candidates.current.config_id
    if found.troubles[current]:
        return []
    names = (current, found.candidates.held[index].config_id)
    both = replace(found.chosen_in, configs=names)
    times = {name: found.choice_times[name] for name in names}
    judged = [
        result
        for guard in found.request.guards
        for result in judge(_pairs(found, guard, both, times), found.request.rules)
    ]
    return failures(judged)


def _neighbours_of(found: Found, index: int, bench: Bench) -> Around:
    request, candidate = found.request, found.candidates.held[index]
    space = plan_space(found.candidates.plan)
    neighbours, left_out = find_neighbours(candidate.config, space, most=MOST)
    scenario = found.scenarios[0]
    named = {found.candidates.identify(one.config): one for one in neighbours}
    measured = measure(
        {name: one.config for name, one in named.items()},
        [scenario],
        found.seeds.neighbours,
        bench=bench,
        what=f"neighbours of {candidate.config_id}",
    )
    here = np.asarray(found.chosen_in.scenarios) == scenario.name
    objective = request.objective
    own_coverage = found.chosen_in.figures("coverage")[index, here]
    own_worthless = found.chosen_in.worthless()[index, here]
    own_scores, scores = _scores_beside(
        found.chosen_in.figures(objective.name)[index, here], measured.figures(objective.name), objective
    )
    coverage, worthless = measured.figures("coverage"), measured.worthless()
    paired = own_scores[: len(measured.blocks)]  # their seeds are the first of the choice's
    tried = []
    for place, (name, one) in enumerate(named.items()):
        why = on_cliff(
            own_scores,
            scores[place],
            kind=one.kind,
            broken=measured.trouble(name, (objective.name,)),
            worthless=worthless[place],
            own_worthless=own_worthless,
            coverage=coverage[place],
            own_coverage=own_coverage,
            rules=request.rules,
        )
        tried.append(Tried(one, float((scores[place] - paired).mean()), why))
    return Around(candidate, tuple(tried), left_out)


def _scores_beside(own: Floats, others: Floats, objective: Metric) -> tuple[Floats, Floats]:
    """Scores of a config (seeds,) and of its neighbours (neighbours, fewer seeds), 0 being its own mean."""
    wide = np.full((len(others), own.size), np.nan)
    wide[:, : others.shape[1]] = others
    scores = scores_of(np.vstack([own, wide]), [""] * own.size, objective, 0)
    return scores[0], scores[1:, : others.shape[1]]


def _calibrate(found: Found, candidate: Candidate, bench: Bench) -> None:
    """Freeze the threshold of a config; a candidate's own takes the frozen value from here on."""
    request = found.request
    bound = request.max_false_reject
    if bound is None:
        place = found.chosen_in.configs.index(candidate.config_id)
        here = np.asarray(found.chosen_in.scenarios) == found.scenarios[0].name
        rates = found.chosen_in.figures("false_reject_rate")[place, here]
        bound = float(rates.mean()) if np.isfinite(rates).all() else 0.05
    found.threshold = freeze_threshold(
        candidate.config,
        found.scenarios[0],
        found.seeds.calibration,
        max_false_reject=bound,
        bench=bench,
    )
    if found.candidate is candidate and found.threshold.record is not None:
        config = resolve_config({**candidate.config, "tau_infer": found.threshold.record.tau_infer})
        name, origin = found.candidates.identify(config), f"{candidate.origin}, with tau_infer frozen"
        same = name == found.candidates.current.config_id  # they differed in tau_infer alone
        found.candidate = None if same else Candidate(name, config, candidate.rank, origin)


def _confirm(found: Found, bench: Bench) -> None:
    """Look at more and more seeds of both arms until it is decided, or the last look is taken."""
    request, current, candidate = found.request, found.candidates.current, found.candidate
    assert candidate is not None
    configs = {current.config_id: current.config, candidate.config_id: candidate.config}
    found.confirm_times = measure_step_times(
        configs,
        found.scenarios[0],
        found.seeds.confirmation[0],
        rounds=CONFIRM_ROUNDS,
        bench=bench,
    )
    for look in request.rules.looks:
        seen = 0 if found.confirmed_in is None else len(found.confirmed_in.seeds)
        more = measure(
            configs,
            found.scenarios,
            found.seeds.confirmation[seen : look * request.seeds],
            bench=bench,
            what="confirming",
        )
        found.confirmed_in = more if found.confirmed_in is None else found.confirmed_in.joined(more)
        found.confirmation = _decide(found, found.confirmed_in)
        if not found.confirmation.open:
            return


def _decide(found: Found, measured: Measured) -> Confirmation:
    request, objective = found.request, found.request.objective
    troubles = [measured.trouble(name, (objective.name,)) for name in measured.configs]
    scores = scores_of(measured.figures(objective.name), measured.scenarios, objective, 0)
    return confirm(
        scores[0],
        scores[1],
        guards=[_pairs(found, guard, measured, found.confirm_times) for guard in request.guards],
        current_trouble=troubles[0],
        candidate_trouble=troubles[1],
        rules=request.rules,
    )


def _pairs(found: Found, guard: Guard, measured: Measured, times: Mapping[str, Floats]) -> GuardPairs:
    if guard.name == STEP_TIME:
        current, candidate = times.values()
        return GuardPairs(guard, [found.scenarios[0].name] * len(current), current, candidate)
    if guard.name == SHORTFALL:
        # One target for both: a config that asks for less must not look as if it reached more.
        target = float(found.candidates.current.config["target_coverage"])
        values = np.maximum(target - measured.figures("coverage"), 0.0)
    else:
        values = measured.figures(guard.name)
    return GuardPairs(guard, measured.scenarios, values[0], values[1])


def _report(found: Found, chosen: Candidate, bench: Bench) -> None:
    """Train the default, and the one that it replaced, with seeds that decided nothing."""
    configs = {chosen.config_id: chosen.config}
    configs.setdefault(found.candidates.current.config_id, found.candidates.current.config)
    found.reported_in = measure(
        configs,
        found.scenarios,
        found.seeds.report,
        bench=bench,
        what="reporting",
    )
