"""What an answer can be: a number, an infinity, or without value."""

from __future__ import annotations

from scm.core.tags import (
    ALGEBRAIC,
    Reduction,
    TagPolicy,
    TRTag,
    reduce_sum,
    reduce_tags,
    tags_of_tuples,
    tags_of_values,
    values_of_tags,
)

__all__ = [
    "ALGEBRAIC",
    "Reduction",
    "TRTag",
    "TagPolicy",
    "reduce_sum",
    "reduce_tags",
    "tags_of_tuples",
    "tags_of_values",
    "values_of_tags",
]
