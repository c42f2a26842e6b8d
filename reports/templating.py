"""How a page is made of a template: everything escaped, the one style sheet inlined and named by its hash."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from reports.drawing import short

_TEMPLATES = Path(__file__).with_name("templates")


def render_template(
    name: str, values: Mapping[str, Any], *, filters: Mapping[str, Callable[..., Any]] | None = None
) -> str:
    """The page of a template of this folder, which finds `css` and `style_hash` beside `values`.

    Filters `short` and `known`, the test `known`, and `filters`. A name that the template uses and `values`
    lacks is an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "known": known, **(filters or {})}
    environment.tests["known"] = known
    css = (_TEMPLATES / "page.css").read_text(encoding="utf-8")
    page = environment.get_template(name).render(
        **values,
        css=Markup(css),  # our own file, and hashed as it is
        style_hash=base64.b64encode(hashlib.sha256(css.encode()).digest()).decode(),
    )
    # What the loops of the templates leave between elements is a tenth of the page.
    return "\n".join(line for line in page.split("\n") if line.strip()) + "\n"


def known(value: float | None) -> bool:
    """Whether there is a finite number."""
    return value is not None and math.isfinite(value)
