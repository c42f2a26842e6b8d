"""Which columns can decide a ranking: their direction, and their value in a trial that has none."""

from __future__ import annotations

from dataclasses import dataclass

from reports.schema import METRIC_PREFIXES, OPEN_PREFIXES, nearest_name

SHORTFALL = "coverage_shortfall"
ROBUSTNESS = "robustness"


@dataclass(frozen=True, slots=True)
class Metric:
    """One column that a config can be judged by; the better value is the lower or the higher one."""

    name: str
    direction: str
    unit: str = ""

    def __post_init__(self) -> None:
        if self.direction not in ("lower", "higher"):
            raise ValueError(f"direction must be lower or higher, got {self.direction=} for {self.name}")


# Test columns are missing on purpose: a config chosen by them could no longer be reported by them.
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(SHORTFALL, "lower", "share"),
        Metric("accepted_error", "lower", "task's unit"),
        Metric("charged_error", "lower", "task's unit"),
        Metric("step_time_ms", "lower", "ms"),
        Metric("curve_area", "lower", "task's unit"),
        Metric("coverage", "higher", "share"),
        Metric("false_accept_rate", "lower", "share"),
        Metric("false_reject_rate", "lower", "share"),
        Metric("loss", "lower"),
        Metric("val_loss", "lower"),
        Metric("duration_s", "lower", "s"),
        Metric("parameters", "lower", "weights"),
        Metric("epochs", "lower", "epochs"),
        Metric(ROBUSTNESS, "higher", "score"),
        Metric("metric.macro_f1", "higher", "share"),
        Metric("metric.direction_macro_f1", "higher", "share"),
        Metric("metric.accuracy", "higher", "share"),
        Metric("metric.finite_mae", "lower"),
        Metric("metric.mse", "lower"),
        Metric("metric.charged_mse", "lower"),
        Metric("metric.charged_extrapolation_mse", "lower"),
        Metric("metric.mae", "lower"),
        Metric("metric.rmse", "lower"),
    )
}


def parse_metric(text: str) -> Metric:
    """The metric of that name; a task's own, and telemetry, with a direction, as in "metric.hits:higher".

    Raises ValueError for a name without a known direction (naming the nearest known one), and for a test
    metric.

    >>> parse_metric("metric.hits:higher").direction
    'higher'
    """
    name, colon, direction = text.partition(":")
    if name.startswith("test_"):
        raise ValueError(
            f"configs are chosen on the validation split, not on the test split, got metric {name}"
        )
    if colon:
        if direction not in ("lower", "higher"):
            raise ValueError(f"the direction of metric {name} must be lower or higher, got {direction!r}")
        if name in METRICS and METRICS[name].direction != direction:
            raise ValueError(f"metric {name} is better {METRICS[name].direction}, got {text!r}")
        if name not in METRICS and not name.startswith(OPEN_PREFIXES):
            raise ValueError(_unknown(name))
        return Metric(name, direction)
    if name in METRICS:
        return METRICS[name]
    if name.startswith(OPEN_PREFIXES):
        raise ValueError(f"metric {name} needs its direction: {name}:lower or {name}:higher")
    raise ValueError(_unknown(name))


def _unknown(name: str) -> str:
    known = ", ".join(metric for metric in METRICS if not metric.startswith(METRIC_PREFIXES))
    hint = nearest_name(name, METRICS) or f"; known: {known}, and a task's own, as in metric.{name}:lower"
    return f"unknown metric {name}{hint}"
