"""What pages link to outside docs/ comes along: CONTRIBUTING, the examples' page, rows of benchmarks; and doctests are code.

Pages are read in the repository too, where `../CONTRIBUTING.md` is right. On the site each such file lies under `repository/`,
as a page where it is one, and the link is turned to it. The README is the front page. A link to a folder stays as it is, and
ends a strict build. The alternative, addresses of a hosted repository, would tie a page to one host and one branch.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent
DOCS = ROOT / "docs"
DOCTEST = re.compile(r"^>>> .*?(?=\n\n|\Z)", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add what pages point to, and what those point to in turn."""
    pages = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    while pages:
        page = pages.pop()
        for _, file in targets(page.read_text(encoding="utf-8"), page):
            if files.get_file_from_path(place(file)) is None:
                files.append(File.generated(config, place(file), abs_src_path=str(file)))
                if file.suffix == ".md":
                    pages.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn each link to where its file is on the site."""
    here = Path(page.file.abs_src_path)
    found = {
        given: posixpath.relpath(place(file), posixpath.dirname(page.file.src_uri))
        for given, file in targets(markdown, here)
    }
    return LINK.sub(lambda match: found.get(match[1], match[1]), markdown)


def targets(markdown: str, page: Path) -> Iterator[tuple[str, Path]]:
    """The links to files of the repository: as they are written, and the files."""
    for given in set(LINK.findall(markdown)):
        file = (page.parent / given).resolve()
        if "://" not in given and file.is_file() and file.is_relative_to(ROOT):
            yield given, file


def place(file: Path) -> str:
    """Where a file of the repository is on the site.

    >>> place(ROOT / "README.md"), place(DOCS / "plan.md"), place(ROOT / "examples/README.md")
    ('index.md', 'plan.md', 'repository/examples/README.md')
    """
    if file == ROOT / "README.md":
        return "index.md"
    if file.is_relative_to(DOCS):
        return file.relative_to(DOCS).as_posix()
    return f"repository/{file.relative_to(ROOT).as_posix()}"


class Doctests(griffe.Extension):
    """Doctests that stand bare in a docstring are blocks of code, as in an `Examples:` section."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Put a fence around each."""
        if obj.docstring is not None:
            obj.docstring.value = DOCTEST.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
