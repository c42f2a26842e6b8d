"""A comparison of two runs as sections of text cells, and those for a terminal or as Markdown.

The page (`comparison_page`) shows the same sections, so that no form says what another does not.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from reports.changes import Change
from reports.comparison import Comparison, ConfigPair, Difference, RunFacts, difference_text
from reports.escaping import escape_markdown
from reports.gate_outputs import plain
from reports.text import WIDTH, format_number

MOST_CHARACTERS = 160  # of a value of a plan; JSON has all of it
MOST_CHANGES = 100
GAP = "  "
_SAME_BY = {"config_id": "config_id", "settings_id": "settings", "knobs": "the knobs that both know"}


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, what is said below it, and a table; `right` are the columns of numbers, from 0.

    joint: what stands between the cells of a row in a terminal, where long texts leave no room for columns.
    """

    title: str
    notes: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    right: tuple[int, ...] = ()
    joint: str = ""


def sections_of(told: Comparison, top: int | None = 10) -> list[Section]:
    """Everything that is said beside the summary and its cautions; `top` configs of a kind (None: all)."""
    found = [_runs(told), _differences(told), _endings(told), _ranks(told, top), _lone(told, top)]
    found += [
        _changes("What changed in the plan", told.plan_changes),
        _changes("What changed in versions, code and machine", told.provenance_changes),
        _data(told),
    ]
    return [section for section in found if section.notes or section.rows]


def render_text(told: Comparison, top: int | None = 10) -> str:
    """The comparison for a terminal: at most 120 columns where names and ids leave that room."""
    lines = [*_wrap(told.summary), ""]
    for text in told.cautions:
        lines += _wrap(text, first="note: ", rest="      ")
    for section in sections_of(told, top):
        lines += ["", section.title]
        for note in section.notes:
            lines += _wrap(note, first=GAP, rest=GAP + GAP)
        lines += _table(section)
    return "\n".join(lines) + "\n"


def render_markdown(told: Comparison, top: int | None = 10) -> str:
    """The comparison for a pull request: the summary, notes, and a table for each section."""
    lines = ["### Comparison of two runs", "", escape_markdown(told.summary)]
    if told.cautions:
        lines += ["", *(f"- {escape_markdown(text)}" for text in told.cautions)]
    for section in sections_of(told, top):
        lines += ["", f"#### {escape_markdown(section.title)}"]
        lines += [line for note in section.notes for line in ("", escape_markdown(note))]
        if section.rows:
            rule = ["---:" if place in section.right else "---" for place in range(len(section.head))]
            lines += ["", _row([escape_markdown(text) for text in section.head]), _row(rule)]
            lines += [_row([escape_markdown(text) for text in row]) for row in section.rows]
    return "\n".join(lines) + "\n"


# --- what is said -----------------------------------------------------------------------------------------


def _runs(told: Comparison) -> Section:
    head = ("run", "folder", "task", "configs", "trials", "ended", "seeds", "non-finite")
    rows = tuple((name, *_facts(run)) for name, run in (("A", told.a), ("B", told.b)))
    alike = f" (by {_SAME_BY[told.matched_by]})" if told.common else ""
    note = (
        f"{told.common} configs in both{alike}, {len(told.only_a)} in A alone, {len(told.only_b)} in B "
        f"alone; {told.pairs} pairs of trials, {told.identical} of them identical but for times"
    )
    return Section("The runs", (note,), head, rows, (3, 4, 7))


def _facts(run: RunFacts) -> tuple[str, ...]:
    ended = ", ".join(f"{count} {status}" for status, count in run.statuses.items())
    seeds = run.seeds
    named = ", ".join(map(str, seeds)) if len(seeds) <= 6 else f"{len(seeds)} ({seeds[0]} to {seeds[-1]})"
    return run.path, run.task, str(run.configs), str(run.trials), ended, named, str(run.nan_count)


def _differences(told: Comparison) -> Section:
    if not told.pairs:
        return Section("Differences")
    head = ("metric", "A", "B", "B against A", f"{100 * told.level:.4g}% interval", "seeds", "pairs", "")
    rows = tuple(
        (
            one.metric,
            format_number(one.a),
            format_number(one.b),
            _value(one),
            _interval(one),
            str(one.n),
            str(one.pairs),
            _verdict(one),
        )
        for one in told.differences
    )
    note = (
        "paired by config and seed, averaged over configs within each seed; the interval is over seeds. "
        "A ratio (x) is B / A, anything else B - A."
    )
    return Section("Differences", (note,), head, rows, (1, 2, 3, 4, 5, 6))


def _value(one: Difference) -> str:
    return difference_text(one).partition(" (")[0]


def _interval(one: Difference) -> str:
    return "-" if math.isnan(one.low) else f"{one.low:.4g} to {one.high:.4g}"


