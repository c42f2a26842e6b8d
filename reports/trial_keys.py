"""What names trials and configs, as numbers: in what order they stand, what is there twice, what is the same.

Of millions of trials the texts would take most of the memory. Which rows are read is decided in `large_runs`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from reports.aggregate import (
    Ints,
)
from reports.fragments import RunReadError
from reports.rows import check_trial_ids

ID_DIGITS = 12


SEED_BITS = 16


Keys = npt.NDArray[np.uint64]


class UnusualIdsError(Exception):
    """A config_id or trial_id that is not as `search_spaces.identity` makes it."""


@dataclass(frozen=True, slots=True)
class GroupedTrials:
    """The trials ordered by config_id, seed and trial_id; where each config begins, and the seeds, in it."""

    order: Ints
    starts: Ints
    seeds: Ints


class HexIds:
    """Ids as `search_spaces.identity` makes them: twelve hexadecimal digits, and for a trial the seed behind.

    Such an id and a seed below 65536 are one whole number, whose order is that of the text; a trial that is
    there twice is a number that is there twice. Anything else is refused by UnusualIdsError.
    """

    def open(self, rows: int) -> None:
        self._keys: Keys = np.empty(rows, dtype=np.uint64)
        self._configs: Keys = np.empty(0, dtype=np.uint64)

    def put(self, here: slice, table: pa.Table) -> None:
        ids, seeds = one_array(table, "config_id"), one_array(table, "seed")
        if ids.null_count or seeds.null_count:
            raise UnusualIdsError
        numbers = seeds.to_numpy()
        if ((numbers < 0) | (numbers >= 1 << SEED_BITS)).any():
            raise UnusualIdsError
        if not _is_made_of(one_array(table, "trial_id"), ids, seeds):
            raise UnusualIdsError
        self._keys[here] = _parse_hex(ids) << np.uint64(SEED_BITS) | numbers.astype(np.uint64)

    def group(self, run: Path) -> GroupedTrials:
        order = np.argsort(self._keys)
        keys = self._keys[order]
        self._keys = keys[:0]
        same = keys[1:] == keys[:-1]
        if same.any():
            twice = np.unique(keys[1:][same])
            config, seed = int(twice[0]) >> SEED_BITS, int(twice[0]) & (1 << SEED_BITS) - 1
            name = f"{config:0{ID_DIGITS}x}-s{seed}"
            raise RunReadError(f"{run} holds {len(twice)} trial_id more than once, such as {name}")
        configs = keys >> np.uint64(SEED_BITS)
        starts = np.flatnonzero(np.append(True, configs[1:] != configs[:-1]))
        self._configs = configs[starts]
        keys &= np.uint64((1 << SEED_BITS) - 1)
        return GroupedTrials(order, starts, keys.view(np.int64))

    def name(self, config: int) -> str:
        return f"{int(self._configs[config]):0{ID_DIGITS}x}"

    def places(self, names: Sequence[str]) -> list[int]:
        try:
            numbers = _parse_hex(pa.array(names, pa.string()))
        except UnusualIdsError:  # of some other run, perhaps
            return [self._place(name) for name in names]
        at = np.minimum(np.searchsorted(self._configs, numbers), len(self._configs) - 1)
        return np.where(self._configs[at] == numbers, at, -1).tolist()

    def _place(self, name: str) -> int:
        try:
            _parse_hex(pa.array([name], pa.string()))
        except UnusualIdsError:
            return -1
        return self.places([name])[0]


class TextIds:
    """Ids of any form, held as text; dearer in time and memory than numbers are."""

    def open(self, rows: int) -> None:
        self._rows = rows
        self._seeds: Ints = np.empty(rows, dtype=np.int64)
        self._held: dict[int, pa.Table] = {}
        self._names: pa.Array = pa.array([], pa.string())

    def put(self, here: slice, table: pa.Table) -> None:
        self._seeds[here] = table.column("seed").to_numpy()
        self._held[here.start] = table.select(["config_id", "trial_id"])

    def group(self, run: Path) -> GroupedTrials:
        held = pa.concat_tables([self._held[start] for start in sorted(self._held)])
        self._held = {}
        check_trial_ids(held.column("trial_id"), run)
        encoded = held.column("config_id").combine_chunks().dictionary_encode()
        encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
        ranked = pc.array_sort_indices(encoded.dictionary)
        self._names = encoded.dictionary.take(ranked)
        place = np.empty(len(ranked), dtype=np.int64)
        place[ranked.to_numpy()] = np.arange(len(ranked))
        configs = place[encoded.indices.to_numpy()]
        order = np.lexsort((self._seeds, configs))
        again = (np.diff(configs[order]) == 0) & (np.diff(self._seeds[order]) == 0)
        if again.any():  # a seed that a config was trained with twice: the trial_id decides
            trials = pc.rank(held.column("trial_id").combine_chunks(), tiebreaker="dense").to_numpy()
            order = np.lexsort((trials, self._seeds, configs))
        configs = configs[order]
        starts = np.flatnonzero(np.append(True, configs[1:] != configs[:-1]))
        return GroupedTrials(order, starts, self._seeds[order])

    def name(self, config: int) -> str:
        return str(self._names[config].as_py())

    def places(self, names: Sequence[str]) -> list[int]:
        found = pc.index_in(pa.array(names, pa.string()), value_set=self._names)
        return [-1 if place is None else place for place in found.to_pylist()]


Ids = HexIds | TextIds


_DIGITS = np.full(256, 255, dtype=np.uint8)


_DIGITS[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)


def _parse_hex(ids: pa.Array) -> Keys:
    """The numbers that the ids write; UnusualIdsError unless each is twelve digits, letters small."""
    digits = _DIGITS[_characters(ids, ID_DIGITS)]
    if (digits == 255).any():
        raise UnusualIdsError
    whole = np.zeros((len(ids), 8), dtype=np.uint8)
    whole[:, 8 - ID_DIGITS // 2 :] = digits[:, 0::2] << 4 | digits[:, 1::2]
    return whole.view(">u8")[:, 0].astype(np.uint64)


def _is_made_of(trials: pa.Array, ids: pa.Array, seeds: pa.Array) -> bool:
    """Whether each trial_id is its config_id, "-s" and its seed."""
    try:
        text = _characters(trials, ID_DIGITS + 3)  # as most are, with a seed of one digit
    except UnusualIdsError:
        made = pc.binary_join_element_wise(ids, pc.cast(seeds, pa.string()), "-s")
        return bool(pc.all(pc.equal(made, trials), skip_nulls=False).as_py())
    end = text[:, ID_DIGITS:]
    return bool(
        (text[:, :ID_DIGITS] == _characters(ids, ID_DIGITS)).all()
        and (end[:, :2] == np.frombuffer(b"-s", np.uint8)).all()
        and (end[:, 2] == seeds.to_numpy() + ord("0")).all()
    )


def _characters(text: pa.Array, width: int) -> npt.NDArray[np.uint8]:
    """The bytes of texts that are all `width` long, one row each; UnusualIdsError if they are not."""
    if len(text) == 0:
        return np.zeros((0, width), dtype=np.uint8)
    bounds = np.frombuffer(text.buffers()[1], dtype=np.int32)[text.offset : text.offset + len(text) + 1]
    if text.null_count or not (np.diff(bounds) == width).all():
        raise UnusualIdsError
    held = np.frombuffer(text.buffers()[2], dtype=np.uint8)
    return held[bounds[0] : bounds[-1]].reshape(len(text), width)


def one_array(table: pa.Table, name: str) -> pa.Array:
    chunks = table.column(name).chunks
    return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)


def fingerprint(table: pa.Table, columns: Sequence[str]) -> Keys:
    """A number per row, the same for rows that hold the same in these columns, and hardly ever else."""
    total = np.zeros(len(table), dtype=np.uint64)
    for name in columns:
        column = one_array(table, name)
        if column.null_count == len(column):
            continue  # null adds nothing, nor does a column that a fragment lacks
        bits = _bits(column)
        # What differs in the highest bits alone, as 0.5 and 0.25 do, must not be lost in the product.
        bits ^= bits >> np.uint64(32)
        bits *= _name_bits(name)
        bits += _name_bits(name)  # so that 0 is not null
        if column.null_count:
            bits[column.is_null().to_numpy(zero_copy_only=False)] = 0
        total += bits
    return total


def _bits(column: pa.Array) -> Keys:
    """64 bits per value, in an array of its own, or once where all values are one; any for null."""
    if pa.types.is_dictionary(column.type):
        values = np.array([_text_bits(text) for text in column.dictionary.to_pylist()], dtype=np.uint64)
        if len(values) == 1 and not column.null_count:
            return values
        return values[column.indices.fill_null(0).to_numpy()]
    if pa.types.is_string(column.type):
        return _bits(column.dictionary_encode())
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int64())
    if column.type not in (pa.int64(), pa.float64()):
        return _bits(column.cast(pa.string()))
    # Taken as they lie, since a column with nulls has no view as an array of numbers.
    values = np.frombuffer(column.buffers()[1], dtype=np.uint64)[column.offset : column.offset + len(column)]
    if pa.types.is_integer(column.type):
        return values.copy()
    return (values.view(np.float64) + 0.0).view(np.uint64)  # -0.0 + 0.0 is 0.0


@functools.cache
def _name_bits(name: str) -> np.uint64:
    return np.uint64(_text_bits(name) | 1)


def _text_bits(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
