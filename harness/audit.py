"""Which knobs of a plan do nothing: short trainings of its own task, with one knob moved at a time.

A knob is compared in several configs drawn from the plan's space (contexts), all else equal, on few rows of
the plan's data. It acts when trainings end or measure otherwise; where they do not, it is tried on rows with
NaN as well, because some knobs act on faults only. What is compared is decided in `trainables.brief`.
"""

from __future__ import annotations

import itertools
import math
import random
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.plan import Plan, plan_space
from harness.task_errors import task_errors_told
from search_spaces.domains import Choice, Const
from search_spaces.identity import config_id
from search_spaces.space import Space, condition_text
from trainables.configs import active_knobs, resolve_config

if TYPE_CHECKING:
    from trainables.brief import Evidence, Splits
    from trainables.tasks.protocol import Task

ROWS = 128
MAX_EPOCHS = 30
DRAWS = 3
_TRIES = 64  # draws looked through for those in which a knob is active
_TOLERANCE = {"float64": 1e-9, "float32": 1e-5}

# Verdicts, the good ones first.
ACTS = "acts"
ON_FAULTS = "acts on faults"
MEASURES = "measures"
IDLE = "idle"
UNTRIED = "untried"
ALIKE = "alike"
DEAD = "dead"
NEVER_ACTIVE = "never active"
FAILS = "fails"
FINDINGS = (ALIKE, DEAD, NEVER_ACTIVE, FAILS)


@dataclass(frozen=True, slots=True)
class KnobVerdict:
    """What moving one knob did; `where` is "space" or "config", `detail` what it rests on.

    With `where` "term", `knob` is a term of the loss that is weighed and does nothing in any of the draws:
    idle where it is zero (a constraint that is met, or a broken term), dead where it is constant or has no
    gradient.
    """

    knob: str
    where: str
    verdict: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Audit:
    """The verdicts on all knobs of a plan, and what they rest on."""

    verdicts: tuple[KnobVerdict, ...]
    draws: int
    rows: int
    trainings: int

    @property
    def findings(self) -> list[KnobVerdict]:
        """The knobs that a sweep would be wasted on."""
        return [item for item in self.verdicts if item.verdict in FINDINGS]


def audit_plan(
    plan: Plan,
    given: Iterable[str],
    *,
    draws: int = DRAWS,
    on_knob: Callable[[str], None] = lambda knob: None,
) -> Audit:
    """Judge every knob that varies in the plan's space, and those of `given` that its config fixes.

    `given` names the knobs that the plan's file itself fixes: a resolved plan names them all. A fixed knob is
    compared with its default, unless it turns something off. Trains on the CPU with the plan's first seed;
    the same plan gives the same verdicts. Raises UserError where the task cannot be loaded.
    """
    space = plan_space(plan)
    bench = _Bench.of(plan, space)
    verdicts = []
    for knob, domain in space.domains.items():
        if isinstance(domain, Const) or knob in plan.config:
            continue
        on_knob(knob)
        verdicts.append(_judge_varied(bench, space, knob, draws))
    defaults = resolve_config({})
    for knob in given:
        value = plan.config.get(knob)
        # What is turned off is not waited for: it could only be found to do nothing.
        if value not in (0, None, "none") and value != defaults[knob]:
            on_knob(knob)
            verdicts.append(_judge_fixed(bench, space, knob, defaults[knob], draws))
    verdicts += _judge_terms(bench, draws)
    return Audit(tuple(verdicts), draws, bench.rows, bench.trainings)


def _judge_varied(bench: _Bench, space: Space, knob: str, draws: int) -> KnobVerdict:
    domain = space.domains[knob]
    contexts = [context for context in bench.draws if knob in context][:draws]
    if not contexts:
        condition = condition_text(domain)
        detail = f"acts only when {condition}, which no draw has" if condition else "no draw has it"
        return KnobVerdict(knob, "space", NEVER_ACTIVE, detail)
    if isinstance(domain, Choice):
        return _judge(bench, knob, "space", [(c, list(domain.options)) for c in contexts], every_pair=True)
    moved = [(context, domain.spread(3, *_room(space, knob, context))) for context in contexts]
    return _judge(bench, knob, "space", [at for at in moved if len(at[1]) == 3], every_pair=False)


