"""The model and the data that ship with the package, by short names: `embedded:stories260K`.

They make `finetooth demo` run offline. Licences and sources: LICENSES.md beside this file.
"""

from __future__ import annotations

from pathlib import Path

from finetooth.nearest import hint

PREFIX = "embedded:"
FILES = {
    "stories260K": "models/stories260K",
    "banking77/train": "tasks/banking77/train.jsonl.gz",
    "banking77/test": "tasks/banking77/test.jsonl.gz",
    "tinystories": "lm/tinystories.valid.txt.xz",
}


def path(name: str) -> Path:
    """Where an embedded part lies, with or without its prefix; ValueError names what there is.

    >>> path("embedded:banking77/test").name
    'test.jsonl.gz'
    """
    short = name.removeprefix(PREFIX)
    if short not in FILES:
        raise ValueError(
            f"there is no {PREFIX}{short}: the package has {', '.join(PREFIX + known for known in FILES)}.{hint(short, FILES)}"
        )
    return Path(__file__).parent / FILES[short]
