"""A report as a page: what it may hold, and one template that shows it.

The page is one file. It fetches nothing and runs nothing, and says so to the browser (a content security policy); every text is
escaped by the template (jinja2, autoescape), and figures alone are put in as they are: `figures.py` makes them, and matplotlib
escapes the names in them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

LONGEST = 1_500  # characters of a text that are shown


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names them, the others are numbers unless `text` is set."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: bool = False
    folded: str = ""  # a title to unfold it by


@dataclass(frozen=True)
class Figure:
    """An SVG of `figures.py`, its title, and what a reader must know of it."""

    svg: str
    title: str
    said: str = ""
    size: str = "panel"  # panel, small or wide
    under: Table | None = None

    @property
    def safe(self) -> Markup:
        """The SVG as it is."""
        return Markup(self.svg)  # of figures.py, where text is escaped


@dataclass(frozen=True)
class Section:
    """A part of the page; `missing` says what is not there, and how to get it."""

    title: str
    said: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    missing: Sequence[str] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    verbatim: str = ""
    beside: bool = False  # tables beside the figures, not below them

    @property
    def anchor(self) -> str:
        """Where a link leads."""
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Tile:
    """One of the numbers that the page begins with."""

    title: str
    value: str
    said: str = ""


@dataclass(frozen=True)
class Page:
    """All of a report."""

    title: str
    under: str
    state: str = ""  # what is wrong with all of it, such as that it has no end
    tiles: Sequence[Tile] = ()
    sections: Sequence[Section] = field(default_factory=list)

    def html(self) -> str:
        """The page; the same for the same page."""
        return _template().render(page=self)


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("finetooth", "pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"short": short, "coded": coded}
    return environment.get_template("report.html")


def short(text: str) -> str:
    """A text as far as it is shown.

    >>> short("a")
    'a'
    """
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text):,} characters in all)"


def coded(text: str) -> Markup:
    """A text as HTML, what stands between backticks as code.

    >>> coded("<a> is `b`")
    Markup('&lt;a&gt; is <code>b</code>')
    """
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def number(value: float | None, digits: int = 3, sign: str = "") -> str:
    """A number, or a dash for what was not measured.

    >>> number(1.23456), number(0.5, 1, "+"), number(None)
    ('1.235', '+0.5', '–')
    """
    return "–" if value is None else f"{value:{sign}.{digits}f}".replace("-", "−")


def size(n: float | None) -> str:
    """Bytes as a person says them, in powers of ten.

    >>> size(999), size(1_014_926), size(5.5e10), size(None)
    ('999 bytes', '1.01 MB', '55.0 GB', '–')
    """
    if n is None:
        return "–"
    if n < 1000:
        return f"{n:.0f} bytes"
    power = min(int(math.log10(n)) // 3, 4)
    value = n / 1000**power
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {('', 'kB', 'MB', 'GB', 'TB')[power]}"


def clock(seconds: float | None) -> str:
    """Seconds as a person says them.

    >>> clock(12.34), clock(182.9), clock(7300), clock(None)
    ('12 s', '3 min 3 s', '2 h 1 min', '–')
    """
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
