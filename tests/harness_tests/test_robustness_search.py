"""How a property is tried: a law that holds, one that breaks and is made small, one that says nothing."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.robustness.cases import decode_case, encode_case
from harness.robustness.law import BrokenLawError, Case, DoesNotApplyError, Property, Subject
from harness.robustness.search import broken_by, try_property


def law(
    check, *, needs: tuple[str, ...] = (), cases=lambda subject: st.fixed_dictionaries({"n": st.integers()})
):
    return Property(name="law", group=1, law="A law.", of="library", needs=needs, cases=cases, check=check)


def below_a_hundred(subject: Subject, case: Case) -> None:
    if case["n"] >= 100:
        raise BrokenLawError(f"n must be < 100, got {case['n']}")


def test_a_broken_law_is_shown_by_its_smallest_case() -> None:
    """Whatever was drawn first, the case that is kept is the smallest that breaks the law."""
    found = try_property(law(below_a_hundred), SimpleNamespace(), examples=500)
    assert (found.status, found.case, found.message) == ("broken", {"n": 100}, "n must be < 100, got 100")


def test_the_same_seed_tries_the_same_cases() -> None:
    """A verdict repeats itself, and another seed draws other cases."""
    drawn: list[list[int]] = []
    for seed in (3, 3, 4):
        seen: list[int] = []
        held = law(lambda subject, case, seen=seen: seen.append(case["n"]))
        assert try_property(held, None, examples=50, seed_of_cases=seed).status == "holds"
        drawn.append(seen)
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_is_imported_does_not_change_the_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers in the source of other modules are not drawn: a verdict repeats itself in any process."""
    number = 748_911_352
    held = law(lambda subject, case: seen.append(case["n"]))
    drawn: list[list[int]] = []
    for _ in range(2):
        seen: list[int] = []
        try_property(held, None, examples=200)
        drawn.append(seen)
        (tmp_path / "full_of_numbers.py").write_text(f"N = [{number}, {number + 1}]\n", encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        __import__("full_of_numbers")
    assert drawn[0] == drawn[1]
    assert not {number, number + 1} & set(drawn[1])


def test_what_a_subject_raises_breaks_the_law() -> None:
    """A law promises an answer; an exception is none, and is told with its type."""

    def divide(subject: Subject, case: Case) -> None:
        1 // case["n"]

    found = try_property(law(divide), None, examples=100)
    assert found.status == "broken"
    assert found.case == {"n": 0}
    assert found.message.startswith("raises ZeroDivisionError")


def nothing(subject: Subject) -> st.SearchStrategy[Case]:
    raise DoesNotApplyError("there is nothing to try")


def failing(subject: Subject) -> st.SearchStrategy[Case]:
    raise RuntimeError("no ranges")


@pytest.mark.parametrize(
    ("prop", "status", "message"),
    [
        (law(below_a_hundred, needs=("decode",)), "not_applicable", "the subject has no decode"),
        (law(below_a_hundred, cases=nothing), "not_applicable", "there is nothing to try"),
        (law(below_a_hundred, cases=failing), "error", "its cases cannot be made: RuntimeError: no ranges"),
        (
            law(
                below_a_hundred,
                cases=lambda subject: st.fixed_dictionaries({"n": st.integers().filter(lambda n: False)}),
            ),
            "not_applicable",
            "no case satisfies what the property asks of one",
        ),
    ],
    ids=["lacks", "says so", "raises", "nothing drawn"],
)
def test_a_law_that_cannot_be_tried_says_why(prop: Property, status: str, message: str) -> None:
    """Not to apply is a verdict with a reason, and no exception."""
    found = try_property(prop, SimpleNamespace(decode=None), examples=10)
    assert (found.status, found.message) == (status, message)


def test_a_case_is_tried_again_alone() -> None:
    """A stored case says again how it breaks the law, or that it does not."""
    assert broken_by(law(below_a_hundred), None, {"n": 100}) == "n must be < 100, got 100"
    assert broken_by(law(below_a_hundred), None, {"n": 99}) is None


tensors = st.sampled_from(
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool]
).flatmap(
    lambda dtype: st.lists(
        st.sampled_from([0.0, -0.0, 1.5, math.inf, -math.inf, math.nan, 5e-324, 6e4]), max_size=4
    ).map(
        lambda values: (
            torch.tensor(values, dtype=torch.float64).nan_to_num(0.0).clamp(-1, 1).to(dtype)
            if not dtype.is_floating_point
            else torch.tensor(values, dtype=torch.float64).to(dtype)
        )
    )
)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@given(st.dictionaries(st.text(), tensors | plain | st.lists(plain)))
def test_a_case_survives_as_text_bit_for_bit(case: dict[str, object]) -> None:
    """NaN, signed zeros, subnormal numbers, dtypes and shapes come back as they were."""
    back = decode_case(encode_case(case))
    assert encode_case(back) == encode_case(case)
    for name, value in case.items():
        if isinstance(value, torch.Tensor):
            assert (back[name].dtype, back[name].shape) == (value.dtype, value.shape)
            assert back[name].view(torch.uint8).equal(value.view(torch.uint8)) if value.numel() else True


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"a": 1}',
        '{"a": {"dtype": "complex64", "shape": [], "bytes": ""}}',
        '{"a": {"dtype": "float32", "shape": [3], "bytes": "AAAA"}}',
    ],
)
def test_text_that_is_no_case_is_refused(text: str) -> None:
    """What was damaged is said to be no case."""
    with pytest.raises(ValueError, match="a case must be text of encode_case"):
        decode_case(text)
