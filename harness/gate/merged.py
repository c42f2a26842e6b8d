"""The decisions of one gate put together: one JSON document and one JUnit file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from reports.gate_outputs import gate_json, render_junit

JSON_VERSION = 1
ORDER = ("FAIL", "INCONCLUSIVE", "PASS")


def merged_json(views: Sequence[Mapping[str, Any]], *, exit_code: int) -> str:
    """One JSON document: the verdict over all baselines, the exit code, and each decision in full."""
    verdicts = [str(view["verdict"]) for view in views]
    values = {
        "schema_version": JSON_VERSION,
        "verdict": next((verdict for verdict in ORDER if verdict in verdicts), None),
        "exit_code": exit_code,
        "decisions": [json.loads(gate_json(dict(view))) for view in views],
    }
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def merged_junit(views: Sequence[Mapping[str, Any]]) -> str:
    """One JUnit file with the test suites of every decision; their figures in the root are sums."""
    root = ElementTree.Element("testsuites")
    totals = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for view in views:
        read = ElementTree.fromstring(render_junit(dict(view)))
        for suite in [read] if read.tag == "testsuite" else list(read):
            root.append(suite)
            for name in totals:
                totals[name] += int(suite.get(name, "0"))
    for name, count in totals.items():
        root.set(name, str(count))
    return "<?xml version='1.0' encoding='utf-8'?>\n" + ElementTree.tostring(root, encoding="unicode") + "\n"
