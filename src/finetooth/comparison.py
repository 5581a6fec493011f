"""The folder of a `finetooth compare` as one page: the table, learning against forgetting, the sweep, and every run.

The numbers are those of its `compare.json`; the arithmetic is `tally.py`'s. Versions and hashes are read from the folders of the runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetooth import figures, tally
from finetooth.page import Figure, Page, Section, Table, Tile, clock, number, size
from finetooth.record import read_json, sha256

COMPARED = "compare.json"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found, and the environments and files of its runs, by run."""

    folder: Path
    found: Mapping[str, Any]
    environments: Mapping[str, Mapping[str, Any]]
    hashes: Mapping[str, str]

    @property
    def key(self) -> str:
        """What learning is measured by."""
        return tally.quality(self.found["summary"])

    @property
    def front(self) -> list[str]:
        """Who is beaten by nobody in both learning and forgetting."""
        return tally.front(self.found["summary"], self.key)


def read(folder: Path) -> Comparison:
    """The folder of a comparison; ValueError if its compare.json cannot be read."""
    found = read_json(folder / COMPARED, dict)
    names = list(dict.fromkeys(row["run"] for row in found["runs"]))
    known = {name: read_json(folder / "runs" / name / "environment.json", dict) for name in names}
    files = [(name, folder / "runs" / name / file) for name in names for file in ("delta.safetensors", "adapter/adapter_model.safetensors")]  # fmt: skip
    hashes = {name: sha256(path) for name, path in files if path.is_file()}
    return Comparison(folder, found, {name: env for name, env in known.items() if env}, hashes)


def page(compared: Comparison) -> Page:
    """The report of a comparison."""
    found, lines = compared.found, compared.found["summary"]
    recipe, made = found["recipe"], tally.distinct(found["runs"])
    failed = [row for row in made if row["error"]]
    seeds, rates = {row["seed"] for row in found["runs"]}, {row["lr"] for row in found["runs"]}
    title = f"{len(lines)} methods on {recipe['model'].rpartition(':')[2].rpartition('/')[2]}"
    under = f"{compared.folder.resolve().name} · {recipe['data']['train']} · {len(made):,} runs, {len(seeds)} seeds, {len(rates)} learning rates"
    state = f"{len(failed)} of {len(made)} runs failed: see the runs." if failed else ""
    if not lines:
        return Page(title, under, state or "No run has ended.", sections=[_runs(compared)])
    parts = [
        _table(compared),
        _pareto(compared),
        _sweep(compared),
        _runs(compared),
        _recipe(recipe),
        _versions(compared),
    ]
    return Page(title, under, state, _tiles(compared), parts)


def _tiles(compared: Comparison) -> list[Tile]:
    lines, key = [line for line in compared.found["summary"] if line[compared.key] is not None], compared.key
    if not lines:
        return []
    sign = 1 if key in tally.HIGHER else -1
    best = max(lines, key=lambda line: sign * line[key])
    tiles = [Tile(f"best {_words(key)}", best["contender"], f"{_mean(best, key)} at lr {best['lr']:g}")]
    if least := [line for line in lines if line["forgetting"] is not None]:
        mildest = min(least, key=lambda line: line["forgetting"])
        tiles.append(Tile("least forgetting", mildest["contender"], f"{_mean(mildest, 'forgetting')} nats a token"))
    if sized := [line for line in lines if line.get("delta_bytes") is not None]:
        smallest = min(sized, key=lambda line: line["delta_bytes"])
        tiles.append(Tile("smallest on disk", smallest["contender"], size(smallest["delta_bytes"])))
    return tiles


def _table(compared: Comparison) -> Section:
    lines, key = compared.found["summary"], compared.key
    heads = [f"{_words(key)} {'↑' if key in tally.HIGHER else '↓'}", "difference", "forgetting ↓", "difference"]
    head = ["", "runs", "lr", *heads, "changed", "training", "on disk", "state", "peak memory"]
    rows = [
        [_name(compared, line), f"{line['runs']}", f"{line['lr']:g}", *_measures(line, key), *_costs(line)]
        for line in lines
    ]
    said = [
        f"Mean ± standard deviation over seeds, at the learning rate that did best in the sweep. Difference: from {lines[0]['contender']}, "
        "within a seed, with Student's 95 % interval where there is more than one seed.",
        *([f"★ nobody is better in both numbers: {', '.join(compared.front)}."] if compared.front else []),
    ]
    return Section("Table", [*said, *map(_sentence, compared.found["remarks"])], tables=[Table(head, rows)])


def _measures(line: Row, key: str) -> list[str]:
    found = []
    for word in (key, "forgetting"):
        around = line.get(f"{word}_interval")
        off = "" if line.get(f"{word}_difference") is None else number(line[f"{word}_difference"], sign="+")
        found += [_mean(line, word), off if around is None else f"{off} ± {number(around)}"]
    return found


