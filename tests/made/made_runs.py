"""A small run made up without training: rows, history, leaderboard, provenance and plan in a folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from reports.history import HistoryWriter
from reports.provenance import write_provenance
from reports.ranking import RankingOptions, rank, write_leaderboard
from reports.rows import RowWriter, read_rows
from reports.schema import history_schema, row_schema

KNOBS = {"learning_rate": "float64", "optimizer": "string", "momentum": "float64", "hidden_width": "int64"}
TRIVIAL_ERROR = 5.0


def made_rows(configs: int = 12, **changes: Any) -> list[dict[str, Any]]:
    """Two seeds of each config: the later ones are worse; three of them met NaN, failed, never answered.

    `place` is the config's number; it is no column of a run.
    """
    return [made_row(place, seed, configs, **changes) for place in range(configs) for seed in (0, 1)]


def made_row(place: int, seed: int, configs: int = 12, **changes: Any) -> dict[str, Any]:
    name = f"c{place:02d}"
    met, failed, silent = (place == configs - back for back in (3, 2, 1))
    sgd = place % 3 == 1
    error = math.nan if failed or silent else 1.0 + 0.6 * place + 0.1 * seed
    return {
        "run_id": "made",
        "task": "toy",
        "config_id": name,
        "trial_id": f"{name}-s{seed}",
        "seed": seed,
        "searcher": "sobol",
        "status": "failed" if failed else "completed",
        "error": "RuntimeError: out of luck" if failed else "",
        "nan_origin": "gradient of layer 2" if met else "",
        "epochs": 4,
        "nan_count": 7 if met else 0,
        "nan_loss": 1 if met else 0,
        "nan_gradient": 6 if met else 0,
        "nan_output": 0,
        "nan_parameter": 0,
        "step_time_ms": 2.0 + 0.01 * place,
        "loss": error,
        "target_coverage": 0.9,
        "coverage": 0.0 if failed or silent else 0.95 - 0.01 * (place % 30) - 0.01 * seed,
        "accepted_error": error,
        "charged_error": TRIVIAL_ERROR if silent else math.nan if failed else error + 0.2,
        "trivial_error": TRIVIAL_ERROR,
        "curve_coverage": [0.25, 0.5, 0.75, 1.0],
        "curve_error": [0.5 + place + seed + 0.25 * step for step in range(4)],
        "curve_area": 0.5 + place + 0.5 * seed,
        "data_digest": "d" * 64,
        "device_name": "x86_64",
        "config.learning_rate": 10.0 ** (-4 + 0.2 * place % 3),
        "config.optimizer": "sgd" if sgd else "adam",
        "config.momentum": 0.5 + 0.01 * place if sgd else None,
        "config.hidden_width": 16,
        "place": place,
        **changes,
    }


def made_history(configs: int = 12, epochs: int = 4) -> list[dict[str, Any]]:
    rows = []
    for place in range(configs):
        for seed in (0, 1):
            for epoch in range(1, epochs + 1):
                met = place == configs - 3
                rows.append(
                    {
                        "trial_id": f"c{place:02d}-s{seed}",
                        "config_id": f"c{place:02d}",
                        "seed": seed,
                        "epoch": epoch,
                        "loss": (1.0 + 0.1 * seed + place) / epoch,
                        "val_loss": (1.2 + 0.1 * seed + place) / epoch,
                        "coverage": min(1.0, 0.5 + 0.1 * epoch),
                        "nan_count": (3.0 * (epoch >= 2) + 4.0 * (epoch >= 4)) if met else 0.0,
                    }
                )
    return rows


def made_run(folder: Path, rows: list[dict[str, Any]] | None = None, **parts: Any) -> Path:
    """Write the run; `history`, `provenance` and `plan` replace what is made up, None leaves one out."""
    rows = made_rows() if rows is None else rows
    history = parts.get("history", made_history())
    knobs = {name.removeprefix("config.") for row in rows for name in row if name.startswith("config.")}
    types = {name: KNOBS.get(name, "float64") for name in sorted(knobs)}
    with RowWriter(folder / "rows", "driver", row_schema(types)) as writer:
        writer.append_all({name: row[name] for name in row if name != "place"} for row in rows)
    if history is not None:
        metrics = [name for name in history[0] if name not in ("trial_id", "config_id", "seed", "epoch")]
        with HistoryWriter(folder / "history", "driver", history_schema(metrics)) as writer:
            writer.append_all(history)
    write_leaderboard(folder, rank(read_rows(folder), RankingOptions()))
    provenance = parts.get("provenance", {"commit": "c" * 40, "python_version": "3.11"})
    if provenance is not None:
        json.dumps(provenance)
        write_provenance(folder, provenance)
    plan = parts.get("plan", "task:\n  name: toy\n")
    if plan is not None:
        (folder / "plan.yaml").write_text(plan, encoding="utf-8")
    return folder
