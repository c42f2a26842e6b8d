"""The plan: what one sweep is to do, parsed once from YAML into typed, frozen settings.

Every mistake in a plan is reported at once, each with file, line and column. Whether the space, the task's
data and the machine can do what the plan asks is decided elsewhere (`harness.sweep`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from harness.errors import UserError, nearest, one_line
from harness.yaml_text import Document, KeyPath, read_yaml, write_yaml

Scalar = bool | int | float | str | None
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of a plan: typed without conversions, frozen, no keys beyond those named."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TaskSection(BaseModel):
    """What is learned: the task's name, and the parameters that the task itself checks."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: Annotated[str, Field(min_length=1)]

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of the task, without its name."""
        return dict(self.model_extra or {})


class SearchSection(Section):
    """How configs are drawn: the algorithm, how many, and how many before results are looked at."""

    algorithm: str = "random"
    configs: Count = 16
    batch: Count = 8
    seed: Seed = 0
    points_per_float: Annotated[int, Field(ge=2)] = 3  # read by the grid alone
    objectives: Annotated[list[str], Field(min_length=1)] = ["charged_error"]


class HalvingSection(Section):
    """Early stopping: after each rung's epochs, one in `eta` configs of a batch goes on."""

    metric: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    rungs: Annotated[list[Count], Field(min_length=1)]
    eta: Annotated[int, Field(ge=2)] = 3

    @field_validator("rungs")
    @classmethod
    def check_rungs(cls, rungs: list[int]) -> list[int]:
        """Rungs are epochs, each later than the one before."""
        if any(later <= earlier for earlier, later in zip(rungs, rungs[1:], strict=False)):
            raise ValueError(f"rungs must increase, got {rungs}")
        return rungs


class ResourcesSection(Section):
    """What one trial may use, how many run at once (None: as many as fit), how often a lost one is retried."""

    cpus_per_trial: Annotated[float, Field(gt=0, strict=False)] = 1.0
    gpus_per_trial: Annotated[float, Field(ge=0, strict=False)] = 0.0
    max_concurrent: Count | None = None
    retries: Annotated[int, Field(ge=0)] = 3


class RankingSection(Section):
    """How the leaderboard is ordered; the same options as `scm-harness rank`."""

    nan_budget: Annotated[int, Field(ge=0)] = 0
    by: Annotated[list[str], Field(min_length=1)] | None = None


class Plan(Section):
    """One sweep, wholly: the same plan gives the same rows on any machine with the same library versions."""

    task: TaskSection
    space: list[str] | dict[str, Any]
    config: dict[str, Scalar] = {}
    search: SearchSection = SearchSection()
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0]
    halving: HalvingSection | None = None
    resources: ResourcesSection = ResourcesSection()
    ranking: RankingSection = RankingSection()
    base_dir: str = "."  # relative paths of the task start here; itself relative to the plan file

    @field_validator("seeds")
    @classmethod
    def check_seeds(cls, seeds: list[int]) -> list[int]:
        """A seed named twice would train the same trial twice."""
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds must differ from one another, got {seeds}")
        return seeds

    @model_validator(mode="before")
    @classmethod
    def check_mapping(cls, values: Any) -> Any:
        """An empty file or a list is named as such, instead of as a type of the parser."""
        if not isinstance(values, Mapping):
            raise ValueError("a plan is a mapping with at least `task` and `space`")
        return values


# What may change between a run and its continuation without changing a single row.
FREE_TO_CHANGE = (("base_dir",), ("resources", "max_concurrent"), ("resources", "retries"))


def load_plan(path: Path) -> Plan:
    """Parse a plan file; every mistake in it is a line of one `UserError`, with file, line and column."""
    document = read_yaml(path)
    try:
        plan = Plan.model_validate(document.values)
    except ValidationError as error:
        lines = [problem_line(document, problem) for problem in error.errors(include_url=False)]
        raise UserError(lines[0], more=lines[1:]) from None
    base = (path.resolve().parent / plan.base_dir).resolve()
    return plan.model_copy(update={"base_dir": str(base)})


def problem_line(document: Document, problem: Mapping[str, Any]) -> str:
    """One line for one pydantic error: the place, the key as it is written, what is wrong, what would do."""
    at = path_in_document(document, tuple(problem["loc"]))
    dotted = ".".join(map(str, at)) or "plan"
    kind = problem["type"]
    if kind == "extra_forbidden":
        known = known_keys(at[:-1])
        hint = nearest(str(at[-1]), known)
        return f"{document.place(at, key=True)}: unknown key {dotted!r}{hint} (known: {', '.join(known)})"
    if kind == "missing":
        return f"{document.place(at[:-1])}: {dotted!r} is missing"
    text = one_line(problem["msg"]).removeprefix("Value error, ")
    got = problem.get("input")
    shown = "" if kind == "value_error" or isinstance(got, dict | list) else f", got {got!r}"
    text = text if text.startswith(f"{dotted} ") else f"{dotted}: {text[:1].lower()}{text[1:]}"
    return f"{document.place(at)}: {text}{shown}"


def path_in_document(document: Document, loc: KeyPath) -> KeyPath:
    """The part of a pydantic location that names keys: the branches of a union are no keys of the file."""
    at: KeyPath = ()
    node = document.values
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        inside = (isinstance(node, dict) and part in node) or (
            isinstance(node, list) and isinstance(part, int) and part < len(node)
        )
        if inside:
            at, node = (*at, part), node[part]
        elif last and isinstance(node, dict) and isinstance(part, str) and part in known_keys(at):
            at = (*at, part)
    return at


def known_keys(at: KeyPath) -> list[str]:
    """The keys that a plan may have at a path."""
    model: Any = Plan
    for part in at:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        options = getattr(annotation, "__args__", (annotation,))
        model = next(
            (kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel)), None
        )
        if model is None:
            return []
    return list(model.model_fields)


def plan_values(plan: Plan) -> dict[str, Any]:
    """The plan as plain values with every default filled in."""
    return plan.model_dump(mode="json")


def plan_text(plan: Plan) -> str:
    """The plan as YAML, every default filled in; parsing it again gives the same plan."""
    return write_yaml(plan_values(plan))


def digest_values(plan: Plan) -> dict[str, Any]:
    """The plain values that decide what the rows say."""
    values = plan_values(plan)
    for *sections, key in FREE_TO_CHANGE:
        inner = values
        for section in sections:
            inner = inner[section]
        inner.pop(key, None)
    return values


def plan_digest(plan: Plan) -> str:
    """16 hex characters that are the same for two plans exactly when both give the same rows."""
    text = json.dumps(digest_values(plan), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plan_differences(plan: Plan, other: Plan) -> list[str]:
    """The dotted names of the fields in which two plans differ, as far as the rows depend on them."""
    return sorted(differing(digest_values(plan), digest_values(other), ""))


def differing(one: Any, other: Any, prefix: str) -> set[str]:
    """The dotted paths below `prefix` at which two plain values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {
            name
            for key in one.keys() | other.keys()
            for name in (
                differing(one[key], other[key], f"{prefix}{key}.")
                if key in one and key in other
                else {f"{prefix}{key}"}
            )
        }
    return set() if one == other and type(one) is type(other) else {prefix.removesuffix(".")}
