"""`scm-harness robustness` and `replay`: planted bugs found, made small, tried again, mended; bad input."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from harness.cli.main import main
from harness.errors import UserError
from harness.robustness import examined, stress
from reports.robustness_findings import read_counterexamples, read_verdicts
from trainables import loading
from trainables.trained import read_trained, write_trained

SOUND = """
import torch
from torch import nn

from scm.data import Split
from scm.training.targets import lift_semantic_targets
from trainables.metrics import standard_metrics


class Model(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))

    def forward(self, inputs):
        p, q = nn.functional.normalize(self.net(inputs), dim=-1).unbind(-1)
        return p, q


class Planted:
    name = "planted"
    error_unit = "steps"

    def __init__(self, params):
        pass

    def splits(self, seed):
        held = {}
        for place, (name, rows) in enumerate({"train": 64, "val": 32, "test": 32}.items()):
            draws = torch.Generator().manual_seed(10 * seed + place)
            inputs = torch.rand(rows, 2, generator=draws)
            pole = inputs[:, 0] < 0.1
            value = torch.where(pole, torch.nan, inputs[:, 1] ** 2 / inputs[:, 0].clamp_min(0.1))
            status = torch.where(pole, 1, 0)
            extras = {"value": value, "status": status}
            held[name] = Split(inputs, lift_semantic_targets(value, status), extras)
        return held

    def build_model(self, config):
        return Model(config.hidden_width)

    def make_loss(self, config):
        return None

    def metrics(self, decoded, split, config):
        return standard_metrics(
            decoded.decoded, ~decoded.bottom, split.extras["value"], split.extras["status"], baseline=1.0
        )
"""

RAISING = """
class Raising:
    name = error_unit = "raising"
    __init__ = lambda self, params: None
    splits = lambda self, seed: {}["no data"]
    build_model = make_loss = metrics = splits
"""

DECODES_ZERO = """
    def decode(self, P, Q, tau_infer):
        return P / Q, Q.abs() >= 0
"""

DECODES = """
    def decode(self, P, Q, tau_infer):
        accepted = (Q.abs() >= tau_infer) & (P / Q).isfinite() & Q.isfinite()
        return P / Q, accepted
"""

DIVIDES = """
    def make_loss(self, config):
        def loss(outputs, lifted, *, semantic_targets):
            P, Q = outputs
            return torch.where(semantic_targets.mask_finite, (P / Q - lifted[0]) ** 2, 0.0).mean()

        return loss
"""

LEAKS = """
    def splits(self, seed):
        held = _splits(self, seed)
        train, val = held["train"], held["val"]
        rows = slice(0, len(val))
        extras = {name: extra[rows] for name, extra in train.extras.items()}
        held["val"] = Split(train.inputs[rows], train.targets.index(rows), extras)
        return held
"""

BUGS: dict[str, tuple[str, str, str]] = {
    "own_decode_is_strict": (DECODES_ZERO, DECODES, "decode must refuse |Q| <"),
    "loss_is_finite": (DIVIDES, "", "must be finite"),
    "splits_are_disjoint": (
        f"\n_splits = Planted.splits\n\nclass Planted(Planted):{LEAKS}",
        "",
        "row 0 of train again",
    ),
}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a task's module beside a config's file, and lets the process load it anew; gives the config."""
    monkeypatch.chdir(tmp_path)

    def write(more: str = "", **config: Any) -> Path:
        sys.modules.pop("planted", None)
        loading._loaded.clear()
        (tmp_path / "planted.py").write_text(SOUND + more, encoding="utf-8")
        # A file changed within a second is not seen as changed by what was compiled of it.
        for compiled in tmp_path.glob("__pycache__/planted*"):
            compiled.unlink()
        knobs = {"max_epochs": 2, "hidden_width": 8, **config}
        path = tmp_path / "config.yaml"
        text = "\n".join(f"  {name}: {value}" for name, value in knobs.items())
        path.write_text(f"task: {{name: 'planted:Planted'}}\nconfig:\n{text}\nseeds: [0]\n", encoding="utf-8")
        return path

    yield write
    sys.modules.pop("planted", None)
    loading._loaded.clear()


def laws_alone(target: Path, *more: str) -> list[str]:
    return ["robustness", str(target), "--faults", "none", "--no-shift", "--out", "found", *more]


