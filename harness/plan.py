"""The plan: what one sweep is to do, parsed once from YAML into typed, frozen settings.

Every mistake in a plan is reported at once, each with file, line and column. Whether the task's data and the
machine can do what the plan asks is decided elsewhere (`harness.sweep`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from harness.errors import UserError, nearest, one_line
from harness.search import SEARCHERS, check_grid
from harness.yaml_text import Document, KeyPath, read_yaml, write_yaml
from reports.changes import find_changes
from reports.metrics import ROBUSTNESS, SHORTFALL, parse_metric
from search_spaces.errors import SpaceError
from search_spaces.named import SPACES, parse_space
from search_spaces.space import Space
from trainables.configs import KNOB_TYPES, resolve_config


def check_scalar(value: Any) -> Any:
    """One value of a knob: a finite number, text, true, false or null."""
    plain = value is None or isinstance(value, bool | int | float | str)
    if not plain or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"must be a finite number, text, true, false or null, got {value!r}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"must fit into 64 bits, got {value!r}")
    return value


# Checked by hand: a union of types would report one wrong value once for each of them.
Scalar = Annotated[Any, AfterValidator(check_scalar)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class Section(BaseModel):
    """A part of a plan: typed without conversions, frozen, no keys beyond those named."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TaskSection(BaseModel):
    """What is learned: the task's name, and the parameters that the task itself checks."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: Annotated[str, Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def check_params(cls, values: Any) -> Any:
        """Keys become text, as in the run folder's plan and in a config's identity; numbers are finite."""
        return text_keyed(values) if isinstance(values, Mapping) else values

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
    objectives: Annotated[list[str], Field(min_length=1)] = ["coverage_shortfall", "accepted_error"]
    points_per_range: Annotated[int, Field(ge=1, le=1000)] = 3  # grid alone
    startup: Count = 10  # tpe alone: configs before the first that is learned
    scalarisation: Literal["lexicographic", "weighted", "total"] = "lexicographic"  # tpe alone
    with_defaults: bool = False  # train what would be trained without a search, too


class HalvingSection(Section):
    """Early stopping: after each rung's epochs, one in `eta` configs of a batch goes on."""

    metric: str = "charged_error"  # losses of different weights do not compare
    mode: Literal["min", "max"] = "min"
    rungs: Annotated[list[Count], Field(min_length=1)]
    eta: Annotated[int, Field(ge=2)] = 3

    @field_validator("rungs")
    @classmethod
    def check_rungs(cls, rungs: list[int]) -> list[int]:
        """Rungs are epochs, each later than the one before."""
        if any(later <= earlier for earlier, later in itertools.pairwise(rungs)):
            raise ValueError(f"rungs must increase, got {rungs}")
        return rungs


class ResourcesSection(Section):
    """What one worker may use, how many there are (None: all that fit), how often a lost trial is retried."""

    cpus_per_trial: Annotated[float, Field(ge=0.01, strict=False)] = 1.0
    gpus_per_trial: Annotated[float, Field(ge=0, strict=False)] = 0.0
    max_concurrent: Count | None = None
    retries: Annotated[int, Field(ge=0)] = 3

    @field_validator("cpus_per_trial", "gpus_per_trial")
    @classmethod
    def check_share(cls, share: float) -> float:
        """Ray counts in ten-thousandths."""
        if not math.isclose(share, round(share, 4), abs_tol=1e-12):
            raise ValueError(f"must have at most 4 decimals, got {share}")
        return share

    @field_validator("gpus_per_trial")
    @classmethod
    def check_gpus(cls, gpus: float) -> float:
        """A trial shares one GPU with others, or has whole ones."""
        if gpus > 1 and not gpus.is_integer():
            raise ValueError(f"must be a whole number above 1, got {gpus}")
        return gpus


class PacksSection(Section):
    """How many trials of equal shapes train together, as one model: a number (1: none), or what pays."""

    size: Annotated[int, Field(ge=1, le=2**16)] | Literal["auto"] = "auto"


