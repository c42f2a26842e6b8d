"""The decision as a file: the default with every value, and the record of how it was decided.

Nothing is computed of trainings here but means and intervals for telling. The file is YAML; `config` alone is
what a training takes, and everything else is for readers.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from harness.defaults import neighbours, session, threshold
from harness.defaults.candidates import Candidate
from harness.defaults.confirm import Measured
from harness.defaults.decide import (
    LOG_RATIO,
    Floats,
    Guard,
    compare_of,
    figure,
    losses_to_flip,
    seeds_for_chance,
)
from harness.defaults.session import Around, Found, Tried
from reports.evidence import Interval
from reports.provenance import gather_provenance
from search_spaces.domains import same_value
from trainables.configs import active_knobs
from trainables.loading import load_task
from trainables.trial import STANDARD_METRICS

SCHEMA_NAME = "scm_harness.defaults"
SCHEMA_VERSION = 1
DIGITS = 6
# In what the default is told: of the test split, on the seeds of the report.
FIGURES = ("coverage", *STANDARD_METRICS)
_WIDTH = 110
_FLOW = 126  # a mapping or list of plain values that is no longer than this stands on one line


def make_record(found: Found, *, commands: Sequence[str]) -> dict[str, Any]:
    """The whole file as plain values: schema, config, task, decision."""
    assert found.chosen is not None
    plan, told = found.candidates.plan, figures(found)
    return {
        "schema": {"name": SCHEMA_NAME, "version": SCHEMA_VERSION},
        "config": dict(found.chosen.config),
        "task": {"name": plan.task.name, **plan.task.params},
        "decision": {
            "outcome": "changed" if found.changed else "kept",
            "why": why(found),
            "config_id": found.chosen.config_id,
            "current": _current(found),
            "changes": _changes(found.candidates.current, found.chosen),
            "figures": told,
            "warnings": _warnings(told),
            "would_change": would_change(found),
            "rule": rule(found),
            "scenarios": _scenarios(found),
            "seeds": _seeds(found),
            "confirmation": _confirmation(found),
            "step_time_ms": _step_times(found),
            "alternatives": _alternatives(found),
            "neighbours": [_around(around, found) for around in found.around],
            "calibration": _calibration(found),
            "notes": [*found.candidates.notes],
            "run": found.candidates.run,
            "commands": list(commands),
            "versions": gather_provenance(),
            "decided_at": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }


def record_text(record: Mapping[str, Any]) -> str:
    """The record as YAML 1.2, with a line on top that says what it is; short mappings stand on one line."""
    yaml = YAML(typ="rt", pure=True)
    yaml.width = _WIDTH
    stream = io.StringIO()
    stream.write(
        "# `config` is the default with every value; `decision` says how it was decided, by which figures.\n"
    )
    yaml.dump(_laid_out(record), stream)
    return stream.getvalue()


def why(found: Found) -> str:
    """The decision in one sentence."""
    if found.confirmation is not None:
        return found.confirmation.why
    current, passed = found.candidates.current, len(found.passed_over)
    cliffs = [around for around in found.around if around.cliffs and around.candidate is not current]
    if any(not around.cliffs and around.candidate is not current for around in found.around):
        return "with its threshold frozen, the challenger is the current default"
    if cliffs or passed:
        parts = []
        if passed:
            names = ", ".join(found.passed_over)
            parts.append(f"{passed} failed in a guarded figure on the seeds of the choice ({names})")
        if cliffs:
            names = ", ".join(around.candidate.config_id for around in cliffs)
            parts.append(f"{len(cliffs)} stood on a cliff ({names})")
        rest = len(found.choice.challengers) - passed - len(cliffs)
        if rest > 0:
            parts.append(f"{rest} more were not looked around at")
        return f"of {len(found.choice.challengers)} challengers {', '.join(parts)}; the current default stays"
    if found.choice.leader is None:
        return "no config met its constraints, so the current default stays; see alternatives"
    return f"{found.choice.why}, so it stays"


def rule(found: Found) -> list[str]:
    """How it is decided, in sentences."""
    request, rules = found.request, found.request.rules
    percent = f"{100 * rules.level:g} %"
    guards = ", ".join(_guard_text(guard) for guard in request.guards)
    return [
        "Constraints come first: a config with a failed or diverged training, a non-finite value or without "
        f"a finite {request.objective.name} is ruled out, and so is a challenger that is no better than "
        "abstaining everywhere in a scenario where the current default is.",
        f"Chosen on validation figures of fresh seeds: the least regret in {request.objective.name} in the "
        f"worst scenario, then the mean rank. What is at most {rules.tie_margin:g} worse than the leader, by "
        f"the upper bound of the {percent} interval of the paired difference, ties; if the current default "
        "does, it stays. Of those that the seeds do not tell apart from the leader the first is that which "
        "the run ranks best; of those that tie with it, the one with the fewest weights, then the shortest "
        "step.",
        "No cliff: one step of one knob must not break a training, nor make the error more than "
        f"{rules.cliff:g} times as large, leave less than {rules.kept_share:g} of the coverage, or make the "
        f"model worthless, with every one of {session.NEIGHBOUR_SEEDS} seeds worse than the config with any "
        f"of {session.CHOICE_SEEDS}. Thresholds move by a factor of "
        f"{neighbours.THRESHOLD_FACTOR:g}, other numbers by {neighbours.FACTOR:g} or by "
        f"{neighbours.SHARE_OF_RANGE:g} of their range; options of a choice count only where a training "
        f"breaks. At most {neighbours.MOST} neighbours of at most {session.CHALLENGERS} configs are tried, "
        "on the run's scenario. A challenger that fails in a guarded figure on the seeds of the choice is "
        "passed over.",
        "tau_infer is the largest threshold that rejects no larger share of rows with a value than the "
        f"config did where it was chosen, on {100 * threshold.HELD_BACK:g} % of the training rows, held back "
        f"from {session.CALIBRATION_SEEDS} trainings; it is at most tau_train_min.",
        "Changed only when, on seeds that chose nothing, the chance to be better in a (scenario, seed) "
        f"block has a lower {percent} bound above 0.5 (up to "
        f"{len(rules.looks)} looks at {', '.join(str(look) for look in rules.looks)} times the seeds share "
        f"its error), and no scenario fails: {guards}. A figure fails where its mean harm "
        f"(of step times the median) is beyond the margin and the {percent} interval of the harm above 0.",
        f"Reported are test figures of further seeds, which decided nothing: the median with its {percent} "
        "interval (of the sign test, which holds for figures of any distribution), and the mean.",
    ]


def figures(found: Found) -> dict[str, Any]:
    """Test figures on the seeds of the report, by scenario: of the default, and of the one it replaces."""
    measured, chosen = found.reported_in, found.chosen
    assert measured is not None
    assert chosen is not None
    names = dict.fromkeys([found.request.objective.name, *FIGURES])
    told: dict[str, Any] = {}
    scenarios, level = np.asarray(measured.scenarios), found.request.rules.level
    for scenario in found.scenarios:
        here = scenarios == scenario.name
        of_scenario: dict[str, Any] = {}
        if broken := _broken_in(measured, chosen.config_id, scenario.name):
            of_scenario["broken"] = broken
        for name in names:
            values = measured.figures(test_name(name))[:, here]
            if not np.isfinite(values).any():
                continue
            entry = {"default": _figure(values[0], level)}
            if len(values) > 1:
                entry["current"] = _figure(values[1], level)
                entry["difference"] = _figure(values[0] - values[1], level)
            of_scenario[name] = entry
        of_scenario["trivial_error"] = _plain(float(measured.figures("test_trivial_error")[0, here].mean()))
        told[scenario.name] = of_scenario
    return told


def _figure(values: Floats, level: float) -> dict[str, Any]:
    """A figure over seeds as plain values."""
    found = figure(values, level=level)
    told: dict[str, Any] = {name: _plain(getattr(found, name)) for name in ("median", "low", "high", "mean")}
    told["n"] = found.n
    return {**told, "not_finite": found.not_finite} if found.not_finite else told


def _broken_in(measured: Measured, config: str, scenario: str) -> str:
    blocks = tuple(block for block in measured.blocks if block[0] == scenario)
    return replace(measured, blocks=blocks).trouble(config, ())


def test_name(name: str) -> str:
    """The column of the test split for one of the validation split.

    >>> test_name("charged_error"), test_name("metric.macro_f1")
    ('test_charged_error', 'test_metric.macro_f1')
    """
    return f"test_{name}"


def would_change(found: Found) -> list[str]:
    """What evidence would have led to another decision, as far as the figures say it."""
    told: list[str] = []
    confirmation, rules = found.confirmation, found.request.rules
    per_seed = len(found.scenarios)
    if confirmation is not None and confirmation.chance is not None:
        chance = confirmation.chance
        if confirmation.change:
            lost = losses_to_flip(chance, rules.look_level)
            told.append(
                f"had {lost} more of the {chance.n} blocks gone to the current default, it would have stayed"
            )
        elif not chance.low > 0.5:
            needed = seeds_for_chance(chance.mean, per_seed, level=rules.look_level)
            told.append(
                f"at a chance of {chance.mean:.2f}, about {needed} seeds would show it "
                f"(--seeds {math.ceil(needed / rules.looks[-1])} looks at as many)"
                if needed is not None and chance.mean > 0.5
                else f"a chance above 0.5: it is {chance.mean:.2f}, and more seeds alone do not raise it"
            )
        for result in confirmation.judged:
            if result.failed:
                told.append(
                    f"a wider margin for {result.guard.name}, if its loss in {result.scenario} is acceptable "
                    f"(--guard {result.guard.name}=...)"
                )
    elif confirmation is not None:
        told.append("the broken constraint: mend what the training says, and sweep again")
    for around in found.around:
        if around.cliffs:
            text = "; ".join(_cliff_text(cliff) for cliff in around.cliffs[:3])
            more = len(around.cliffs) - 3
            text += f"; and {more} more under neighbours" if more > 0 else ""
            own = around.candidate is found.candidates.current
            told.append(
                f"the current default stands on a cliff itself, and a wider search may find better ({text})"
                if own
                else f"{around.candidate.config_id} without its cliff ({text})"
            )
    for name, failed in found.passed_over.items():
        told.append(f"a wider margin for {name}, if it is acceptable (--guard): {failed}")
    if confirmation is None and not found.choice.challengers and found.choice.leader is not None:
        told.append(
            f"a config that is more than {rules.tie_margin:g} better than the current default in "
            f"{found.request.objective.name} (a share of the error, or a difference of shares): none of the "
            f"{len(found.candidates.held) - 1} best of the run was; a wider search, or --top"
        )
    told.append("other data, scenarios, margins or versions: the decision holds for those below")
    return told


def summary_lines(found: Found) -> list[str]:
    """The decision for a terminal."""
    assert found.chosen is not None
    record = figures(found)
    word = "changed to" if found.changed else "kept:"
    lines = [f"default {word} {found.chosen.config_id} ({found.chosen.origin})", f"  {why(found)}"]
    changes = _changes(found.candidates.current, found.chosen)
    if changes:
        shown = [f"{knob} {_value(old)} -> {_value(new)}" for knob, (old, new) in changes.items()]
        lines.append(f"  {'; '.join(shown[:8])}" + (f"; and {len(shown) - 8} more" if len(shown) > 8 else ""))
    level = f"{100 * found.request.rules.level:g} % interval"
    lines.append(
        f"test figures, medians over {len(found.seeds.report)} seeds that decided nothing ({level}):"
    )
    for scenario, told in record.items():
        for name in dict.fromkeys([found.request.objective.name, "coverage"]):
            if name not in told:
                continue
            entry = told[name]
            text = f"  {scenario}  {name}  {_told(entry['default'])}"
            lines.append(text + (f", was {_told(entry['current'])}" if "current" in entry else ""))
    lines += [f"  {line}" for line in _warnings(record)]
    held = found.threshold
    if held is not None and held.record is None:
        lines.append(f"tau_infer is the config's own, not calibrated: {held.why_not}")
    elif held is not None and held.record is not None and found.changed:
        lines.append(f"tau_infer frozen at {held.record.tau_infer:.4g} on held-back rows")
    lines += [f"note: {note}" for note in (*found.candidates.notes, found.held_out)]
    return lines


def _warnings(told: Mapping[str, Any]) -> list[str]:
    """What a reader of the figures must not overlook."""
    lines = []
    for scenario, entry in told.items():
        if "broken" in entry:
            lines.append(f"{scenario}  broken: {entry['broken']}")
        charged = entry.get("charged_error", {}).get("default", {}).get("median")
        if charged is not None and entry["trivial_error"] is not None and charged >= entry["trivial_error"]:
            trivial = f"{entry['trivial_error']:.4g}"
            lines.append(
                f"{scenario}  no better than abstaining everywhere, which has a charged_error of {trivial}"
            )
    return lines


def _cliff_text(cliff: Tried) -> str:
    one = cliff.neighbour
    return f"{one.knob} {_value(one.before)} -> {_value(one.after)}: {cliff.why}"


def _current(found: Found) -> dict[str, Any]:
    current = found.candidates.current
    return {
        "config_id": current.config_id,
        "origin": current.origin,
        **({"broken": found.troubles[current.config_id]} if found.troubles[current.config_id] else {}),
    }


def _changes(current: Candidate, chosen: Candidate) -> dict[str, Any]:
    """Knobs that act in either config and differ, with the old and the new value."""
    acting = {**active_knobs(current.config), **active_knobs(chosen.config)}
    return {
        knob: [current.config[knob], chosen.config[knob]]
        for knob in acting
        if not same_value(current.config[knob], chosen.config[knob])
    }


def _scenarios(found: Found) -> dict[str, Any]:
    told: dict[str, Any] = {"held_out": found.held_out}
    for scenario in found.scenarios:
        digests = {seed: load_task(scenario.spec, seed).data_digest for seed in found.seeds.report[:2]}
        shared = len(set(digests.values())) == 1
        told[scenario.name] = {
            "what": scenario.what,
            "task": {"name": scenario.spec["name"], **scenario.spec["params"]},
            "data_digest": next(iter(digests.values()))
            if shared
            else {str(k): v for k, v in digests.items()},
        }
    return told


def _seeds(found: Found) -> dict[str, Any]:
    seeds = found.seeds
    names = ("run", "choice", "neighbours", "calibration", "confirmation", "report")
    return {name: list(getattr(seeds, name)) for name in names}


def _confirmation(found: Found) -> dict[str, Any] | None:
    confirmation = found.confirmation
    if confirmation is None:
        return None
    assert found.candidate is not None
    told: dict[str, Any] = {"candidate": found.candidate.config_id, "takes_over": confirmation.change}
    if confirmation.chance is not None and confirmation.apart is not None:
        told["seeds"] = confirmation.chance.n // len(found.scenarios)
        told["chance_to_be_better"] = _interval(confirmation.chance)
        told["difference"] = _interval(confirmation.apart)
        told["difference_is"] = _unit(found)
    told["guards"] = [
        {
            "figure": result.guard.name,
            "scenario": result.scenario,
            **_harm(result.guard, result.harm),
            "failed": result.failed,
        }
        for result in confirmation.judged
    ]
    return told


def _unit(found: Found) -> str:
    if compare_of(found.request.objective) == LOG_RATIO:
        return f"logarithm of the ratio in {found.request.objective.name}; below 0 is better"
    return f"difference in {found.request.objective.name}, signed so that below 0 is better"


def _harm(guard: Guard, harm: Interval) -> dict[str, Any]:
    if guard.compare == LOG_RATIO:
        return {"at_most": guard.margin, "ratio": _interval(harm, math.exp)}
    return {"at_most": guard.margin, "worse_by": _interval(harm)}


def _step_times(found: Found) -> dict[str, Any]:
    times = found.confirm_times or found.choice_times
    told: dict[str, Any] = {
        "how": f"one thread, alone, {len(next(iter(times.values())))} rounds of all configs in a new order "
        "each, medians",
    }
    for name, values in times.items():
        told[name] = _plain(float(np.median(values)))
    return told


def _alternatives(found: Found) -> list[dict[str, Any]]:
    choice, told = found.choice, []
    for index, one in enumerate(found.candidates.held):
        apart = choice.apart[index]
        entry: dict[str, Any] = {"config_id": one.config_id, "origin": one.origin}
        if found.troubles[one.config_id]:
            entry["ruled_out"] = found.troubles[one.config_id]
        if one.config_id in found.passed_over:
            entry["passed_over"] = found.passed_over[one.config_id]
        if apart is not None:
            entry["worst_regret"] = _plain(float(np.max(choice.regret[index])))
            entry["mean_rank"] = _plain(float(choice.mean_rank[index]))
            entry["behind_leader"] = _interval(apart)
            entry["ties_with_leader"] = index in choice.tied
        entry["validation"] = _means(found, index)
        entry["step_time_ms"] = _plain(float(np.median(found.choice_times[one.config_id])))
        if index:
            entry["differs_from_current"] = {
                knob: new for knob, (_, new) in _changes(found.candidates.current, one).items()
            }
        told.append(entry)
    return told


def _means(found: Found, index: int) -> dict[str, Any]:
    measured = found.chosen_in
    scenarios = np.asarray(measured.scenarios)
    told = {}
    for scenario in found.scenarios:
        here = scenarios == scenario.name
        names = dict.fromkeys([found.request.objective.name, "coverage"])
        told[scenario.name] = {name: _mean(measured.figures(name)[index, here]) for name in names}
    return told


def _around(around: Around, found: Found) -> dict[str, Any]:
    return {
        "config_id": around.candidate.config_id,
        "tried": len(around.tried),
        "left_out": around.left_out,
        "cliffs": len(around.cliffs),
        "worse_by_is": _unit(found),
        "each": [
            {
                "knob": one.neighbour.knob,
                "kind": one.neighbour.kind,
                "from": one.neighbour.before,
                "to": one.neighbour.after,
                "worse_by": _plain(one.apart),
                **({"cliff": one.why} if one.why else {}),
            }
            for one in around.tried
        ],
    }


def _calibration(found: Found) -> dict[str, Any]:
    held = found.threshold
    assert held is not None
    told: dict[str, Any] = {
        "applied": found.changed and held.record is not None,
        "max_false_reject": _plain(held.max_false_reject),
        "split": f"{100 * threshold.HELD_BACK:g} % of the training rows, held back from each training",
        "seeds": list(held.seeds),
    }
    if held.record is None:
        return {**told, "why_not": held.why_not}
    told["tau_infer"] = held.record.tau_infer
    told["false_reject_rate"] = _plain(held.record.false_reject_rate)
    told["false_accept_rate"] = _plain(held.record.false_accept_rate)
    plain = json.loads(held.record.to_json())
    plain.pop("curve")  # forty points of each of several rates; the export has them
    return {**told, "record": plain}


def _interval(interval: Interval, of: Any = None) -> dict[str, Any]:
    def plain(value: float) -> Any:
        return _plain(value if of is None or not math.isfinite(value) else of(value))

    return {
        "mean": plain(interval.mean),
        "low": plain(interval.low),
        "high": plain(interval.high),
        "n": interval.n,
    }


def _mean(values: Floats) -> Any:
    return _plain(float(values.mean()))


def _plain(value: float | None) -> Any:
    """A number of six digits; None where there is no finite one."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")