def _room(space: Space, knob: str, context: Mapping[str, Any]) -> tuple[float, float]:
    """The range that the orders between knobs leave to one of them, all others standing as they do."""
    low, high = -math.inf, math.inf
    for order in space.constraints:
        if order.larger == knob and order.smaller in context:
            low = max(low, context[order.smaller])
        if order.smaller == knob and order.larger in context:
            high = min(high, context[order.larger])
    return low, high


def _judge_fixed(bench: _Bench, space: Space, knob: str, default: Any, draws: int) -> KnobVerdict:
    fixed = bench.fixed[knob]
    moved = [(context, [fixed, default]) for context in bench.draws[:draws]]
    found = _judge(bench, knob, "config", moved, every_pair=False)
    if found.verdict != DEAD:
        return found
    return KnobVerdict(
        knob, "config", DEAD, f"{fixed!r} trains as the default {default!r} does; {found.detail}"
    )


def _judge_terms(bench: _Bench, draws: int) -> list[KnobVerdict]:
    """Find the terms that do nothing in every draw that weighs them at all."""
    reasons: dict[str, str] = {}
    acting: set[str] = set()
    for context in bench.draws[:draws]:
        for term, reason in bench.terms(context).items():
            if reason:
                reasons.setdefault(term, reason)
            else:
                acting.add(term)
    verdicts = []
    for term, reason in reasons.items():
        told = f"this term of the loss {reason} in all draws that weigh it"
        if term not in acting and reason.startswith("is zero"):
            verdicts.append(KnobVerdict(term, "term", IDLE, f"{told}: met, or broken"))
        elif term not in acting:
            verdicts.append(KnobVerdict(term, "term", DEAD, told))
    return verdicts


def _judge(
    bench: _Bench,
    knob: str,
    where: str,
    moved: list[tuple[dict[str, Any], list[Any]]],
    *,
    every_pair: bool,
) -> KnobVerdict:
    """Compare the values in one context after another, until all that must differ has been told apart.

    `moved` holds contexts, each with the values to compare in it, in one order and of one number.
    """
    values = moved[0][1] if moved else [None, None]
    pairs = list(itertools.combinations(range(len(values)), 2))
    alike, inactive, compared = set(pairs), set(pairs), False
    told_apart_by_telemetry = False
    failure = ""
    for poisoned in (False, True):
        for context, here in moved:
            evidence = [bench.evidence({**context, knob: value}, knob, poisoned) for value in here]
            for pair in pairs:
                one, other = (evidence[i] for i in pair)
                if one is None or other is None:
                    continue
                compared = True
                if one is not other:
                    inactive.discard(pair)
                if one.status == other.status == "failed" and one.error == other.error:
                    failure = one.error
                    continue
                told_apart_by_telemetry |= one.tells_other(other, bench.tolerance)
                if one.differs(other, bench.tolerance):
                    alike.discard(pair)
                    single = next((e for e in (one, other) if e.status == "failed"), None)
                    failure = failure or ("" if single is None or poisoned else single.error)
            if not alike or (len(alike) < len(pairs) and not every_pair):
                break
        if len(alike) < len(pairs):
            break
    told = f"in {len(moved)} draws"
    if len(alike) == len(pairs):
        if not compared:
            return KnobVerdict(knob, where, UNTRIED, "what it would be moved to breaks a rule between knobs")
        if failure:
            return KnobVerdict(knob, where, FAILS, failure)
        if told_apart_by_telemetry:
            return KnobVerdict(knob, where, MEASURES, "changes the telemetry alone")
        why = f"another knob's value makes it inactive {told}" if inactive == set(pairs) else ""
        return KnobVerdict(knob, where, DEAD, why or f"changes nothing {told}")
    if failure and not poisoned:
        return KnobVerdict(knob, where, FAILS, failure)
    if poisoned:
        return KnobVerdict(knob, where, ON_FAULTS, "tells trainings apart where rows hold NaN, not elsewhere")
    if alike and every_pair:
        twins = "; ".join(f"{values[i]!r} trains as {values[j]!r}" for i, j in sorted(alike))
        return KnobVerdict(knob, where, ALIKE, f"{twins} {told}")
    return KnobVerdict(knob, where, ACTS)