def _verdict(one: Difference) -> str:
    advisory = "two sittings" if one.advisory else ""
    return ", ".join(filter(None, (one.verdict, advisory)))


def _endings(told: Comparison) -> Section:
    notes = []
    if told.pairs and (told.nan_a or told.nan_b):
        notes.append(
            f"non-finite values in pairs: {told.nan_a} in A, {told.nan_b} in B; more in B in {told.nan_more} "
            f"pairs, fewer in {told.nan_fewer}"
        )
    rows = tuple(
        (one.a, one.b, str(one.trials), one.example, _short(one.error)) for one in told.status_changes
    )
    if told.pairs and not rows:
        notes.append("every pair of trials ended alike")
    return Section(
        "How trials ended", tuple(notes), ("A", "B", "trials", "such as", "which says"), rows, (2,)
    )


def _ranks(told: Comparison, top: int | None) -> Section:
    if not told.common:
        return Section("Ranks")
    by = f"both ranked by {', '.join(told.ranked_by)}" if told.ranked_by else "both ranked by the same rules"
    notes = [
        f"{by}; Kendall's tau of the {told.common} common configs: {_number(told.tau)} (1 is the same order, "
        f"0 none, -1 the opposite); of the {told.top} best configs of each run {told.top_shared} are the same"
    ]
    if not math.isnan(told.hypervolume_a):
        notes.append(
            "hypervolume over these objectives, within the best and the worst of both runs: "
            f"{told.hypervolume_a:.3f} in A, {told.hypervolume_b:.3f} in B (1 is all of it)"
        )
    shown = told.configs if top is None else told.configs[:top]
    metrics = [one.metric for one in told.differences if one.pairs]
    head = ("config", "rank A", "rank B", "seeds", *metrics)
    rows = tuple(_config(pair, metrics) for pair in shown)
    if told.common > len(shown):
        notes.append(f"the {len(shown)} configs that stand highest in either run, of {told.common}")
    return Section("Ranks", tuple(notes), head, rows, tuple(range(1, len(head))))


def _config(pair: ConfigPair, metrics: Sequence[str]) -> tuple[str, ...]:
    name = pair.config_a if pair.config_a == pair.config_b else f"{pair.config_a} / {pair.config_b}"
    values = {one.metric: one for one in pair.differences}
    ranks = [f"{rank} (out)" if why else str(rank) for rank, why in _standings(pair)]
    return (name, *ranks, str(pair.seeds), *(_marked(values[metric]) for metric in metrics))


def _standings(pair: ConfigPair) -> tuple[tuple[int, str], tuple[int, str]]:
    return (pair.rank_a, pair.why_a), (pair.rank_b, pair.why_b)


def _marked(one: Difference) -> str:
    """The difference, with an asterisk where its interval leaves no room for none."""
    return _value(one) + ("*" if one.verdict else "")


def _lone(told: Comparison, top: int | None) -> Section:
    rows = []
    for run, configs in (("A", told.only_a), ("B", told.only_b)):
        shown = configs if top is None else configs[:top]
        more = f" and {len(configs) - len(shown)} more" if len(configs) > len(shown) else ""
        if configs:
            rows.append((run, ", ".join(shown) + more))
    return Section("Configs of one run alone", (), ("run", "configs, best first"), tuple(rows), joint=", ")


def _changes(title: str, changes: Sequence[Change]) -> Section:
    rows = tuple((change.key, *map(_short, change.texts())) for change in changes[:MOST_CHANGES])
    more = len(changes) - len(rows)
    notes = (f"{more} more are in the JSON form",) if more else ()
    return Section(title, notes, ("key", "A", "B"), rows, joint=" -> ")


def _data(told: Comparison) -> Section:
    if told.same_data:
        return Section("Data", ("the data of every common seed are the same, by digest",))
    rows = tuple((str(one.seed), one.a[:16], one.b[:16]) for one in told.data_changes[:MOST_CHANGES])
    return Section("Data", (), ("seed", "digest in A", "digest in B"), rows, (0,))


def _short(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


# --- how it is set ----------------------------------------------------------------------------------------


def _table(section: Section) -> list[str]:
    if not section.rows:
        return []
    if section.joint:
        texts = (f"{row[0]}: {section.joint.join(row[1:])}" for row in section.rows)
        return [line for text in texts for line in _wrap(text, first=GAP, rest=GAP * 3)]
    cells = [[plain(text) for text in row] for row in (section.head, *section.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        (
            GAP
            + GAP.join(
                text.rjust(width) if place in section.right else text.ljust(width)
                for place, (text, width) in enumerate(zip(row, widths, strict=True))
            )
        ).rstrip()
        for row in cells
    ]


def _wrap(text: str, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(
        plain(text),
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
