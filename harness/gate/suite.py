"""The suite: what a gate trains, how often, and how much worse is too much, parsed once from YAML.

Every mistake is reported at once, with file, line and column. Whether a candidate passes is decided in
`decision`; whether the tasks can load their data shows when they are trained.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from harness.errors import UserError, nearest, one_line
from harness.gate.rules import GateRules, MetricRule
from harness.plan import Count, Scalar, Section, Seed, TaskSection, load_plan, problem_line, raise_lines
from harness.yaml_text import Document, read_yaml
from reports.metrics import METRICS, ROBUSTNESS, SHORTFALL
from reports.schema import OPEN_PREFIXES
from search_spaces.identity import canonical_json
from trainables.configs import KNOB_TYPES, active_knobs, resolve_config

LONGEST_NAME = 100
STEP_TIME = "step_time_ms"
TEST_PREFIX = "test_"
_USUAL = GateRules()
_RULES = {rule.metric: rule for rule in _USUAL.metrics}


class ScenarioSection(Section):
    """One learning problem with its settings: a task, a plan's task, or what a file of defaults says.

    config    knobs that are the same for every candidate; they are a part of the question
    defaults  a file whose `config` is under test: it may differ between baseline and candidate
    """

    name: Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
    task: TaskSection | None = None
    plan: str | None = None
    defaults: str | None = None
    config: dict[str, Scalar] = Field(default_factory=dict)

    @model_validator(mode="after")
    def check_source(self) -> ScenarioSection:
        """Where the task comes from is said once."""
        if self.plan is not None and (self.task is not None or self.defaults is not None):
            raise ValueError("a scenario has `plan` alone, or `task` or `defaults` or both")
        if self.plan is None and self.task is None and self.defaults is None:
            raise ValueError("a scenario needs one of `task`, `plan` and `defaults`")
        return self


class MetricSection(Section):
    """How much worse a metric may become: `margin` is what must be excluded, `floor` what is never harm.

    In the metric's unit where it is compared by difference, else as a share: 0.05 is five per cent.
    """

    margin: Annotated[float, Field(gt=0)] | None = None
    floor: Annotated[float, Field(ge=0)] | None = None
    compare: Literal["difference", "log_ratio"] | None = None
    worse: Literal["lower", "higher"] | None = None
    tail_guard: bool | None = None


class TimeSection(Section):
    """How step time is measured: launches of each arm for each seed, and steps that a launch times."""

    launches: Annotated[int, Field(ge=1, le=100)] = 1
    steps: Annotated[int, Field(ge=20, le=100_000)] = 200


class SuiteFile(Section):
    """A suite as it is written."""

    name: str | None = None
    scenarios: Annotated[list[ScenarioSection], Field(min_length=1)]
    seeds: Seed | list[Seed] = 0
    looks: Annotated[list[Count], Field(min_length=1)] = Field(default_factory=lambda: [*_USUAL.looks])
    metrics: dict[str, MetricSection | None] = Field(default_factory=lambda: dict.fromkeys(_RULES))
    time: TimeSection = TimeSection()
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = _USUAL.alpha
    alpha_pass: Annotated[float, Field(gt=0, lt=0.5)] = _USUAL.alpha_pass
    nan_allowance: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    base_dir: str = "."

    @model_validator(mode="before")
    @classmethod
    def check_mapping(cls, values: Any) -> Any:
        """An empty file or a list is named as such."""
        if not isinstance(values, Mapping):
            raise ValueError("a suite is a mapping with at least `scenarios`")
        return values

    @field_validator("name")
    @classmethod
    def check_name(cls, name: str | None) -> str | None:
        """The name is that of folders."""
        if name is not None and not is_folder_name(name):
            raise ValueError(f"must be 1 to 64 letters, digits, '.', '_' or '-', got {name!r}")
        return name

    @field_validator("scenarios")
    @classmethod
    def check_scenarios(cls, scenarios: list[ScenarioSection]) -> list[ScenarioSection]:
        """A name stands for one scenario."""
        names = [one.name for one in scenarios]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"names of scenarios must differ, got {', '.join(map(repr, twice))} twice")
        return scenarios

    @field_validator("looks")
    @classmethod
    def check_looks(cls, looks: list[int]) -> list[int]:
        """Looks are numbers of seeds, each larger than the one before."""
        if any(later <= earlier for earlier, later in itertools.pairwise(looks)):
            raise ValueError(f"looks must increase, got {looks}")
        return looks

    @model_validator(mode="after")
    def check_seeds(self) -> SuiteFile:
        """A list of seeds holds those of the last look, each once."""
        if isinstance(self.seeds, list):
            if len(set(self.seeds)) < len(self.seeds):
                raise ValueError(f"seeds must differ from one another, got {self.seeds}")
            if len(self.seeds) < self.looks[-1]:
                raise ValueError(
                    f"seeds must be at least as many as the last look asks for, "
                    f"got {len(self.seeds)} for {self.looks[-1]}"
                )
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One scenario, with everything that a worker must know.

    task, params, base_dir: as `trainables.loading` takes them. pinned: knobs that are a part of the question.
    tested: knobs of a file of defaults, which may differ between the arms; defaults: that file.
    """

    name: str
    task: str
    params: Mapping[str, Any]
    base_dir: Path
    pinned: Mapping[str, Any]
    tested: Mapping[str, Any]
    defaults: Path | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The knobs that are trained with; every other has its default."""
        return {**self.tested, **self.pinned}

    @property
    def question(self) -> str:
        """12 hex characters, equal for scenarios that ask the same of a candidate."""
        asked = {
            "task": self.task,
            "params": dict(self.params),
            "pinned": dict(self.pinned),
            "defaults": self.defaults is not None,
        }
        return hashlib.sha256(canonical_json(asked).encode("ascii")).hexdigest()[:12]

    @property
    def spec(self) -> dict[str, Any]:
        """The task in the words of a job."""
        return {"name": self.task, "params": dict(self.params), "base_dir": str(self.base_dir)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A suite, checked, with every path resolved."""

    name: str
    path: Path
    scenarios: tuple[Scenario, ...]
    seeds: tuple[int, ...]
    rules: GateRules
    launches: int
    steps: int
    device: str
    timeout_s: float

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that are judged."""
        return tuple(rule.metric for rule in self.rules.metrics)

    @property
    def times_steps(self) -> bool:
        """Whether step time is judged, and launches are to be made."""
        return STEP_TIME in self.metrics

    def with_arm(self, arm: str, scenarios: tuple[Scenario, ...]) -> Suite:
        """The suite with the scenarios as an arm has them; their names and order stay."""
        if [one.name for one in scenarios] != [one.name for one in self.scenarios]:
            raise ValueError(f"arm {arm} must have the scenarios of the suite")
        return replace(self, scenarios=scenarios)


def load_suite(path: Path) -> Suite:
    """Parse a suite file; every mistake in it is a line of one `UserError`, with file, line and column."""
    document = read_yaml(path)
    try:
        written = SuiteFile.model_validate(document.values)
    except ValidationError as error:
        raise_lines(
            list(
                dict.fromkeys(
                    problem_line(document, problem, SuiteFile, "suite")
                    for problem in error.errors(include_url=False)
                )
            )
        )
    lines: list[str] = []
    rules = [make_rule(document, name, section, lines) for name, section in written.metrics.items()]
    if not written.metrics:
        lines.append(f"{document.place(('metrics',))}: metrics must name at least one, got none")
    scenarios = [
        make_scenario(document, index, section, written.base_dir, lines)
        for index, section in enumerate(written.scenarios)
    ]
    name = written.name if written.name is not None else path.stem
    if not is_folder_name(name):
        lines.append(
            f"{path}: a suite without a `name` is called like its file, and {name!r} cannot be a folder's"
        )
    if lines:
        raise_lines(lines)
    found = tuple(one for one in scenarios if one is not None)
    check_distinct(found, document)
    seeds = written.seeds
    return Suite(
        name=name,
        path=path,
        scenarios=found,
        seeds=tuple(seeds[: written.looks[-1]])
        if isinstance(seeds, list)
        else tuple(range(seeds, seeds + written.looks[-1])),
        rules=GateRules(
            metrics=tuple(rule for rule in rules if rule is not None),
            alpha=written.alpha,
            alpha_pass=written.alpha_pass,
            looks=tuple(written.looks),
            nan_allowance=written.nan_allowance,
        ),
        launches=written.time.launches,
        steps=written.time.steps,
        device=written.device,
        timeout_s=written.timeout_s,
    )


def make_rule(
    document: Document, name: str, section: MetricSection | None, lines: list[str]
) -> MetricRule | None:
    """The rule of a metric: what the suite says, else the default; what is wrong is added to `lines`."""
    at = ("metrics", name)
    usual = _RULES.get(name)
    given = {} if section is None else section.model_dump(exclude_none=True)
    if usual is not None:
        try:
            return replace(usual, **as_harm(given, given.get("compare", usual.compare)))
        except ValueError as error:
            lines.append(f"{document.place(at)}: {one_line(error)}")
            return None
    problem = metric_problem(name)
    if problem:
        lines.append(f"{document.place(at, key=True)}: {problem}")
        return None
    if "margin" not in given:
        lines.append(f"{document.place(at)}: metric {name!r} has no default margin: say `margin`")
        return None
    known = METRICS.get(name.removeprefix(TEST_PREFIX))
    if known is not None:
        given.setdefault("worse", "lower" if known.direction == "higher" else "higher")
        given.setdefault("compare", "difference" if known.unit == "share" else "log_ratio")
        if given["worse"] != ("lower" if known.direction == "higher" else "higher"):
            lines.append(
                f"{document.place(at)}: metric {name} is better {known.direction}, "
                f"got worse: {given['worse']}"
            )
            return None
    missing = [key for key in ("worse", "compare") if key not in given]
    if missing:
        lines.append(
            f"{document.place(at)}: metric {name!r} needs {' and '.join(f'`{key}`' for key in missing)}"
        )
        return None
    try:
        return MetricRule(metric=name, **as_harm(given, given["compare"]))
    except ValueError as error:
        lines.append(f"{document.place(at)}: {one_line(error)}")
        return None


def as_harm(given: Mapping[str, Any], compare: str) -> dict[str, Any]:
    """What a suite says of a metric, its margin and floor as harm: of a ratio, 0.05 is five per cent more."""
    shares = {name: math.log1p(given[name]) for name in ("margin", "floor") if name in given}
    return {**given, **(shares if compare == "log_ratio" else {})}


def metric_problem(name: str) -> str:
    """Why no row has a metric of this name that can be gated; empty where one may."""
    plain = name.removeprefix(TEST_PREFIX)
    if plain == SHORTFALL:
        return f"{SHORTFALL} is made from coverage in a ranking; gate `coverage`"
    if plain == ROBUSTNESS:
        return "robustness is not measured by a gate; `scm-harness robustness` does it"
    if plain == STEP_TIME and name != plain:
        return f"unknown metric {name!r}, did you mean {STEP_TIME!r}?"
    if plain in METRICS or plain.startswith(OPEN_PREFIXES):
        return ""
    known = [metric for metric in METRICS if not metric.startswith("metric.")]
    known = [metric for metric in known if metric not in (SHORTFALL, ROBUSTNESS)]
    return f"unknown metric {name!r}{nearest(name, known)} (known: {', '.join(known)}, metric.<name>)"


def make_scenario(
    document: Document, index: int, section: ScenarioSection, base_dir: str, lines: list[str]
) -> Scenario | None:
    """A scenario with its files read; what is wrong with it is added to `lines`."""
    at = ("scenarios", index)
    root = (document.path.resolve().parent / base_dir).resolve()
    known = len(lines)
    task, base, pinned = section.task, root, dict(section.config)
    tested: dict[str, Any] = {}
    defaults: Path | None = None
    try:
        if section.plan is not None:
            plan = load_plan(shown_path(document.path.parent / base_dir / section.plan))
            task, base = plan.task, Path(plan.base_dir)
            pinned = {**written_config(document.path.parent / base_dir / section.plan), **pinned}
        if section.defaults is not None:
            defaults = (root / section.defaults).resolve()
            tested, said = read_defaults(defaults)
            task = task or said
            if task is None:
                key = document.place((*at, "defaults"))
                lines.append(f"{key}: {section.defaults} names no task, and neither does the scenario")
    except UserError as error:
        place = document.place((*at, "plan" if section.plan is not None else "defaults"))
        lines += [f"{place}: {line}" for line in error.lines]
    for name in section.config:
        if name not in KNOB_TYPES:
            place = document.place((*at, "config", name), key=True)
            lines.append(f"{place}: unknown knob {name!r}{nearest(name, KNOB_TYPES)}")
    if len(lines) > known or task is None:
        return None
    try:
        resolve_config({**tested, **pinned})
    except (ValueError, TypeError) as error:
        text = one_line(error)
        named = next((name for name in section.config if re.search(rf"\b{re.escape(name)}\b", text)), None)
        source = "config" if section.config or defaults is None else "defaults"
        place = document.place((*at, source) if named is None else (*at, "config", named))
        lines.append(f"{place}: {text}")
        return None
    return Scenario(
        name=section.name,
        task=task.name,
        params=task.params,
        base_dir=base,
        pinned=pinned,
        tested=tested,
        defaults=defaults,
    )


def read_defaults(path: Path) -> tuple[dict[str, Any], TaskSection | None]:
    """The config of a file of defaults, and its task if it names one; a `UserError` where there is none."""
    document = read_yaml(shown_path(path))
    config = document.value_at(("config",))
    if not isinstance(config, Mapping) or not config:
        raise UserError(f"{document.place(('config',))}: a file of defaults holds a mapping `config`")
    unknown = [name for name in config if name not in KNOB_TYPES]
    if unknown:
        raise_lines(
            [
                f"{document.place(('config', name), key=True)}: unknown knob {name!r}"
                f"{nearest(name, KNOB_TYPES)}"
                for name in unknown
            ]
        )
    task = document.value_at(("task",))
    if task is None:
        return dict(config), None
    try:
        return dict(config), TaskSection.model_validate(task)
    except ValidationError as error:
        raise UserError(f"{document.place(('task',))}: {one_line(error.errors()[0]['msg'])}") from None


def written_config(path: Path) -> dict[str, Any]:
    """The knobs that a plan writes down itself: the defaults of the others are those of whoever trains."""
    config = read_yaml(path).value_at(("config",))
    return dict(config) if isinstance(config, Mapping) else {}


def check_distinct(scenarios: tuple[Scenario, ...], document: Document) -> None:
    """Refuse two scenarios that train the same: their rows could not be told apart."""
    seen: dict[str, str] = {}
    for index, one in enumerate(scenarios):
        active = active_knobs(one.config)
        same = canonical_json({"task": one.task, "params": dict(one.params), "config": active})
        if same in seen:
            place = document.place(("scenarios", index))
            raise UserError(f"{place}: scenario {one.name!r} trains the same as {seen[same]!r}")
        seen[same] = one.name


def is_folder_name(text: str) -> bool:
    """Whether the text can be the name of a folder anywhere."""
    return re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", text) is not None


def shown_path(path: Path) -> Path:
    """The path as short as it can be said from here."""
    try:
        return path.resolve().relative_to(Path.cwd())
    except (ValueError, OSError):
        return path


def suite_values(suite: Suite) -> dict[str, Any]:
    """What decides the rows of a suite, as plain values; seeds and margins do not."""
    return {
        "scenarios": {
            one.name: {"question": one.question, "config": one.config, "spec": {**one.spec, "base_dir": ""}}
            for one in suite.scenarios
        },
        "device": suite.device,
        "steps": suite.steps,
    }