class RankingSection(Section):
    """How the leaderboard is ordered; the same options as `scm-harness rank`."""

    nan_budget: Annotated[int, Field(ge=0)] = 0
    by: Annotated[list[str], Field(min_length=1)] | None = None


class Judging(Section):
    """The parts of a plan that judge its rows, whatever the rest of it says."""

    model_config = ConfigDict(extra="ignore")

    seeds: Annotated[list[Seed], Field(min_length=1)] = [0]
    ranking: RankingSection = RankingSection()


class Trained(Section):
    """The parts of a plan that say what is trained, and from which config."""

    model_config = ConfigDict(extra="ignore")

    task: TaskSection
    config: dict[str, Any] = {}


Part = TypeVar("Part", Judging, Trained)


class Plan(Section):
    """One sweep, wholly: the same plan gives the same rows on any machine with the same library versions."""

    task: TaskSection
    space: Any  # read by `search_spaces.named.parse_space`, which says what is wrong with it
    config: dict[str, Scalar] = {}
    search: SearchSection = SearchSection()
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0]
    halving: HalvingSection | None = None
    packs: PacksSection = PacksSection()
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


# What an epoch says, and halving can compare; a task adds its own as metric.<name>.
HISTORY_METRICS = (
    "loss",
    "val_loss",
    "coverage",
    "accepted_error",
    "charged_error",
    "false_accept_rate",
    "false_reject_rate",
)

# What may change between a run and its continuation without changing a single row.
FREE_TO_CHANGE = (("base_dir",), ("resources", "max_concurrent"), ("resources", "retries"))


def load_plan(path: Path) -> Plan:
    """Parse a plan file; every mistake in it is a line of one `UserError`, with file, line and column.

    The plan that is returned says everything: the space holds its domains instead of names, `config` a value
    for every knob that does not vary, `base_dir` an absolute path. Its text parses to the same plan.
    """
    document = read_yaml(path)
    try:
        plan = Plan.model_validate(document.values)
    except ValidationError as error:
        raise_lines([problem_line(document, problem) for problem in error.errors(include_url=False)])
    space = read_space(plan, document)
    check_knobs(plan, space, document)
    check_names(plan, document)
    check_search(plan, document)
    varying = set(space.domains) - set(plan.config)
    fixed = {name: value for name, value in resolve_config({}).items() if name not in varying}
    base = (path.resolve().parent / plan.base_dir).resolve()
    plan = plan.model_copy(
        update={"base_dir": str(base), "space": space.to_plain(), "config": {**fixed, **plan.config}}
    )
    check_samples(plan, document)
    return plan


def load_trained(path: Path) -> Trained:
    """What a run's plan says about its task and its config; otherwise as `load_judging`."""
    return _load_part(path, Trained)


def load_judging(path: Path) -> Judging:
    """What a run's plan says about its ranking; `UserError` as for `load_plan`.

    The rest of the plan is not looked at: a run stays rankable when a later version knows other knobs.
    """
    return _load_part(path, Judging)


def _load_part(path: Path, part: type[Part]) -> Part:
    document = read_yaml(path)
    try:
        return part.model_validate(document.values)
    except ValidationError as error:
        raise_lines([problem_line(document, problem) for problem in error.errors(include_url=False)])


def plan_space(plan: Plan) -> Space:
    """The space that configs are drawn from: the plan's, with every knob that is in its `config` held fixed.

    The orders between knobs that every training asks for (tau_infer <= tau_train_min and so on) hold in it
    also where the plan's own space does not mention them.
    """
    space = parse_space(plan.space).with_fixed(plan.config)
    orders = [
        order
        for order in SPACES["default"].constraints
        if order.smaller in space.domains and order.larger in space.domains
    ]
    return Space(space.name, space.domains, [*space.constraints, *orders], description=space.description)


def read_space(plan: Plan, document: Document) -> Space:
    """The space that the plan names or spells out; what is wrong with it is a `UserError`."""
    try:
        return parse_space(plan.space)
    except SpaceError as error:
        raise_lines([f"{knob_place(document, problem)}: {problem}" for problem in error.problems])


