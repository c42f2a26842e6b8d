"""Rows of a large run, made up: the columns of a real sweep, outcomes that scatter as those of real ones do.

Every knob of the table has its column; those that a usual plan draws differ between configs, the others
hold one value or null. Of the trials some fail, some diverge, and some answer nothing. A config's last seed
lies in another file than its others, as in a run that was interrupted and went on.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from reports.fragments import write_table_atomically
from reports.schema import CONFIG_PREFIX, row_schema

SEEDS = 5
COHORT = 64  # configs that a search proposes together; their trials end side by side
DRAWN_SHARE = 0.45  # of the knobs; as many vary in examples/gbsg2.yaml
SHARES = {"failed": 0.002, "diverged": 0.01, "stopped": 0.3}
STARTED = datetime(2026, 1, 1, tzinfo=UTC)
EXTRA = ("metric.mse", "metric.mae", "test_metric.mse", "test_metric.mae", "telemetry.control_weight")

Values = npt.NDArray[Any]


def write_rows(
    folder: Path, configs: int, *, configs_per_file: int, knobs: Mapping[str, str], seed: int = 0
) -> int:
    """Writes RUN/rows of that many configs, five seeds each, and returns how many rows there are."""
    (folder / "rows").mkdir(parents=True)
    starts = range(0, configs, configs_per_file)
    blocks = [(number, min(configs_per_file, configs - start)) for number, start in enumerate(starts)]

    def write(number: int) -> None:
        own = _block(*blocks[number], seed, knobs)
        late = own if len(blocks) == 1 else _block(*blocks[number - 1], seed, knobs)
        table = pa.concat_tables(
            [_rows(own, range(SEEDS - 1), knobs), _rows(late, range(SEEDS - 1, SEEDS), knobs)]
        )
        write_table_atomically(table, folder / "rows" / f"driver-{number:05d}.parquet")

    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(write, range(len(blocks))):
            pass
    return configs * SEEDS


class _Block:
    """Some configs, and the generator that their outcomes are drawn from."""

    def __init__(
        self, number: int, ids: pa.Array, knobs: pa.Table, quality: Values, width: Values, seed: int
    ) -> None:
        self.number, self.ids, self.knobs, self.quality, self.width, self.seed = (
            number,
            ids,
            knobs,
            quality,
            width,
            seed,
        )


def _block(number: int, configs: int, seed: int, knobs: Mapping[str, str]) -> _Block:
    draw = np.random.default_rng([seed, number])
    digits = draw.integers(0, 16, (configs, 12), dtype=np.uint8)
    text = np.frombuffer(b"0123456789abcdef", np.uint8)[digits]
    ids = pa.Array.from_buffers(
        pa.string(),
        configs,
        [None, pa.py_buffer(np.arange(0, 12 * configs + 1, 12, dtype=np.int32)), pa.py_buffer(text)],
    )
    which = np.random.default_rng(seed)  # the same knobs are drawn in all blocks
    columns = {}
    for name, kind in knobs.items():
        drawn, sometimes = which.random() < DRAWN_SHARE, which.random() < 0.4
        columns[CONFIG_PREFIX + name] = _knob(draw, kind, configs, drawn, sometimes)
    quality = draw.normal(size=configs)
    return _Block(number, ids, pa.table(columns), quality, draw.integers(8, 129, configs), seed)


def _knob(draw: np.random.Generator, kind: str, configs: int, drawn: bool, sometimes: bool) -> pa.Array:
    null = np.ones(configs, dtype=bool) if not drawn and sometimes else np.zeros(configs, dtype=bool)
    if drawn and sometimes:
        null = draw.random(configs) < 0.5
    if kind == "float64":
        # Eight significant digits, as the search spaces round them.
        values: Values = 10 ** draw.uniform(-5, 0, configs) if drawn else np.full(configs, 0.1)
        values = np.round(values * 1e10) / 1e10
    elif kind == "int64":
        values = draw.integers(1, 65, configs) if drawn else np.full(configs, 3)
    elif kind == "bool":
        values = draw.random(configs) < 0.5 if drawn else np.zeros(configs, dtype=bool)
    else:
        choices = pa.array(["cosine", "linear", "constant"])
        return choices.take(
            pa.array(draw.integers(0, 3, configs) if drawn else np.zeros(configs, np.int64), mask=null)
        )
    return pa.array(values, mask=null)


def _rows(block: _Block, seeds: range, knobs: Mapping[str, str]) -> pa.Table:
    configs = len(block.ids)
    draw = np.random.default_rng([block.seed, block.number, seeds.start, 1])
    # Cohort by cohort, in each seed by seed: what ends side by side.
    index = np.arange(configs * len(seeds))
    cohort, within = index // (COHORT * len(seeds)), index % (COHORT * len(seeds))
    size = np.minimum(COHORT, configs - cohort * COHORT)
    owner, which = cohort * COHORT + within % size, within // size
    number = len(owner)
    seed_of = which + seeds.start
    ids = block.ids.take(pa.array(owner))
    status = np.full(number, "completed", dtype=object)
    chance = draw.random(number)
    bound = 0.0
    for name, share in SHARES.items():
        status[(chance >= bound) & (chance < bound + share)] = name
        bound += share
    bad = (status == "failed") | (status == "diverged")
    quality = block.quality[owner]
    coverage = np.clip(0.93 + 0.05 * quality + draw.normal(0, 0.02, number), 0.0, 1.0)
    coverage[draw.random(number) < 0.002] = 0.0
    coverage = np.round(coverage * 686) / 686  # of 686 samples
    error = np.exp(-0.3 * quality + draw.normal(0, 0.3, configs)[owner] + draw.normal(0, 0.1, number))
    trivial = 1.5 + 0.05 * seed_of
    charged = coverage * error + (1 - coverage) * trivial
    nothing = np.where(bad | (coverage == 0.0), np.nan, 1.0)
    step = 0.4 * (1 + block.width[owner] / 32) * np.exp(draw.normal(0, 0.03, number))
    nan_count = np.where(status == "diverged", 1 + draw.integers(0, 9, number), 0)

    floats = {
        "step_time_ms": np.where(bad, np.nan, step),
        "duration_s": step * 3,
        "loss": error * 0.8 * nothing,
        "val_loss": error * 0.9 * nothing,
        "target_coverage": np.full(number, 0.9),
        "coverage": np.where(bad, np.nan, coverage),
        "accepted_error": error * nothing,
        "charged_error": np.where(bad, np.nan, charged),
        "false_accept_rate": np.round(draw.random(number) * 97) / 97,
        "false_reject_rate": np.round(draw.random(number) * 589) / 589,
        "trivial_error": trivial,
        "telemetry.control_weight": draw.random(number),
    }
    floats |= {name: error * (1 + draw.normal(0, 0.01, number)) for name in EXTRA[:4]}
    floats |= {
        f"test_{name}": floats[name] * (1 + draw.normal(0, 0.02, number))
        for name in ("coverage", "accepted_error", "charged_error", "false_accept_rate", "false_reject_rate")
    }
    floats["test_trivial_error"] = trivial
    columns: dict[str, Any] = {name: pa.array(values) for name, values in floats.items()}
    columns |= {
        "config_id": ids,
        "trial_id": pc.binary_join_element_wise(ids, pc.cast(pa.array(seed_of), pa.string()), "-s"),
        "seed": pa.array(seed_of),
        "cohort": pa.array(cohort),
        "status": pa.array(status, pa.string()),
        "stop_reason": pa.array(
            np.where(status == "stopped", "halving at epoch 9", "").astype(object), pa.string()
        ),
        "error": pa.array(np.where(status == "failed", "TaskError: no data", "").astype(object), pa.string()),
        "epochs": pa.array(np.where(status == "stopped", 9, 20)),
        "parameters": pa.array(block.width[owner] * 69),
        "nan_count": pa.array(nan_count),
        "nan_loss": pa.array(nan_count),
        **{
            name: pa.array(np.zeros(number, np.int64))
            for name in ("nan_gradient", "nan_output", "nan_parameter")
        },
    }
    started = np.datetime64(STARTED.replace(tzinfo=None), "us") + np.cumsum(
        draw.integers(1, 2_000_000, number)
    )
    columns["started_at"] = pa.array(started).cast(pa.timestamp("us", tz="UTC"))
    columns |= dict(zip(block.knobs.column_names, block.knobs.take(pa.array(owner)).columns, strict=True))
    same = {"run_id": "5204e58d142c", "task": "table", "searcher": "tpe", "nan_origin": "", "pack_note": ""}
    same |= {
        "commit": "0" * 40,
        "hostname": "node",
        "device": "cpu",
        "data_digest": "d" * 64,
        "plan_digest": "p" * 16,
    }
    schema = row_schema(knobs, EXTRA)
    arrays = []
    for field in schema:
        if field.name in columns:
            column = columns[field.name]
        elif field.name in same:
            column = pa.repeat(same[field.name], number)
        else:
            column = pa.nulls(number, field.type)
        arrays.append(column)
    return pa.table(arrays, schema=schema)
