"""A pytest plugin: `pytest --scm-gate SUITE.yaml` adds one test for each scenario and metric of a suite.

Without the option it does nothing and imports nothing. The gate runs once, when the first of its tests is run
(and not when tests are only collected, or deselected), in the folder that `scm-harness gate run` would use:
processes of pytest-xdist wait for one another, and the later ones find every row there. The tests carry the
mark `scm_gate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from harness.gate.session import GateResult
    from harness.gate.suite import Suite

MARK = "scm_gate"
OTHER_TESTS = ("non-finite values", "whole")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the gate."""
    group = parser.getgroup("scm-harness", "training regressions (scm-harness gate)")
    add = group.addoption
    add("--scm-gate", metavar="SUITE", help="add the tests of this suite of scm-harness gate")
    add("--scm-gate-against", metavar="REF", help="compare with this commit instead of the stored baseline")
    add(
        "--scm-gate-any-baseline",
        action="store_true",
        help="compare with whatever baseline there is, at last with this code itself",
    )
    add("--scm-gate-out", metavar="DIR", help="where rows are kept (default: runs/gate/NAME of the suite)")
    add(
        "--scm-gate-on-inconclusive",
        choices=("fail", "warn", "pass"),
        default="fail",
        help="when the evidence does not decide: the test fails, is skipped with the reason, or passes",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known, so that `--strict-markers` accepts it."""
    config.addinivalue_line("markers", f"{MARK}: a test of a scm-harness gate's suite")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Add the suite's tests before others select among what there is."""
    path = config.getoption("--scm-gate")
    if path:
        items.extend(GateFile.from_parent(session, path=Path(path).absolute()).collect())


class GateFile(pytest.File):
    """The suite, as the place that its tests are in; it runs the gate once."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._result: GateResult | None = None
        self._trouble: Exception | None = None

    def collect(self) -> Iterator[pytest.Item]:
        """One test for each scenario and metric, one for its non-finite values, and one for the whole."""
        from harness.errors import UserError
        from harness.gate.suite import load_suite

        try:
            self.suite: Suite = load_suite(self.path)
        except UserError as error:
            raise pytest.UsageError("\n".join(error.lines)) from None
        for scenario in self.suite.scenarios:
            for metric in (*self.suite.metrics, OTHER_TESTS[0]):
                name = f"{shown(scenario.name)}[{metric}]"
                yield GateItem.from_parent(self, name=name, scenario=scenario.name, metric=metric)
        yield GateItem.from_parent(self, name=OTHER_TESTS[1], scenario="", metric=OTHER_TESTS[1])

    def result(self) -> GateResult:
        """What the gate came to; what kept it from coming to anything is raised for each test anew."""
        from harness.errors import UserError

        if self._trouble is not None:
            raise self._trouble
        if self._result is None:
            try:
                self._result = self._run()
            except UserError as error:
                self._trouble = error
                raise
        return self._result

    def _run(self) -> GateResult:
        from harness.gate.session import GateOptions, run_gate

        config = self.config
        out = config.getoption("--scm-gate-out")
        options = GateOptions(
            out=Path(out) if out else Path("runs") / "gate" / self.suite.name,
            against=config.getoption("--scm-gate-against"),
            any_baseline=config.getoption("--scm-gate-any-baseline"),
            wait=True,
        )
        return run_gate(self.suite, options, lambda text: print(shown(text)))


class GateFailedError(Exception):
    """A test of the gate that fails; the message is for the user, without a traceback."""


class GateItem(pytest.Item):
    """One scenario and metric of a suite, or the whole of it."""

    def __init__(self, *, scenario: str, metric: str, **given: Any) -> None:
        super().__init__(**given)
        self.scenario, self.metric = scenario, metric
        self.add_marker(MARK)

    def runtest(self) -> None:
        """Run the gate where it has not been, and say what it came to here."""
        assert isinstance(self.parent, GateFile)
        result = self.parent.result()
        failures, open_ones = judge(result, self.scenario, self.metric)
        if failures and result.accepted is None:
            raise GateFailedError("\n".join([*failures, *open_ones]))
        if not open_ones:
            return
        means = self.config.getoption("--scm-gate-on-inconclusive")
        if means == "fail":
            raise GateFailedError("\n".join(open_ones))
        if means == "warn":
            pytest.skip("; ".join(open_ones))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The message alone where the gate has spoken, the usual traceback where something broke."""
        from harness.errors import UserError

        if isinstance(excinfo.value, GateFailedError):
            return "\n".join(map(shown, str(excinfo.value).split("\n")))
        if isinstance(excinfo.value, UserError):
            return "\n".join(shown(f"error: {line}") for line in excinfo.value.lines)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where the test is: in the suite."""
        return self.path, None, f"gate: {self.name}"


def judge(result: GateResult, scenario: str, metric: str) -> tuple[list[str], list[str]]:
    """What speaks against a scenario and metric, and what leaves it open, a line for each."""
    failures: list[str] = []
    open_ones: list[str] = []
    for anchor in result.anchors:
        where = f"against {anchor.name} ({anchor.label})"
        decision = anchor.decision
        if metric == OTHER_TESTS[1]:
            failures += [f"{where}: {text}" for text in decision.missing]
            if decision.missing:
                failures += [f"{where}: {text}" for text in anchor.notes]
            continue
        cells = decision.nan_cells if metric == OTHER_TESTS[0] else decision.cells
        for cell in cells:
            if cell.scenario != scenario or getattr(cell, "metric", metric) != metric:
                continue
            if cell.verdict == "FAIL":
                failures.append(f"{where}: {cell.why}")
            elif cell.verdict == "INCONCLUSIVE":
                open_ones.append(f"{where}: not decided: {cell.why}")
    return failures, open_ones


def shown(text: str) -> str:
    """The text on one line, without what a terminal would act on."""
    from reports.gate_outputs import plain

    return plain(text)
