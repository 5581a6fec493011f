"""The progress of a comparison: contenders down, learning rates and seeds across; lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

Key = tuple[str, str, float, int]  # contender, stage, learning rate, seed
_WORDS = {"waits": "·", "runs": "runs", "failed": "failed", "ended": "done"}


class Board:
    """What has become of every run, as a table; `note` may be called from several threads."""

    def __init__(self) -> None:
        self.cells: dict[Key, str] = {}
        self.ended = 0
        self._started, self._lock = time.monotonic(), Lock()

    def note(self, entry: Any, stage: str, state: str, loss: float | None) -> str:
        """Keep it, and say it in a line."""
        shown = _WORDS[state] if loss is None else f"{loss:.3f}"
        if entry is None:
            return f"the base is measured: {_WORDS[state]}"
        with self._lock:
            self.cells[entry.contender.label, stage, entry.lr, entry.seed] = shown
            self.ended += state in ("ended", "failed")
        said = f"{stage} {entry.contender.label} lr {entry.lr:g} seed {entry.seed}: {shown}"
        return f"{self.ended} of {len(self.cells)}  {said}"

    def __rich__(self) -> Table:
        with self._lock:
            cells = dict(self.cells)
        seconds = int(time.monotonic() - self._started)
        title = f"{self.ended} of {len(cells)} runs, {seconds // 60}:{seconds % 60:02}. Task loss by learning rate, then by seed"
        table = Table(title=title, title_justify="left")
        rates = sorted({lr for _, stage, lr, _ in cells if stage == "sweep"})
        seeds = sorted({seed for _, stage, _, seed in cells if stage == "final"})
        for head in ("", *(f"{lr:g}" for lr in rates), "best", *(f"seed {seed}" for seed in seeds)):
            table.add_column(head, justify="right" if head else "left")
        for label in dict.fromkeys(key[0] for key in cells):
            own = {key[1:]: text for key, text in cells.items() if key[0] == label}
            swept = [next((t for (s, x, _), t in own.items() if (s, x) == ("sweep", lr)), "") for lr in rates]
            best = next((f"{x:g}" for s, x, _ in own if s == "final"), "")
            finals = [next((t for (s, _, n), t in own.items() if (s, n) == ("final", seed)), "") for seed in seeds]
            table.add_row(Text(label), *swept, best, *finals)
        return table


@contextmanager
def board() -> Iterator[Callable[[Any, str, str, float | None], None]]:
    """A table on stderr that follows the runs; where stderr is a file, a line for each that begins or ends."""
    found, console = Board(), Console(stderr=True)
    if not console.is_terminal:

        def say(entry: Any, stage: str, state: str, loss: float | None) -> None:
            line = found.note(entry, stage, state, loss)
            if state != "waits":
                typer.echo(line, err=True)

        yield say
        return
    with Live(found, console=console, refresh_per_second=1):
        yield lambda entry, stage, state, loss: (found.note(entry, stage, state, loss), None)[1]
