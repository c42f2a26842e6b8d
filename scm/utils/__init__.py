"""Helpers that know nothing of models."""

from scm.utils.logging import JsonlLogger, TensorBoardLogger, jsonl_to_dataframe, read_jsonl

__all__ = ["JsonlLogger", "TensorBoardLogger", "jsonl_to_dataframe", "read_jsonl"]