def knob_place(document: Document, problem: str) -> str:
    """The place of the knob or space that a sentence speaks of first, else of the plan's space."""
    places = {at: place for at, place in document.value_places.items() if len(at) > 1}
    for word in problem.replace("'", " ").replace(":", " ").split():
        found = [at for at in places if at[0] == "config" and at[-1] == word]
        found += [at for at in places if at[0] == "space" and word in (at[-1], document.value_at(at))]
        if found:
            line, column = places[found[0]]
            return f"{document.path}:{line}:{column}"
    return document.place(("space",))


def check_knobs(plan: Plan, space: Space, document: Document) -> None:
    """Refuse knobs that no training reads."""
    lines = [
        f"{knob_place(document, name)}: unknown knob {name!r}{nearest(name, KNOB_TYPES)}"
        for name in space.domains
        if name not in KNOB_TYPES
    ]
    lines += [
        f"{document.place(('config', name), key=True)}: unknown knob {name!r}{nearest(name, KNOB_TYPES)}"
        for name in plan.config
        if name not in KNOB_TYPES
    ]
    if lines:
        raise_lines(lines)


def check_names(plan: Plan, document: Document) -> None:
    """Refuse metrics that stand for nothing: objectives, ranking metrics, halving metric."""
    lines = metric_lines(document, ("ranking", "by"), plan.ranking.by or [], lower=False)
    lines += metric_lines(document, ("search", "objectives"), plan.search.objectives, lower=True)
    search = plan.search
    lexical = search.algorithm == "tpe" and search.scalarisation != "total"  # the others make no one number
    if lexical and search.objectives[0] != SHORTFALL:
        at = document.place(("search", "objectives"))
        lines.append(
            f"{at}: scalarisation {search.scalarisation!r} needs {SHORTFALL!r} as its first objective; "
            "use 'total' for others"
        )
    halving = plan.halving
    if halving is not None and not (
        halving.metric in HISTORY_METRICS or halving.metric.startswith("metric.")
    ):
        at = document.place(("halving", "metric"))
        hint = nearest(halving.metric, HISTORY_METRICS)
        lines.append(f"{at}: no epoch reports {halving.metric!r}{hint} (known: {', '.join(HISTORY_METRICS)})")
    if lines:
        raise_lines(lines)


def metric_lines(document: Document, at: KeyPath, texts: Sequence[str], *, lower: bool) -> list[str]:
    """What is wrong with a list of metrics, a line each; with `lower`, each must be better when lower."""
    lines = []
    names: set[str] = set()
    for index, text in enumerate(texts):
        place = document.place((*at, index))
        try:
            metric = parse_metric(text)
        except ValueError as error:
            lines.append(f"{place}: {one_line(error)}")
            continue
        if metric.name == ROBUSTNESS:
            lines.append(
                f"{place}: robustness is measured after a sweep; ask `scm-harness rank RUN --by robustness`"
            )
        elif lower and metric.direction != "lower":
            lines.append(f"{place}: an objective must be better when lower, got {text!r}")
        if metric.name in names:
            lines.append(f"{place}: a metric must be named once, got {metric.name!r} again")
        names.add(metric.name)
    return lines


def check_search(plan: Plan, document: Document) -> None:
    """Refuse an algorithm that does not exist, or that cannot do with the objectives."""
    algorithm, objectives = plan.search.algorithm, plan.search.objectives
    if algorithm not in SEARCHERS:
        place = document.place(("search", "algorithm"))
        hint = f"{nearest(algorithm, SEARCHERS)} (known: {', '.join(SEARCHERS)})"
        raise_lines([f"{place}: unknown search algorithm {algorithm!r}{hint}"])
    if algorithm == "nsga2" and len(objectives) < 2:
        place = document.place(("search", "objectives"))
        raise_lines([f"{place}: nsga2 needs at least 2 objectives, got {len(objectives)}"])


