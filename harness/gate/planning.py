"""How many seeds a suite needs, from the spread that rows of a pilot show.

Two spreads are told. As paired: of the differences between both arms of the pilot, which is what a gate sees
between codes that train almost alike. As unrelated: √2 times the spread over the seeds of one arm, which is
what it sees when a change makes every training another one; one arm is enough for it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from harness.errors import UserError
from harness.gate.arm_rows import ArmRows
from harness.gate.codes import EXIT_INCOMPLETE
from harness.gate.comparison import launch_time, measured, pair_values
from harness.gate.power import seeds_needed
from harness.gate.rules import MetricRule
from harness.gate.suite import STEP_TIME, Suite
from reports.gate_outputs import plain

FEWEST = 3  # values that a spread is told from


@dataclass(frozen=True, slots=True)
class Need:
    """What one scenario and metric needs: spreads over the margin (None: too few values), and seeds."""

    scenario: str
    metric: str
    values: int
    paired: float | None
    unrelated: float | None
    seeds_paired: int | None
    seeds_unrelated: int | None


def plan_needs(suite: Suite, base: ArmRows | None, candidate: ArmRows, *, power: float) -> list[Need]:
    """The needs of every scenario and metric, at which all of them pass together with this chance."""
    cells = len(suite.scenarios) * len(suite.rules.metrics)
    needs = []
    for scenario in suite.scenarios:
        for rule in suite.rules.metrics:
            alone = alone_values(candidate, rule.metric, scenario.name, suite.seeds)
            unrelated = spread([on_scale(rule, value) for value in alone], math.sqrt(2) / rule.margin)
            paired = None
            if base is not None:
                pairs = pair_values(base, candidate, rule, scenario.name, suite.seeds)
                harms = [
                    on_scale(rule, here) - on_scale(rule, there)
                    for there, here in zip(pairs.base, pairs.candidate, strict=True)
                ]
                paired = spread(harms, 1 / rule.margin)
            needs.append(
                Need(
                    scenario.name,
                    rule.metric,
                    len(alone),
                    paired,
                    unrelated,
                    needed(suite, paired, power, cells),
                    needed(suite, unrelated, power, cells),
                )
            )
    return needs


def needed(suite: Suite, share: float | None, power: float, cells: int) -> int | None:
    """The seeds for a spread over the margin; None where it is not known, or more than anybody has."""
    if share is None:
        return None
    try:
        return seeds_needed(share, power, cells, alpha_pass=suite.rules.alpha_pass_of_a_look)
    except ValueError:
        return None


def alone_values(arm: ArmRows, metric: str, scenario: str, seeds: Sequence[int]) -> list[float]:
    """The values of a metric in one arm, by seed."""
    keys = [(scenario, seed) for seed in seeds]
    if metric == STEP_TIME:
        found = [launch_time(arm, key) for key in keys]
    else:
        found = [measured(arm.rows.get(key), metric) for key in keys]
    return [value for value in found if value is not None]


def on_scale(rule: MetricRule, value: float) -> float:
    """A value on the scale on which differences are taken; NaN for one that has no logarithm."""
    if rule.compare == "difference":
        return value
    return math.log(value) if value > 0 else math.nan


def spread(values: Sequence[float], scale: float) -> float | None:
    """The standard deviation times a scale, None where there are too few values."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.stdev(finite) * scale if len(finite) >= FEWEST else None


def plan_text(suite: Suite, base: ArmRows | None, candidate: ArmRows, *, power: float) -> str:
    """The needs as a table, and what they say of the suite; a `UserError` where no row tells a spread."""
    needs = plan_needs(suite, base, candidate, power=power)
    if all(need.unrelated is None for need in needs):
        raise UserError(
            f"{candidate.source} has fewer than {FEWEST} rows of every scenario: run the gate first, "
            f"or `gate run --suite {suite.path} --record`",
            EXIT_INCOMPLETE,
        )
    head = ["scenario", "metric", "values", "sd/margin paired", "seeds", "sd/margin unrelated", "seeds"]
    lines = [
        [
            plain(need.scenario),
            need.metric,
            str(need.values),
            told(need.paired),
            told(need.seeds_paired),
            told(need.unrelated),
            told(need.seeds_unrelated),
        ]
        for need in needs
    ]
    widths = [max(len(row[column]) for row in [head, *lines]) for column in range(len(head))]
    table = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *lines]
    ]
    return "\n".join([*table, "", *advice(suite, needs, power)])


def told(value: float | int | None) -> str:
    """A figure of the table; "-" for none."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def advice(suite: Suite, needs: Sequence[Need], power: float) -> list[str]:
    """What the table says about the suite's last look."""
    last = suite.rules.looks[-1]
    lines = [
        f"seeds for a {power:.0%} chance that a harmless change passes every scenario and metric at once"
    ]
    for kind, what in (
        ("paired", "changes that train almost alike"),
        ("unrelated", "changes that train anew"),
    ):
        seeds = [getattr(need, f"seeds_{kind}") for need in needs]
        known = [count for count in seeds if count is not None]
        if not known:
            continue
        most = max(known)
        enough = f"the suite's last look has {last}: " + ("enough" if most <= last else "too few")
        lines.append(f"  {what}: {most} ({enough})")
    slow = [need for need in needs if need.seeds_unrelated is not None and need.seeds_unrelated > last]
    if slow:
        worst = max(slow, key=lambda need: need.unrelated or 0.0)
        rule = next(rule for rule in suite.rules.metrics if rule.metric == worst.metric)
        wide = rule.margin * (worst.unrelated or 0.0)
        lines.append(
            f"  most is asked by {worst.metric}: a margin of its spread, {wide:.3g} and not {rule.margin:g}, "
            f"needs {needed(suite, 1.0, power, len(needs))} seeds"
        )
    return lines