class _Bench:
    """The plan's task on few rows, the configs that knobs are moved in, and what was trained already."""

    def __init__(self, plan: Plan, task: Task, splits: Splits, space: Space) -> None:
        from trainables.brief import brief_splits, poisoned_splits

        self.fixed = dict(plan.config)
        self._space = space
        self._task = task
        self._seed = plan.seeds[0]
        self.rows = max(ROWS, 2 * max(_values_of(space, "batch_size", self.fixed.get("batch_size", 32))))
        few = brief_splits(splits, self.rows, self._seed)
        self._splits: dict[bool, Splits | None] = {False: few, True: None}
        if few["train"].inputs.is_floating_point():
            self._splits[True] = poisoned_splits(few)
        halves = any(_values_of(space, "mixed_precision", self.fixed.get("mixed_precision", False)))
        varies = "dtype" in space.domains or "dtype" in self.fixed
        self._dtype = None if halves or varies else "float64"
        self.tolerance = _TOLERANCE["float64" if self._dtype else "float32"]
        self._seen: dict[tuple[str, bool], Evidence] = {}
        self._watched = 0

    @classmethod
    def of(cls, plan: Plan, space: Space) -> _Bench:
        """Load the task with the plan's first seed; `UserError` for what it raises."""
        with task_errors_told(plan.task.name):
            from trainables.tasks.registry import make_task
            from trainables.trial import make_splits

            task = make_task(plan.task.name, plan.task.params, Path(plan.base_dir))
            return cls(plan, task, make_splits(task, plan.seeds[0]), space)

    @cached_property
    def draws(self) -> list[dict[str, Any]]:
        """Configs drawn from the space, in an order of their own that is the same every time."""
        stream = random.Random(0)
        dimensions = len(self._space.dimensions)
        return [self._space.sample([stream.random() for _ in range(dimensions)]) for _ in range(_TRIES)]

    @property
    def trainings(self) -> int:
        """How many trainings the verdicts rest on."""
        return len(self._seen) + self._watched

    def evidence(self, config: Mapping[str, Any], knob: str, poisoned: bool) -> Evidence | None:
        """Train a config, once for all that train alike; None for one that breaks a rule between knobs."""
        from trainables.brief import train_briefly

        splits = self._splits[poisoned]
        if splits is None:
            return None
        flat = self._shortened(config, knob)
        try:
            key = (config_id(active_knobs(flat)), poisoned)
        except (ValueError, TypeError):
            return None
        if key not in self._seen:
            self._seen[key] = train_briefly(self._task, resolve_config(flat), self._seed, splits)
        return self._seen[key]

    def terms(self, context: Mapping[str, Any]) -> dict[str, str]:
        """Watch the terms of the loss in one draw; none where its training fails."""
        from trainables.brief import watch_terms

        evidence, splits = self.evidence(context, "", False), self._splits[False]
        if evidence is None or splits is None or evidence.status == "failed":
            return {}
        self._watched += 1
        return watch_terms(self._task, resolve_config(self._shortened(context, "")), self._seed, splits)

    def _shortened(self, config: Mapping[str, Any], knob: str) -> dict[str, Any]:
        flat = dict(config)
        if self._dtype is not None:
            flat["dtype"] = self._dtype
        if knob != "max_epochs":
            flat["max_epochs"] = min(int(flat.get("max_epochs", MAX_EPOCHS)), MAX_EPOCHS)
        return flat


def _values_of(space: Space, knob: str, fallback: Any) -> list[Any]:
    return list(space.domains[knob].spread(2)) if knob in space.domains else [fallback]


_PLACES = {"space": "", "config": " (fixed)", "term": " (term)"}


def lines_of(audit: Audit) -> Iterator[str]:
    """The audit as text: the findings first, a line each, then the knobs that act."""
    told = [item for item in audit.verdicts if item.verdict != ACTS]
    names = [item.knob + _PLACES[item.where] for item in told]
    width = max(map(len, names), default=0)
    by_verdict = sorted(zip(told, names, strict=True), key=lambda item: -_order(item[0].verdict))
    for item, name in by_verdict:
        yield f"{item.verdict:<14}  {name:<{width}}  {item.detail}".rstrip()
    acting = [item.knob for item in audit.verdicts if item.verdict == ACTS]
    yield from textwrap.wrap(
        ", ".join(acting), 110, initial_indent=f"{ACTS:<14}  ", subsequent_indent=" " * 16
    )


def _order(verdict: str) -> int:
    return (ACTS, ON_FAULTS, MEASURES, IDLE, UNTRIED, *FINDINGS).index(verdict)
