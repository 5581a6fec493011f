"""A report on a folder, whatever is in it: found, put together, written whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import UndefinedError

from finetooth import comparison, figures, record, report
from finetooth.page import Page
from finetooth.run import write_text

NAME = "report.html"


def write(folder: Path, out: Path | None = None) -> dict[str, Any]:
    """Write the report on a run's or a comparison's folder; where it is, its size, and what it could not show.

    The same folder gives the same bytes. Raises ValueError for a folder that is neither, or has a file that is not what Finetooth writes.
    """
    figures.require()
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: give one that `finetooth train` or `finetooth compare` wrote.")
    target = folder / NAME if out is None else out
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"--out {target}: give a file in a folder that exists.")
    page, html = _page(folder)
    write_text(target, html)
    missing = [text for section in page.sections for text in section.missing]
    return {"report": str(target), "title": page.title, "bytes": target.stat().st_size, "missing": missing}


def _page(folder: Path) -> tuple[Page, str]:
    compared = (folder / comparison.COMPARED).is_file()
    if not compared and not (folder / "recipe.yaml").is_file():
        raise ValueError(
            f"{folder} is neither a run nor a comparison: it holds no recipe.yaml and no {comparison.COMPARED}."
        )
    try:
        page = comparison.page(comparison.read(folder)) if compared else report.page(record.read(folder))
        return page, page.html()
    except (KeyError, TypeError, AttributeError, IndexError, ArithmeticError, UndefinedError) as error:
        raise ValueError(
            f"a file of {folder} has another form than Finetooth writes ({type(error).__name__}: {error}): was it changed by hand?"
        ) from error