def _told(figure: Mapping[str, Any]) -> str:
    broken = f" (not finite in {figure['not_finite']} of {figure['n']})" if "not_finite" in figure else ""
    if figure["median"] is None:
        return f"-{broken}"
    low, high = ("-" if figure[side] is None else f"{figure[side]:.4g}" for side in ("low", "high"))
    return f"{figure['median']:.4g} [{low}, {high}]{broken}"


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _guard_text(guard: Guard) -> str:
    margin = f"{guard.margin:g} times" if guard.compare == LOG_RATIO else f"{guard.margin:g} worse"
    return f"{guard.name} at most {margin}"


def _laid_out(value: Any) -> Any:
    """Plain values as ruamel lays them out: what is short and flat on one line."""
    if isinstance(value, Mapping):
        held = CommentedMap((str(key), _laid_out(item)) for key, item in value.items())
        if held and _is_short(value):
            held.fa.set_flow_style()
        return held
    if isinstance(value, list | tuple):
        items = CommentedSeq(_laid_out(item) for item in value)
        if _is_short(value):
            items.fa.set_flow_style()
        return items
    return value


def _is_short(value: Any) -> bool:
    items = list(value.values()) if isinstance(value, Mapping) else list(value)
    flat = not any(
        isinstance(item, Mapping) or (isinstance(item, list | tuple) and any(map(_nested, item)))
        for item in items
    )
    return flat and len(str(value)) <= _FLOW


def _nested(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)
