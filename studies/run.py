"""The study: parts of its pool, one `finetooth compare` for each recipe of a part, then the tables and figures of all questions.

    python studies/run.py --data ../shared/data                     # all; call it again to go on
    python studies/run.py --data ../shared/data --only core,time    # parts, recipes or PART/RECIPE
    python studies/run.py --data ../shared/data --dry               # commands, and how many runs they are
    python studies/run.py --data ../shared/data --base embedded:stories260K --size try

`pool.yaml` says what is trained, `questions.yaml` what is read from it, `sizes.yaml` how large a study is, `tasks.py` what the data are.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from figures import HERE, draw, source, tenth
from tasks import prepare

from finetooth import embedded


@dataclass(frozen=True)
class Comparison:
    """One `finetooth compare`."""

    part: str
    recipe: str
    command: list[str]
    contenders: int
    rates: int
    alone: bool  # its times are an answer

    def runs(self, size: Mapping[str, Any]) -> tuple[int, int]:
        """The least and the most: a best rate at an end is followed."""
        swept = self.contenders * self.rates * (self.rates > 1)
        finals = self.contenders * size["seeds"]
        return swept + finals, swept + finals + self.contenders * size["widen"] * (self.rates > 1)


def comparisons(pool: Mapping[str, Any], size: Mapping[str, Any], out: Path, only: set[str]) -> Iterator[Comparison]:
    """Every part on every recipe of it, or those that are asked for."""
    for part, made in tenth(size["steps"], pool).items():
        rates = made.get("rates", size["rates"])[: len(size["rates"])]
        for recipe in made["recipes"]:
            if only and not {recipe, part, f"{part}/{recipe}"} & only:
                continue
            changes = [*size["set"], f"train.max_steps={size['steps']}", *made.get("set", [])]
            words = ["compare", str(HERE / "recipes" / f"{recipe}.yaml"), *changes]
            words += ["--methods", ",".join(made["methods"]), "--lr", ",".join(f"{rate:g}" for rate in rates)]
            words += ["--seeds", str(size["seeds"])]
            if len(rates) > 1:
                task = "banking77" if recipe == "sequence" else recipe
                words += ["--widen", str(size["widen"]), "--select", str(out / "data" / task / "select.jsonl")]
            words += ["--runner", str(HERE / made["runner"])] if "runner" in made else []
            words += ["--out", str(out / part / recipe)]
            yield Comparison(part, recipe, words, len(made["methods"]), len(rates), made.get("alone", False))


def finetooth(words: list[str]) -> int:
    typer.echo(f"finetooth {shlex.join(words)}", err=True)
    return subprocess.run([sys.executable, "-m", "finetooth", *words], stdout=sys.stderr, check=False).returncode


def main(
    data: Annotated[Path, typer.Option(help="The folder with tasks/, preferences/ and lm/.")],
    base: Annotated[str, typer.Option(help="The pretrained model.")] = str(HERE / "base" / "model"),
    size: Annotated[str, typer.Option(help="try, small or full; see sizes.yaml.")] = "small",
    only: Annotated[str, typer.Option(help="Parts, recipes or PART/RECIPE, with commas, if not all.")] = "",
    out: Path = Path("runs/study"),
    jobs: Annotated[int, typer.Option(help="Runs at a time, where their times are no answer.")] = 2,
    threads: Annotated[int, typer.Option(help="CPU threads of each.")] = 1,
    dry: Annotated[bool, typer.Option("--dry", help="Only say what would be run.")] = False,
) -> None:
    """Run what is missing, and put it together after every comparison."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what `finetooth` waits for is ended too
    pool, sizes = source("pool"), source("sizes")
    if size not in sizes:
        raise typer.BadParameter(f"there is no size {size!r}: {', '.join(sizes)}.")
    how, out = sizes[size], out.resolve() / size
    chosen = {name for name in only.split(",") if name}
    if unknown := chosen - {n for p, made in pool.items() for r in made["recipes"] for n in (p, r, f"{p}/{r}")}:
        raise typer.BadParameter(f"--only: {min(unknown)!r} is no part, recipe or PART/RECIPE of pool.yaml.")
    wanted = list(comparisons(pool, how, out, chosen))
    least, most = (sum(counts) for counts in zip(*(c.runs(how) for c in wanted), strict=True))
    typer.echo(f"{len(wanted)} comparisons, {least:,} to {most:,} runs of {how['steps']} steps", err=True)
    if dry:
        for c in wanted:
            typer.echo(f"finetooth {shlex.join(c.command)}")
        return
    prepare(data, out / "data", how["select"], how["general"], _whole(base))
    start = out / "gsm8k"
    os.environ |= {
        "FINETOOTH_BASE": _whole(base),
        "FINETOOTH_STUDY": str(out / "data"),
        "FINETOOTH_SFT": str(start / "merged"),
    }
    code = 0
    for c in wanted:
        if c.recipe == "preferences" and not (start / "merged" / "tokenizer.json").is_file():
            resume = ["--resume"] if (start / "recipe.yaml").is_file() else []
            changes = [*how["set"], f"train.max_steps={how['steps']}", f"output={start}"]
            if finetooth(["train", str(HERE / "recipes" / "gsm8k.yaml"), *changes, *resume]):
                raise typer.Exit(1)
        code |= finetooth([*c.command, "--jobs", "1" if c.alone else str(jobs), "--threads", str(threads)])
        written = draw(out)
    typer.echo("\n".join(written))
    raise typer.Exit(code)


def _whole(base: str) -> str:
    if base.startswith(embedded.PREFIX):
        return str(embedded.path(base))
    return str(Path(base).resolve()) if Path(base).is_dir() else base


if __name__ == "__main__":
    typer.run(main)
