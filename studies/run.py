"""A question of the study: its comparisons, one `finetooth compare` each, then its tables and figures.

    python studies/run.py 1 --data ../shared/data --base runs/base/model               # call it again to go on
    python studies/run.py 1 --data ../shared/data --base runs/base/model --dry         # commands, and how many runs they are
    python studies/run.py 1 --data ../shared/data --base embedded:stories260K --size try

A question is a YAML file in this folder. `sizes.yaml` says how large a study is, `tasks.py` what the data are.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from figures import draw
from tasks import prepare

from finetooth import embedded
from finetooth.contest import contenders
from finetooth.recipe import MethodPart

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Comparison:
    """One `finetooth compare`."""

    part: str
    recipe: str
    command: list[str]
    contenders: int
    alone: bool  # its times are an answer

    def runs(self, size: dict[str, Any]) -> tuple[int, int]:
        """The least and the most: a best rate at an end is followed."""
        rates = len(size["rates"])
        swept, finals = self.contenders * rates * (rates > 1), self.contenders * size["seeds"]
        return swept + finals, swept + finals + self.contenders * size["widen"]


def comparisons(
    question: Path, size: dict[str, Any], out: Path, only: set[str], named: set[str]
) -> Iterator[Comparison]:
    """Every part on every recipe of it, or those that are asked for."""
    for name, part in yaml.safe_load(question.read_text(encoding="utf-8"))["parts"].items():
        methods = [m for m in part["methods"] if not named or {m, m.split(":")[0]} & named]
        methods = [m.replace("TENTH", str(max(1, size["steps"] // 10))) for m in methods]
        keep = part.get("keep", [])[: size.get("budgets")]
        found = contenders(methods, keep, MethodPart())
        rates = part.get("rates", size["rates"])[: len(size["rates"])]
        for recipe in part["recipes"]:
            if not methods or (only and not {recipe, name, f"{name}/{recipe}"} & only):
                continue
            changes = [*size["set"], f"train.max_steps={size['steps']}", *part.get("set", [])]
            words = ["compare", str(HERE / "recipes" / f"{recipe}.yaml"), *changes]
            words += ["--methods", ",".join(methods), "--lr", ",".join(f"{rate:g}" for rate in rates)]
            words += ["--keep", ",".join(f"{share:g}" for share in keep)] if keep else []
            words += ["--seeds", str(size["seeds"])]
            if len(rates) > 1:
                task = "banking77" if recipe == "sequence" else recipe
                words += ["--widen", str(size["widen"]), "--select", str(out / "data" / task / "select.jsonl")]
            words += ["--runner", str(HERE / part["runner"])] if "runner" in part else []
            words += ["--out", str(out / question.stem / name / recipe)]
            yield Comparison(name, recipe, words, len(found), part.get("alone", False))


def finetooth(words: list[str]) -> int:
    typer.echo(f"finetooth {shlex.join(words)}", err=True)
    return subprocess.run([sys.executable, "-m", "finetooth", *words], stdout=sys.stderr, check=False).returncode


def main(
    number: Annotated[int, typer.Argument(help="1 to 6: the question.")],
    data: Annotated[Path, typer.Option(help="The folder with tasks/, preferences/ and lm/.")],
    base: Annotated[str, typer.Option(help="The pretrained model.")],
    size: Annotated[str, typer.Option(help="try, small or full; see sizes.yaml.")] = "small",
    only: Annotated[str, typer.Option(help="Recipes, parts or PART/RECIPE, with commas, if not all.")] = "",
    methods: Annotated[str, typer.Option(help="Methods, with commas, if not all.")] = "",
    out: Path = Path("runs/study"),
    jobs: Annotated[int, typer.Option(help="Runs at a time, where their times are no answer.")] = 2,
    threads: Annotated[int, typer.Option(help="CPU threads of each.")] = 1,
    dry: Annotated[bool, typer.Option("--dry", help="Only say what would be run.")] = False,
) -> None:
    """Run what is missing of a question, and put it together."""
    question, how = next(HERE.glob(f"{number}-*.yaml")), yaml.safe_load((HERE / "sizes.yaml").read_text())[size]
    out = out.resolve() / size
    chosen, named = ({name for name in text.split(",") if name} for text in (only, methods))
    wanted = list(comparisons(question, how, out, chosen, named))
    if not wanted:
        raise typer.BadParameter("nothing of this question is left.")
    least, most = (sum(counts) for counts in zip(*(c.runs(how) for c in wanted), strict=True))
    typer.echo(f"{len(wanted)} comparisons, {least} to {most} runs of {how['steps']} steps", err=True)
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
    if any(c.recipe == "preferences" for c in wanted) and not (start / "merged" / "tokenizer.json").is_file():
        resume = ["--resume"] if (start / "recipe.yaml").is_file() else []
        changes = [*how["set"], f"train.max_steps={how['steps']}", f"output={start}"]
        if finetooth(["train", str(HERE / "recipes" / "gsm8k.yaml"), *changes, *resume]):
            raise typer.Exit(1)
    codes = [
        finetooth([*c.command, "--jobs", "1" if c.alone else str(jobs), "--threads", str(threads)]) for c in wanted
    ]
    typer.echo(json.dumps(draw(question, out / question.stem), indent=1))
    raise typer.Exit(max(codes))


def _whole(base: str) -> str:
    if base.startswith(embedded.PREFIX):
        return str(embedded.path(base))
    return str(Path(base).resolve()) if Path(base).is_dir() else base


if __name__ == "__main__":
    typer.run(main)