def _costs(line: Row) -> list[str]:
    """What a protocol of one's own does not say is a dash."""
    share = line.get("share")
    sizes = (line.get(k) for k in ("delta_bytes", "state_bytes", "train_peak_bytes"))
    return ["–" if share is None else f"{share:.2%}", clock(line.get("train_seconds")), *map(size, sizes)]


def _pareto(compared: Comparison) -> Section:
    title, key = "Learning against forgetting", compared.key
    lines = [line for line in compared.found["summary"] if None not in (line[key], line["forgetting"])]
    if not lines:
        return Section(title, missing=["not measured: give the recipe a general text (evaluate.forgetting)."])
    points = {
        line["contender"]: (line[key], line["forgetting"], line[f"{key}_sd"] or 0.0, line["forgetting_sd"] or 0.0)
        for line in lines
    }
    unit = "" if key in tally.HIGHER else ", nats a token"
    x, y = f"{_words(key)}{unit}", "forgetting, nats a token"
    drawn = figures.pareto(points, compared.front, x, y, key in tally.HIGHER)
    said = "Right and down is better. Bars are standard deviations over seeds; filled, and joined by the dashed line: nobody is better in both."
    return Section(title, figures=[Figure(drawn, "Pareto front", said, "wide")])


def _sweep(compared: Comparison) -> Section:
    swept = [row for row in compared.found["runs"] if row["stage"] == "sweep" and row.get("task_loss") is not None]
    if len({row["lr"] for row in swept}) < 2:
        return Section(
            "Sweep", missing=["not made: there was one learning rate. Give `finetooth compare` several (--lr)."]
        )
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(swept, key=lambda row: row["lr"]):
        curves.setdefault(row["contender"], []).append((row["lr"], row["task_loss"]))
    losses = [loss for points in curves.values() for _, loss in points]
    start = max(
        (row["task_loss_before"] for row in swept if row.get("task_loss_before") is not None), default=max(losses)
    )
    top, best = max(min(max(losses), start), min(losses)), tally.best(swept)
    edge = 0.05 * (top - min(losses)) or 0.05
    span = (min(losses) - edge, top + edge)
    drawn = [
        Figure(figures.sweep(f"sweep {label}", points, [p for other, p in curves.items() if other != label], best.get(label), "task loss, nats", span), label, size="small")
        for label, points in curves.items()
    ]  # fmt: skip
    said = "The task loss of each at every learning rate, with the first seed; filled: the rate it was given in the end. Grey: the others."
    said += " What did worse than no training at all is cut off." if top < max(losses) else ""
    return Section("Sweep", [said], drawn)


def _runs(compared: Comparison) -> Section:
    rows = tally.distinct(compared.found["runs"])
    key = tally.quality(rows)
    names = ["task_loss", *([key] if key != "task_loss" else []), "forgetting"]
    lines = [
        [row["run"], row["stage"], *(number(row.get(name)) for name in names), clock(row.get("seconds")), row["error"]]
        for row in rows
    ]
    failed = [[row["run"], row["error"]] for row in rows if row["error"]]
    head = ["run", "stage", *map(_words, names), "time", "error"]
    said = ["Each has a folder of its own below `runs/`: `finetooth report` on it shows how it went."]
    tables = [Table(["failed", "why"], failed, text=True)] if failed else []
    return Section("Runs", said, tables=[*tables, Table(head, lines, folded=f"All {len(rows):,} runs")])


def _recipe(recipe: Row) -> Section:
    said = ["What all runs have in common; the method, the learning rate, the seed and the output were each run's own."]
    return Section("Recipe", said, verbatim=yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True))


def _versions(compared: Comparison) -> Section:
    """One column where all runs agree; what differs is said with its runs."""
    known: dict[str, dict[str, list[str]]] = {}
    for name, facts in compared.environments.items():
        for word, value in facts.items():
            known.setdefault(str(word), {}).setdefault(str(value), []).append(name)
    rows = [[word, "; ".join(v if len(values) == 1 else f"{v} ({len(at)} runs)" for v, at in values.items())] for word, values in known.items()]  # fmt: skip
    other = [word for word, values in known.items() if len(values) > 1]
    missing = [f"the runs were not all made alike: they differ in {', '.join(other)}."] if other else []
    hashes = [[name, value] for name, value in compared.hashes.items()]
    rows.append([f"sha256 of {COMPARED}", sha256(compared.folder / COMPARED)])
    return Section("Versions and hashes", missing=missing, tables=[Table([], rows, text=True), Table(["run", "sha256 of the delta or adapter"], hashes, text=True, folded="Hashes of the results")])  # fmt: skip


def _name(compared: Comparison, line: Row) -> str:
    return f"{line['contender']} ★" if line["contender"] in compared.front else str(line["contender"])


def _mean(line: Row, key: str) -> str:
    around = line.get(f"{key}_sd")
    return number(line[key]) if around is None else f"{number(line[key])} ± {number(around)}"


def _words(key: str) -> str:
    return key.replace("_", " ")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
