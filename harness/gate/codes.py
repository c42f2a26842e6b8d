"""The exit codes of `scm-harness gate`, one for each thing that a pipeline may want to do next."""

from __future__ import annotations

EXIT_PASS = 0
EXIT_REGRESSION = 1
EXIT_USAGE = 2  # the command line or the suite
EXIT_INCONCLUSIVE = 3  # the evidence does not decide at the last look
EXIT_BASELINE = 4  # missing, expired, or measured on other data, configs or machines
EXIT_INCOMPLETE = 5  # rows are missing or trials failed: there is no verdict

MEANINGS: dict[int, str] = {
    EXIT_PASS: "pass",
    EXIT_REGRESSION: "regression",
    EXIT_USAGE: "bad suite or command line",
    EXIT_INCONCLUSIVE: "inconclusive",
    EXIT_BASELINE: "baseline missing or not comparable",
    EXIT_INCOMPLETE: "incomplete: rows missing or trials failed",
}
