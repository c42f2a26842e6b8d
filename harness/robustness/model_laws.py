"""The laws of a trained model and of its task, by name: what `scm-harness robustness` tries.

What each says is decided in `answer_laws` and `task_laws`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from harness.robustness.answer_laws import (
    check_asked_twice,
    check_batch_does_not_matter,
    check_bottoms_grow,
    check_finite_or_bottom,
    check_nan_is_bottom,
    check_other_precision,
    check_own_decode,
    in_precisions,
    inputs_to_try,
    nan_inputs,
    tuples_to_try,
    with_thresholds,
)
from harness.robustness.law import Case, Property, Subject
from harness.robustness.task_laws import (
    check_accepted_bottoms_are_seen,
    check_label_not_an_input,
    check_loss_finite,
    check_metrics_ignore_bottoms,
    check_metrics_total,
    check_splits_apart,
    check_splits_repeat,
    check_truth_scores_best,
    column_cases,
    decoded_cases,
    loss_cases,
    split_cases,
)

_GROUP = 31  # behind those of the library's laws


def _law(
    name: str,
    law: str,
    cases: Callable[[Subject], SearchStrategy[Case]],
    check: Callable[[Subject, Case], None],
    needs: tuple[str, ...] = (),
) -> Property:
    return Property(name=name, group=_GROUP, law=law, of="model", cases=cases, check=check, needs=needs)


MODEL_LAWS: Mapping[str, Property] = {
    item.name: item
    for item in (
        _law(
            "answers_are_finite_or_bottom",
            "Every answer is P/Q with |Q| >= tau_infer and finite, or bottom without a payload.",
            inputs_to_try,
            check_finite_or_bottom,
        ),
        _law(
            "nan_inputs_are_bottom",
            "A row with a NaN among its inputs is bottom.",
            nan_inputs,
            check_nan_is_bottom,
        ),
        _law(
            "batches_do_not_matter",
            "A row is answered alike alone, in any order and beside any others.",
            inputs_to_try,
            check_batch_does_not_matter,
        ),
        _law(
            "asked_twice_answers_the_same",
            "The same rows get the same answers.",
            inputs_to_try,
            check_asked_twice,
        ),
        _law(
            "bottoms_grow_with_tau",
            "A larger tau_infer refuses more and changes no other answer.",
            with_thresholds,
            check_bottoms_grow,
        ),
        _law(
            "other_precisions_stay_finite",
            "In half, bfloat16 and double precision, what is accepted is finite.",
            in_precisions,
            check_other_precision,
        ),
        _law(
            "own_decode_is_strict",
            "The task's decode accepts nothing below tau_infer and nothing that is not finite.",
            tuples_to_try,
            check_own_decode,
            needs=("own_decode",),
        ),
        _law(
            "loss_is_finite",
            "The training loss and its gradients are finite at every tuple, Q = 0 included.",
            loss_cases,
            check_loss_finite,
        ),
        _law(
            "metrics_are_total",
            "Whatever was answered or refused, the task scores it.",
            decoded_cases,
            check_metrics_total,
        ),
        _law(
            "metrics_ignore_bottoms",
            "P at a bottom changes no error.",
            decoded_cases,
            check_metrics_ignore_bottoms,
        ),
        _law(
            "refusing_all_is_seen",
            "Who answers nothing has rejected every finite row, and has no error.",
            decoded_cases,
            check_accepted_bottoms_are_seen,
        ),
        _law(
            "right_answers_score_best",
            "No answers are charged less than the labels themselves.",
            decoded_cases,
            check_truth_scores_best,
        ),
        _law(
            "splits_are_disjoint",
            "No row is in two splits, beyond what chance makes.",
            split_cases,
            check_splits_apart,
        ),
        _law("labels_are_no_inputs", "No input is the label.", column_cases, check_label_not_an_input),
        _law(
            "splits_repeat",
            "The same seed gives the same splits.",
            lambda subject: st.just({"seed": subject.trained.seed}),
            check_splits_repeat,
        ),
    )
}