def check_samples(plan: Plan, document: Document) -> None:
    """Refuse a space whose first, middle and last config no training accepts: a value, or an order of two."""
    inverted = [
        f"{document.place(('config', order.larger))}: {order} must hold, "
        f"got {plan.config[order.smaller]!r} > {plan.config[order.larger]!r}"
        for order in SPACES["default"].constraints
        if is_above(plan.config.get(order.smaller), plan.config.get(order.larger))
    ]
    if inverted:
        raise_lines(inverted)
    try:
        space = plan_space(plan)
    except SpaceError as error:
        raise_lines([f"{knob_place(document, problem)}: {problem}" for problem in error.problems])
    for u in (0.0, 0.5, 1.0):
        try:
            resolve_config(space.sample([u] * len(space.dimensions)))
        except (ValueError, TypeError) as error:
            raise_lines([f"{knob_place(document, one_line(error))}: {one_line(error)}"])
    if plan.search.algorithm == "grid":
        try:
            check_grid(space, plan.search.configs, plan.search.points_per_range)
        except ValueError as error:
            raise_lines([f"{document.place(('search', 'configs'))}: {one_line(error)}"])


def is_above(low: object, high: object) -> bool:
    """Whether both are numbers and the first is the larger."""
    return isinstance(low, int | float) and isinstance(high, int | float) and low > high


def text_keyed(value: Any) -> Any:
    """The value with the keys of all its mappings as text, spelled as YAML spells them."""
    if isinstance(value, Mapping):
        return {key_text(key): text_keyed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [text_keyed(item) for item in value]
    return value if isinstance(value, str) else check_scalar(value)


def key_text(key: Any) -> str:
    """A key of a mapping as text.

    >>> key_text(True), key_text(3), key_text(None)
    ('true', '3', 'null')
    """
    return key if isinstance(key, str) else json.dumps(key)


def raise_lines(lines: Sequence[str]) -> NoReturn:
    """Raise one `UserError` with these lines."""
    raise UserError(lines[0], more=lines[1:])


def problem_line(
    document: Document, problem: Mapping[str, Any], model: type[BaseModel] | None = None, what: str = "plan"
) -> str:
    """One line for one pydantic error: the place, the key as it is written, what is wrong, what would do.

    `model` is what the document is to be, by default a plan, and `what` it is called.
    """
    at = path_in_document(document, tuple(problem["loc"]), model)
    dotted = ".".join(map(str, at)) or what
    kind = problem["type"]
    if kind == "extra_forbidden":
        known = known_keys(at[:-1], model)
        hint = nearest(str(at[-1]), known)
        return f"{document.place(at, key=True)}: unknown key {dotted!r}{hint} (known: {', '.join(known)})"
    if kind == "missing":
        return f"{document.place(at[:-1])}: {dotted!r} is missing"
    text = one_line(problem["msg"]).removeprefix("Value error, ")
    got = problem.get("input")
    shown = "" if kind == "value_error" or isinstance(got, dict | list) else f", got {got!r}"
    text = text if text.startswith(f"{dotted} ") else f"{dotted}: {text[:1].lower()}{text[1:]}"
    return f"{document.place(at)}: {text}{shown}"


def path_in_document(document: Document, loc: KeyPath, model: type[BaseModel] | None = None) -> KeyPath:
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
        elif last and isinstance(node, dict) and isinstance(part, str) and part in known_keys(at, model):
            at = (*at, part)
    return at


def known_keys(at: KeyPath, model: type[BaseModel] | None = None) -> list[str]:
    """The keys that a document of a model, by default a plan, may have at a path."""
    kind: Any = Plan if model is None else model
    for part in at:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[part].annotation if part in kind.model_fields else None
        else:  # a list or a mapping of parts: what it holds stands last
            kind = getattr(kind, "__args__", (None,))[-1]
        options = getattr(kind, "__args__", ()) if get_origin(kind) in (Union, UnionType) else (kind,)
        kind = next((option for option in options if option is not NoneType), None)
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


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
    return [change.key for change in find_changes(digest_values(plan), digest_values(other))]
