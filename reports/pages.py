"""What every page has in common: one environment that escapes, one style, a policy that lets nothing out.

A page is a file that needs no other: no script unless it was asked for, no picture, no request, and its
Content-Security-Policy says so with the hashes of what stands in it. Which numbers are shown is decided in
the views (`run_view`, `robustness_view`), where they are drawn in `drawing`, how they look in the templates.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup

from reports.drawing import short
from reports.visible import visible

Rows = Sequence[Mapping[str, Any]]

STYLE_FILE = "page.css"
_TEMPLATES = Path(__file__).with_name("templates")


def render_template(
    name: str,
    *,
    scripts: Sequence[str] = (),
    styles: Sequence[str] = (),
    style_attributes: bool = False,
    **values: Any,
) -> str:
    """The page that a template makes of the values; every text in it is escaped and shown as it is.

    `scripts` are the whole texts of the scripts that may run, `styles` those of further style elements: the
    template finds the policy that allows these, the page's own style and nothing else as `policy`. What a
    script writes into style attributes is not known before; `style_attributes` lets it pass.
    """
    css = (_TEMPLATES / STYLE_FILE).read_text(encoding="utf-8")
    page = (
        make_environment()
        .get_template(name)
        .render(
            css=Markup(css),  # our own file, and hashed as it is
            policy=content_policy([css, *styles], scripts, style_attributes=style_attributes),
            scripts=[Markup(script) for script in scripts],
            **values,
        )
    )
    # What the loops of the templates leave between elements is a tenth of the page. Scripts are hashed as
    # they are, so a page with scripts keeps its lines.
    return page if scripts else "\n".join(line for line in page.split("\n") if line.strip()) + "\n"


def make_environment() -> jinja2.Environment:
    """The package's templates: everything is escaped, unseen characters are spelled, no name is made up."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=visible,
    )
    environment.filters |= {"short": short, "shade": shade, "known": is_known}
    environment.tests["known"] = is_known
    return environment


def content_policy(
    styles: Sequence[str], scripts: Sequence[str] = (), *, style_attributes: bool = False
) -> str:
    """The Content-Security-Policy of a page in which these styles and scripts, and nothing else, count.

    >>> content_policy([])
    "default-src 'none'; base-uri 'none'; form-action 'none'"
    """
    parts = ["default-src 'none'"]
    for name, texts in (("style-src", styles), ("script-src", scripts)):
        if texts:
            parts.append(f"{name} {' '.join(map(source_hash, texts))}")
    if style_attributes:
        parts.append("style-src-attr 'unsafe-inline'")
    return "; ".join([*parts, "base-uri 'none'", "form-action 'none'"])


def source_hash(text: str) -> str:
    """What a policy calls an element with this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def write_page_file(path: Path, page: str) -> None:
    """Replace the file by the page, whole or not at all; a lone surrogate is written as its number."""
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_text(page, encoding="utf-8", errors="backslashreplace")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_part(path: Path) -> tuple[Rows | None, str]:
    """The rows of a file and why there are none, one of which is empty."""
    table, problem = read_table_part(path)
    return (None, problem) if table is None else (table.to_pylist(), "")


def read_table_part(path: Path) -> tuple[pa.Table | None, str]:
    """The table of a file and why there is none, one of which is empty."""
    if not path.is_file():
        return None, f"{path.name} is missing"
    try:
        with pq.ParquetFile(pa.BufferReader(path.read_bytes()), page_checksum_verification=True) as file:
            return file.read(use_threads=False), ""
    except (pa.ArrowException, OSError) as error:
        return None, f"{path.name} cannot be read as Parquet: {' '.join(str(error).split())}"


def read_mapping_part(path: Path) -> tuple[Mapping[str, Any] | None, str]:
    """What a JSON file holds and why there is nothing, one of which is empty."""
    if not path.is_file():
        return None, f"{path.name} is missing"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        return None, f"{path.name} cannot be read as JSON: {' '.join(str(error).split())}"
    return (said, "") if isinstance(said, dict) else (None, f"{path.name} holds no mapping")


def shade(share: float | None) -> int:
    """Which of the shades 0 (all lost) to 10 (all kept) a share has; -1 for none.

    >>> shade(0.0), shade(0.449), shade(1.0), shade(None)
    (0, 4, 10, -1)
    """
    if share is None or not math.isfinite(share):
        return -1
    return min(10, max(0, math.floor(share * 10 + 1e-9)))


def is_known(value: Any) -> bool:
    """Whether there is a finite number."""
    return value is not None and math.isfinite(value)
