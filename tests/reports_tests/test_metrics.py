"""What configs can be judged by, and what is refused as a judge."""

from __future__ import annotations

import pytest

from reports.metrics import METRICS, Metric, parse_metric
from reports.schema import METRIC_PREFIXES, row_schema


@pytest.mark.parametrize("name", METRICS)
def test_every_known_metric_is_a_column_or_derived_from_one(name):
    """A name in the table can be found in a run's rows, or is measured after the run."""
    known = {*row_schema({}).names, "coverage_shortfall", "robustness"}
    assert name in known or name.startswith(METRIC_PREFIXES)
    assert parse_metric(name) is METRICS[name]


def test_a_tasks_own_metric_is_given_with_its_direction():
    """What only the task knows is read with the direction that the user states."""
    assert parse_metric("metric.hits:higher") == Metric("metric.hits", "higher")
    assert parse_metric("telemetry.budget_share:lower") == Metric("telemetry.budget_share", "lower")
    assert parse_metric("loss:lower") == Metric("loss", "lower")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acepted_error", "unknown metric acepted_error; did you mean accepted_error?"),
        ("seed", "unknown metric seed; known: coverage_shortfall, .*metric.seed:lower"),
        ("metric.hits", "metric metric.hits needs its direction: metric.hits:lower or metric.hits:higher"),
        ("telemetry.x", "metric telemetry.x needs its direction: telemetry.x:lower or telemetry.x:higher"),
        ("metric.hits:up", "direction of metric metric.hits must be lower or higher, got 'up'"),
        ("coverage:lower", "metric coverage is better higher"),
        ("hits:lower", "unknown metric hits"),
        ("test_accepted_error", "chosen on the validation split, not on the test split"),
        ("test_metric.hits:higher", "not on the test split"),
        ("", "unknown metric"),
    ],
)
def test_a_metric_that_cannot_judge_is_refused(text, message):
    """Typing errors, missing or false directions and test metrics each get their reason."""
    with pytest.raises(ValueError, match=message):
        parse_metric(text)


def test_a_metric_has_one_of_two_directions():
    """Anything but lower or higher is no direction."""
    with pytest.raises(ValueError, match="direction must be lower or higher"):
        Metric("x", "up")
