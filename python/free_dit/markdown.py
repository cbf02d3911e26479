"""Markdown pages: tables, and parts between markers that are generated."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a table, followed by an empty line."""
    headings = list(headings)
    lines = ["| " + " | ".join(row) + " |" for row in (headings, *rows)]
    return [lines[0], "|" + "---|" * len(headings), *lines[1:], ""]


def decimals(values: Iterable[float], digits: int) -> list[str]:
    """Cells with ``digits`` decimals."""
    return [f"{value:.{digits}f}" for value in values]


def filled(text: str, name: str, part: str) -> str:
    """``text`` with ``part`` between its markers ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``.

    Raises:
        ValueError: the text has no such markers.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"page must hold {begin} and {end}")
    return f"{before}{begin}\n{part.strip()}\n{end}{after}"


def fill_page(page: Path, name: str, part: str) -> None:
    """Renew one part of a page, see :func:`filled`.

    Raises:
        ValueError: the page has no such part.
    """
    try:
        page.write_text(filled(page.read_text(), name, part))
    except ValueError as error:
        raise ValueError(f"fill_page: {error}, got {page}") from error