@pytest.mark.parametrize("law", sorted(BUGS))
def test_a_planted_bug_is_found_made_small_replayed_and_seen_to_be_mended(
    law: str, planted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The command names the law and at most two rows; its replay fails until the task is mended."""
    bug, mended, message = BUGS[law]
    assert main(laws_alone(planted(bug))) == 1
    said = capsys.readouterr().out
    assert f"BROKEN  {law}" in said
    cases = read_counterexamples(Path("found")).to_pylist()
    assert {case["property"] for case in cases} == {law}
    assert all(case["rows"] <= 2 for case in cases)
    assert message in cases[0]["message"]
    assert cases[0]["replay"] in said

    command = cases[0]["replay"].split()[1:]
    planted(bug)
    assert main(command) == 1
    assert f"still fails: {cases[0]['message']}" in capsys.readouterr().out
    planted(mended)
    assert main(command) == 0
    assert f"fixed: {cases[0]['id']}" in capsys.readouterr().out


def test_a_sound_task_keeps_every_law(
    planted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0, a verdict for each law and model, no counterexample, and the models for later."""
    assert main(laws_alone(planted())) == 0
    said = capsys.readouterr().out
    assert "0 broken" in said
    verdicts = read_verdicts(Path("found")).to_pylist()
    assert {row["status"] for row in verdicts} == {"holds", "not_applicable"}
    assert [row["property"] for row in verdicts if row["status"] == "not_applicable"] == [
        "own_decode_is_strict"
    ] * 2  # seeds
    assert len(read_counterexamples(Path("found"))) == 0
    for digest in {row["model_digest"] for row in verdicts}:
        assert read_trained(Path(f"found/models/{digest}.pt")).digest == digest


def test_the_same_command_finds_the_same(planted: Callable[..., Path]) -> None:
    """Cases are drawn from the seed: verdicts and counterexamples repeat themselves, times apart."""
    found = []
    for _ in range(2):
        main(laws_alone(planted(DIVIDES)))
        rows = [*read_verdicts(Path("found")).to_pylist(), *read_counterexamples(Path("found")).to_pylist()]
        found.append(
            [{k: v for k, v in row.items() if k not in ("duration_s", "created_at")} for row in rows]
        )
    assert found[0] == found[1]


def test_a_checkpoint_is_examined_without_training(planted: Callable[..., Path]) -> None:
    """The weights of the file are those that laws are tried on; its config is trained with further seeds."""
    main(laws_alone(planted()))
    (digest,) = {row["model_digest"] for row in read_verdicts(Path("found")).to_pylist() if row["seed"] == 0}
    write_trained(read_trained(Path(f"found/models/{digest}.pt")), "model.pt")
    assert main([*laws_alone(Path("model.pt"))[:-1], "again"]) == 0
    again = read_verdicts(Path("again")).to_pylist()
    assert {row["model_digest"] for row in again if row["seed"] == 0} == {digest}
    assert {row["seed"] for row in again} == {0, 1}


def test_a_config_that_cannot_be_trained_is_a_verdict_and_the_others_go_on(
    planted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A task that raises for one seed costs the models of that seed."""
    raising = """
_metrics = Planted.metrics

def metrics(self, decoded, split, config):
    if split.inputs[0, 0] == Planted(None).splits(1)["val"].inputs[0, 0]:
        raise RuntimeError("no such instrument")
    return _metrics(self, decoded, split, config)

Planted.metrics = metrics
"""
    assert main(laws_alone(planted(raising))) == 1
    verdicts = read_verdicts(Path("found")).to_pylist()
    (failed,) = [row for row in verdicts if row["status"] == "error"]
    assert (failed["property"], failed["seed"]) == ("training", 1)
    assert "no such instrument" in failed["message"]
    assert {row["seed"] for row in verdicts if row["status"] == "holds"} == {0}
    assert "no such instrument" in capsys.readouterr().out


def test_an_interrupt_keeps_the_verdicts_that_were_reached(
    planted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 130; the laws that were tried are on the disk, whole, with the model."""
    tried = stress.try_property

    def interrupted(law: Any, *rest: Any, **more: Any) -> Any:
        if law.name == "metrics_are_total":
            raise KeyboardInterrupt
        return tried(law, *rest, **more)

    monkeypatch.setattr(stress, "try_property", interrupted)
    assert main(laws_alone(planted(DIVIDES))) == 130
    assert "interrupted" in capsys.readouterr().err
    verdicts = read_verdicts(Path("found")).to_pylist()
    assert verdicts[-1]["property"] == "loss_is_finite"
    (case,) = read_counterexamples(Path("found")).to_pylist()
    assert main(case["replay"].split()[1:]) == 1


def test_no_feasible_config_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run all of whose trials failed leaves nothing to examine: exit code 5."""
    monkeypatch.setattr(examined, "read_rows", lambda folder: None)
    monkeypatch.setattr(examined, "rank", lambda rows, options: pa.table({"feasible": [False]}))
    (tmp_path / "plan.yaml").write_text("task: {name: dose}\nspace: [optimizer]\n", encoding="utf-8")
    with pytest.raises(UserError, match="no config of .* is feasible") as caught:
        examined.find_examined(tmp_path, top=3, seeds=2)
    assert caught.value.exit_code == 5


class Trap:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("trapped",)


def other_shape(path: Path) -> None:
    content = torch.load("model.pt", weights_only=True)
    from scm.training.checkpoint import write_checkpoint

    content["trained"]["config"]["hidden_width"] = 16
    write_checkpoint(path, content)


def under_way(path: Path) -> None:
    from scm.training.checkpoint import write_checkpoint

    write_checkpoint(path, {"model": torch.load("model.pt", weights_only=True)["trained"]["model"]})


def cut(path: Path) -> None:
    path.write_bytes(Path("model.pt").read_bytes()[:-200])


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Trap()))


def pickled_by_torch(path: Path) -> None:
    torch.save({"model": Trap()}, path)


CHECKPOINTS = {
    "other shape": (other_shape, "the checkpoint is of another model: other shapes: net.0.weight"),
    "under way": (under_way, "--plan PLAN.yaml says of which task and config it is"),
    "cut": (cut, "cannot be read, it is truncated or damaged"),
    "pickle": (pickled, "cannot be read, it is truncated or damaged"),
    "pickle by torch": (pickled_by_torch, "cannot be read"),
}


@pytest.fixture
def model_file(planted: Callable[..., Path]) -> None:
    """A trained model in model.pt."""
    config = planted()
    from trainables.trained import Trained, train_models

    spec = {"name": "planted:Planted", "params": {}, "base_dir": str(config.parent)}
    (held,) = train_models(spec, [("a", {"max_epochs": 1, "hidden_width": 8}, 0)]).values()
    assert isinstance(held, Trained)
    write_trained(held, "model.pt")


@pytest.mark.parametrize("kind", sorted(CHECKPOINTS))
@pytest.mark.usefixtures("model_file")
def test_a_checkpoint_that_is_none_is_one_line(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong with it is named, nothing in it is run, and the exit code is 2."""
    spoil, message = CHECKPOINTS[kind]
    spoil(Path("bad.pt"))
    assert main(laws_alone(Path("bad.pt"))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not Path("trapped").exists()
    assert not Path("found").exists()


@pytest.mark.usefixtures("model_file")
def test_a_checkpoint_of_a_training_is_examined_with_its_plan(planted: Callable[..., Path]) -> None:
    """A plan says which task and config the weights are of."""
    under_way(Path("training.pt"))
    Path("plan.yaml").write_text(
        "task: {name: 'planted:Planted'}\nspace: [optimizer]\nconfig: {hidden_width: 8, max_epochs: 1}\n",
        encoding="utf-8",
    )
    assert main(laws_alone(Path("training.pt"), "--plan", "plan.yaml")) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["absent"], 2, "absent: no such run folder, config file or checkpoint"),
        (["."], 4, ". is no run: it holds no plan.yaml"),
        (
            ["config.yaml", "--faults", "label_flip"],
            2,
            "unknown fault 'label_flip', did you mean 'label_flips'?",
        ),
        (["config.yaml", "--faults", "label_flips:hihg"], 2, "unknown severity 'hihg'"),
        (["config.yaml", "--properties", "loss_finite"], 2, "unknown property 'loss_finite', did you mean"),
        (["config.yaml", "--profile", "smok"], 2, "unknown profile 'smok', did you mean 'smoke'?"),
        (["config.yaml", "--device", "cuda:x"], 6, "device must be cpu, cuda or cuda:<index>"),
        (["wrong_key.yaml"], 2, "unknown key 'confg', did you mean 'config'?"),
        (["wrong_knob.yaml"], 2, "unknown knob 'hiden_width'"),
        (["no_task.yaml"], 2, "task must be a mapping with a name"),
        (["unknown_task.yaml"], 2, "unknown task 'tabel'"),
        (["list.yaml"], 2, "a config is a mapping with task, config, seeds, got list"),
        (["broken.yaml"], 2, "not YAML"),
        (["raises.yaml"], 2, "task raising:Raising: KeyError: 'no data' (raising.py:5)"),
        (["fails.yaml"], 2, "module 'failing' fails on import: RuntimeError: no licence"),
        (["run_without_rows"], 4, "it holds no rows/"),
        (["run_with_damage"], 4, "cannot be read as Parquet"),
        (["config.yaml", "--out", "config.yaml"], 4, "config.yaml cannot be written"),
        (["config.yaml", "--top", "0"], 2, "must be a positive number or all, got '0'"),
        ([], 2, "name a run folder, a config file or a checkpoint"),
        (["config.yaml", "--seed", "-1"], 2, "must be a whole number"),
    ],
)
def test_bad_input_is_one_line_with_its_exit_code(
    arguments: list[str],
    code: int,
    message: str,
    planted: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The rule, the value and what would be right; no traceback, no folder."""
    planted()
    texts = {
        "wrong_key": "task: {name: table}\nconfg: {}\n",
        "wrong_knob": "task: {name: table}\nconfig: {hiden_width: 3}\n",
        "no_task": "config: {hidden_width: 3}\n",
        "unknown_task": "task: {name: tabel}\nconfig: {hidden_width: 3}\n",
        "list": "- table\n",
        "broken": "task: [table\n",
        "raises": "task: {name: 'raising:Raising'}\n",
        "fails": "task: {name: 'failing:Failing'}\n",
    }
    Path("raising.py").write_text(RAISING, encoding="utf-8")
    Path("failing.py").write_text("raise RuntimeError('no licence')\n", encoding="utf-8")
    for run in ("run_without_rows", "run_with_damage"):
        Path(run).mkdir()
        Path(run, "plan.yaml").write_text("task: {name: 'planted:Planted'}\nspace: [optimizer]\n")
    Path("run_with_damage/rows").mkdir()
    Path("run_with_damage/rows/a.parquet").write_bytes(b"no Parquet")
    for name, text in texts.items():
        Path(f"{name}.yaml").write_text(text, encoding="utf-8")
    before = sorted(os.listdir())
    assert main(["robustness", *arguments]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert [name for name in sorted(os.listdir()) if name != "__pycache__"] == [
        name for name in before if name != "__pycache__"
    ]


def test_a_property_that_does_not_apply_is_said_and_the_others_are_tried(
    planted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A law about something that the task has not is no failure."""
    names = "own_decode_is_strict,splits_repeat"
    assert main(laws_alone(planted(), "--properties", names)) == 0
    assert "2 hold, 0 broken, 2 do not apply" in capsys.readouterr().out
    messages = {row["property"]: row["message"] for row in read_verdicts(Path("found")).to_pylist()}
    assert messages["own_decode_is_strict"] == "the subject has no own_decode"


def test_a_replay_of_what_is_not_there_names_what_is(
    planted: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown id, and a folder that holds none."""
    main(laws_alone(planted(DIVIDES)))
    known = read_counterexamples(Path("found")).to_pylist()[0]["id"]
    capsys.readouterr()
    assert main(["replay", "0000000000", "--in", "found"]) == 2
    assert known in capsys.readouterr().err
    assert main(["replay", known, "--in", "elsewhere"]) == 2
    assert "elsewhere" in capsys.readouterr().err
    assert main(["replay", known]) == 4
    assert "--in DIR" in capsys.readouterr().err
    Path("runs").mkdir()
    Path("found").rename("runs/found")
    assert main(["replay", known]) == 1


def test_properties_and_faults_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """One line each, with what they say."""
    assert main(["robustness", "--list"]) == 0
    said = capsys.readouterr().out
    assert "loss_is_finite" in said
    assert "label_flips" in said


def test_findings_carry_what_their_columns_mean(planted: Callable[..., Path]) -> None:
    """A reader of the Parquet alone knows what stands there."""
    main(laws_alone(planted(DIVIDES)))
    for name in ("verdicts", "counterexamples"):
        schema = pq.read_schema(f"found/{name}.parquet")
        assert schema.metadata[b"scm_harness.kind"] == name.encode()
        assert all(field.metadata[b"meaning"] for field in schema)
