"""Measured tables in a document: between two marks, so that what stands around them is written by hand."""

from __future__ import annotations

from pathlib import Path

MARKS = ("<!-- measured -->", "<!-- end -->")


def write_between_marks(text: str, path: Path) -> None:
    """Put the text between the marks of the file, or write it alone where there is no file or no marks."""
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(put_between_marks(text, page), encoding="utf-8")


def put_between_marks(text: str, page: str) -> str:
    """Return the page with `text` between its marks, or the text alone where the page has none."""
    first, last = MARKS
    if first not in page or last not in page:
        return text
    before, _, rest = page.partition(first)
    return f"{before}{first}\n\n{text}\n{last}{rest.partition(last)[2]}"
