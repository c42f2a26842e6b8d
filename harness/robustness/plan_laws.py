"""Laws of plans and configs: their text is themselves, and any other text is refused in lines."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from harness.robustness.law import BrokenLawError, Case, Property, Subject, library_law
from harness.robustness.same import first_difference

# --- 29: plans and configs ------------------------------------------------------------------------------

_SPACES = ("optimizer", "loss_weights", "coverage_targets", "tau_ranges", "model_size", "gradient_policy")


def _plan_sections() -> SearchStrategy[dict[str, Any]]:
    """Plans that are in order, as values."""
    config = st.fixed_dictionaries(
        {},
        optional={
            "max_epochs": st.integers(1, 1000),
            "batch_size": st.integers(1, 4096),
            "clip_norm": st.none() | st.floats(1e-300, 1e300),
            "nesterov": st.just(False),
            "dtype": st.sampled_from(["float32", "float64"]),
            "coverage_temperature": st.floats(1e-12, 1e12),
        },
    )
    search = st.fixed_dictionaries(
        {"algorithm": st.sampled_from(["random", "sobol", "nsga2"]), "configs": st.integers(1, 10**6)},
        optional={
            "batch": st.integers(1, 64),
            "seed": st.integers(0, 2**31 - 1),
            "with_defaults": st.booleans(),
        },
    )
    words = st.text(max_size=6)
    plain = (
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**63 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | words
    )
    parameters = st.dictionaries(
        st.text(min_size=1, max_size=6).filter(lambda key: key != "name"),
        plain | st.lists(plain, max_size=3),
        max_size=3,
    )
    return st.fixed_dictionaries(
        {
            "task": parameters.map(lambda held: {"name": "dose", **held}),
            "space": st.lists(st.sampled_from(_SPACES), min_size=1, max_size=3, unique=True),
        },
        optional={
            "config": config,
            "search": search,
            "seeds": st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4, unique=True),
            "halving": st.none()
            | st.sets(st.integers(1, 99), min_size=1, max_size=3).map(lambda rungs: {"rungs": sorted(rungs)}),
            "packs": st.fixed_dictionaries({"size": st.just("auto") | st.integers(1, 64)}),
        },
    )


def _plan_survives(subject: Subject, case: Case) -> None:
    from harness.yaml_text import write_yaml

    plan = subject.parse_plan(write_yaml(case["plan"]))
    text = subject.dump_plan(plan)
    again = subject.parse_plan(text)
    if again != plan:
        raise BrokenLawError("the text of a plan must parse to the same plan, it parses to another")
    if subject.dump_plan(again) != text:
        raise BrokenLawError("the text of a plan must be the same when it is written again, it differs")


_SEEDLINGS = (
    "task: {name: dose}\nspace: [optimizer]\nseeds: [0, 1]\n",
    "task:\n  name: table\n  data: a.csv\n  status: {column: c, values: {low: censored_below}}\n"
    "space:\n  learning_rate: {type: float, low: 1.0e-4, high: 0.1, log: true}\nconfig: {max_epochs: 3}\n"
    "search: {algorithm: tpe, configs: 8, batch: 4, seed: 3}\nhalving: {rungs: [1, 2], eta: 3}\n",
    "task: &t {name: dose}\nspace: [loss_weights]\nconfig: {<<: {max_epochs: 2}, clip_norm: null}\n"
    "ranking: {nan_budget: 1, by: [accepted_error]}\nresources: {cpus_per_trial: 0.5}\npacks: {size: auto}\n",
)
_TOKENS = (
    *"{}[]:,~'\"#é\x00\ufeff\u2028\t\n\U0001f600",
    *(": ", "- ", "  ", "? ", "| ", "> ", "<<: ", "&a ", "*a", "*t", "{a: ", "null: 1", "1: 2", "[" * 6),
    *("!!int ", "!!float x", "!!set ", "!!omap ", "!!binary ", "!!timestamp ", "!!python/object:os.system "),
    *("%YAML 1.1\n---\n", "---\n", "...\n", "null", "true", "yes", ".nan", ".inf", "-.inf", "1e999"),
    *("0x1F", "0o17", "1_000", "2001-99-99", "2001-12-14t21:59:43.10-05:00", "9" * 5000, "-1", "0", "0.5"),
    *("name", "space", "seeds", "config", "search"),
)


@st.composite
def _texts(draw: st.DrawFn) -> dict[str, Any]:
    """Any text, and plans with a few places written over."""
    if draw(st.integers(0, 3)) == 0:
        return {"text": draw(st.text(max_size=60))}
    text = draw(st.sampled_from(_SEEDLINGS))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        cut = draw(st.sampled_from([0, 0, 1, 2, 5, 20]))
        text = text[:at] + draw(st.sampled_from(_TOKENS) | st.text(max_size=3)) + text[at + cut :]
    return {"text": text}


def _text_is_a_plan_or_refused(subject: Subject, case: Case) -> None:
    try:
        plan = subject.parse_plan(case["text"])
    except subject.plan_refusal as refused:
        lines = refused.lines
        if not lines:
            raise BrokenLawError("a refusal must say why, it has no line") from None
        for line in lines:
            if not line.strip() or len(line.splitlines()) != 1:
                raise BrokenLawError(f"a refusal must be lines, got {line!r}") from None
        return
    if subject.parse_plan(subject.dump_plan(plan)) != plan:
        raise BrokenLawError("the text of a plan that was taken must parse to the same plan")


def _flat_configs(subject: Subject) -> SearchStrategy[Case]:
    values: dict[str, SearchStrategy[Any]] = {}
    for name, value in subject.resolve_flat({}).items():
        own = st.just(value)
        if isinstance(value, bool):
            values[name] = own
        elif isinstance(value, float):
            values[name] = own | st.sampled_from([value / 2, value])
        elif isinstance(value, int):
            values[name] = own | st.just(value + 1)
        else:
            values[name] = own
    # Thresholds are in order by being left alone.
    values = {name: held for name, held in values.items() if not name.startswith("tau_")}
    return st.fixed_dictionaries({"flat": st.fixed_dictionaries({}, optional=values)})


def _flat_is_resolved_once(subject: Subject, case: Case) -> None:
    resolved = subject.resolve_flat(case["flat"])
    for name, value in case["flat"].items():
        if first_difference(resolved[name], value) is not None:
            raise BrokenLawError(f"{name} must be kept, {value!r} became {resolved[name]!r}")
    differs = first_difference(subject.resolve_flat(resolved), resolved)
    if differs is not None:
        raise BrokenLawError(f"a resolved config must resolve to itself: {differs}")


PLAN_LAWS: tuple[Property, ...] = (
    library_law(
        "plan_survives_its_text",
        29,
        "The text of a plan parses to the same plan.",
        ("parse_plan", "dump_plan"),
        lambda subject: st.fixed_dictionaries({"plan": _plan_sections()}),
        _plan_survives,
    ),
    library_law(
        "text_is_a_plan_or_refused",
        29,
        "Any text is a plan, or is refused in lines that say why.",
        ("parse_plan", "dump_plan", "plan_refusal"),
        lambda subject: _texts(),
        _text_is_a_plan_or_refused,
    ),
    library_law(
        "flat_config_resolves_once",
        29,
        "A resolved config resolves to itself, and keeps every value that was given.",
        ("resolve_flat",),
        _flat_configs,
        _flat_is_resolved_once,
    ),
)
