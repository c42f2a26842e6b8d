"""Which configs of two runs are the same, and which of their trials are pairs: one config and one seed.

What the pairs say of each other is decided in `comparison`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reports.schema import CONFIG_PREFIX


@dataclass(frozen=True, slots=True)
class Matched:
    """The same configs of two runs, as pairs of ids, and by which column they are known.

    ambiguous: configs that are not paired, since others of their run have the same knobs.
    """

    by: str
    pairs: list[tuple[str, str]]
    ambiguous: int


def match_configs(a: pa.Table, b: pa.Table, *, by_id: bool) -> Matched:
    """The configs of both tables that are the same, as ids, in the order of A's ids."""
    firsts = [_first_rows(rows) for rows in (a, b)]
    ids = [rows.column("config_id").to_pylist() for rows in firsts]
    found = Matched("config_id", [], 0)
    if by_id:
        found = _joined("config_id", ids, ids)
    settings = [rows.column("settings_id") if "settings_id" in rows.column_names else None for rows in firsts]
    if not found.pairs and all(column is not None and not column.null_count for column in settings):
        found = _joined("settings_id", ids, [column.to_pylist() for column in settings if column is not None])
    if not found.pairs:
        knobs = [
            name
            for name in firsts[0].column_names
            if name.startswith(CONFIG_PREFIX) and name in b.column_names
        ]
        if knobs:
            keys = [
                list(zip(*(rows.column(name).to_pylist() for name in knobs), strict=True)) for rows in firsts
            ]
            found = _joined("knobs", ids, keys)
    return found


def _joined(by: str, ids: Sequence[Sequence[str]], keys: Sequence[Sequence[Hashable]]) -> Matched:
    held: list[dict[Hashable, list[str]]] = []
    for own_ids, own_keys in zip(ids, keys, strict=True):
        groups: dict[Hashable, list[str]] = {}
        for config, key in zip(own_ids, own_keys, strict=True):
            groups.setdefault(key, []).append(config)
        held.append(groups)
    pairs, ambiguous = [], 0
    for key, ones in held[0].items():
        others = held[1].get(key, [])
        if len(ones) == len(others) == 1:
            pairs.append((ones[0], others[0]))
        elif others:
            ambiguous += len(ones) + len(others)
    return Matched(by, sorted(pairs), ambiguous)


def _first_rows(rows: pa.Table) -> pa.Table:
    """One row of each config, ordered by config_id."""
    _, first = np.unique(
        rows.column("config_id").to_numpy(zero_copy_only=False).astype(str), return_index=True
    )
    return rows.take(pa.array(first))


@dataclass(frozen=True, slots=True)
class Pairs:
    """Rows of A and B that are one config and seed, with the place of the config among the common ones."""

    a: npt.NDArray[np.int64]
    b: npt.NDArray[np.int64]
    seed: npt.NDArray[np.int64]
    config: npt.NDArray[np.int64]

    def of(self, config: int) -> Pairs:
        """The pairs of one config."""
        kept = self.config == config
        return Pairs(self.a[kept], self.b[kept], self.seed[kept], self.config[kept])


def pair_trials(a: pa.Table, b: pa.Table, configs: Sequence[tuple[str, str]]) -> Pairs:
    """The trials of these configs that both runs have with one seed."""
    place_a = {one: place for place, (one, _) in enumerate(configs)}
    place_b = {other: place for place, (_, other) in enumerate(configs)}
    there = {
        (place_b[config], seed): row for row, (config, seed) in enumerate(_trials(b)) if config in place_b
    }
    found = [
        (row, there[place_a[config], seed], seed, place_a[config])
        for row, (config, seed) in enumerate(_trials(a))
        if config in place_a and (place_a[config], seed) in there
    ]
    columns = np.array(found, dtype=np.int64).reshape(-1, 4).T
    return Pairs(*columns)


def _trials(rows: pa.Table) -> list[tuple[str, int]]:
    return list(zip(rows.column("config_id").to_pylist(), rows.column("seed").to_pylist(), strict=True))


def count_trials(rows: pa.Table, configs: set[str]) -> int:
    """How many trials these configs have."""
    return sum(config in configs for config in rows.column("config_id").to_pylist())
