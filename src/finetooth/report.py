"""A run folder as one page: how it learnt, what it chose and changed, what it cost, what it forgot, and what it was made of.

Everything on the page comes from the folder; what the folder lacks is said where it would stand. `finetooth compare`'s folders are
`contrasted.py`'s.

Not covered: following a run that is going on. The page is made anew by the same command.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetooth import embedded, figures, tally
from finetooth.methods import METHODS
from finetooth.page import Figure, Page, Section, Table, Tile, clock, number, size
from finetooth.record import Record, Tensors

EARLIER = (
    "not recorded: the run was made by an earlier Finetooth, and has to be trained again to have it, "
    "or its weights were sharded (FSDP2), where selections are not noted."
)
UNFINISHED = "not there yet: the run has not come to its end. Go on with `finetooth train RECIPE.yaml --resume`."


def page(run: Record) -> Page:
    """The report of a run."""
    name, results = run.recipe.method.name, run.results
    base = Path(run.recipe.model.removeprefix(embedded.PREFIX)).name
    row = METHODS.get(name)
    last = run.steps[-1]["step"] if run.steps else 0
    state = "" if results is not None else f"This run has no end: what is here is what it left at step {last:,}."
    under = f"{run.folder.resolve().name} · {row.paper if row else name} · {last:,} optimizer steps"
    sections = [_quality(run), _learning(run), _gradients(run), _selection(run), _changed(run), _resources(run)]
    return Page(
        f"{base}, fine-tuned with {name}",
        under,
        state,
        _tiles(run),
        [*sections, _samples(run), _recipe(run), _made_of(run)],
    )


def _tiles(run: Record) -> list[Tile]:
    """What there is of the numbers that matter; a comparison's outsiders and protocols of one's own say less."""
    found = run.results
    if found is None:
        return []
    tiles, key, forgotten = list[Tile](), tally.quality([found["after"]]), found["forgetting"]
    if key in found["after"]:
        value = f"{number(found['before'].get(key))} → {number(found['after'][key])}"
        tiles.append(Tile(_words(key), value, _better(key)))
    if forgotten is not None:
        said = "nats a token on the general text, less is better"
        tiles.append(Tile("forgetting", number(forgotten, sign="+"), said))
    if "changed" in found:
        changed, stored = found["changed"], found["delta_bytes"]
        tiles.append(Tile("weights changed", f"{found['share']:.2%}", f"{changed:,} of {found['weights']:,}"))
        tiles.append(Tile("delta on disk", size(stored), f"{stored / max(changed, 1):.2f} bytes a changed weight"))
    if "seconds" in found:
        known = "loading and evaluation included"
        said = known if found["seconds"] is not None else "not known of a run that was resumed"
        tiles.append(Tile("time", clock(found["seconds"]), said))
    peak = found.get("train_peak_bytes") or found.get("peak_bytes") or {}
    if held := peak.get("gpu", peak.get("host")):
        tiles.append(Tile("peak memory", size(held), "of the GPU" if "gpu" in peak else "of the process"))
    return tiles


def _quality(run: Record) -> Section:
    title = "Quality and forgetting"
    if run.results is None:
        return Section(title, missing=[UNFINISHED])
    before, after, forgotten = (run.results[k] for k in ("before", "after", "forgetting"))
    rows = [
        [_headed(key), number(before.get(key)), number(after[key]), _difference(before.get(key), after[key])]
        for key in after
    ]
    said = ["Losses are mean token cross-entropies in nats. ↑ more is better, ↓ less."] if rows else []
    missing = [] if rows else ["not measured: the recipe has no data.eval with an evaluate.task."]
    if forgotten is None:
        missing.append("forgetting was not measured: give the recipe a general text (evaluate.forgetting).")
    else:
        said.append(
            "Forgetting is how much the loss on the general text, which the model was not tuned for, has grown."
        )
        rows.append(["forgetting ↓", "", "", number(forgotten, sign="+")])
    return Section(
        title, said, tables=[Table(["", "before", "after", "change"], rows)] if rows else [], missing=missing
    )


def _learning(run: Record) -> Section:
    steps = run.steps
    if not steps:
        why = "the run has not come to its first line" if run.results is None else "there is no metrics.jsonl"
        return Section("Learning", missing=[f"no step was logged: {why}."])
    loss, rate = _curve(steps, "loss"), _curve(steps, "learning_rate")
    drawn = [
        Figure(figures.lines("loss", {"loss": loss}, "optimizer step", "nats a token", bottom=0), "Training loss", "Mean over the steps since the point before."),
        Figure(figures.lines("rate", {"lr": rate}, "optimizer step", "learning rate", bottom=0), "Learning rate", "The rate that the step was made with."),
    ]  # fmt: skip
    return Section("Learning", figures=drawn)


def _gradients(run: Record) -> Section:
    steps, limit = run.steps, run.recipe.optimizer.max_grad_norm
    said, missing, drawn = list[str](), list[str](), list[Figure]()
    norms = [(x, y) for x, y in _curve(steps, "grad_norm") if y > 0]
    if norms:
        level = (limit, f"clipped above {limit:g}") if limit else None
        drawn.append(Figure(figures.lines("norm", {"norm": norms}, "optimizer step", "2-norm", log=True, level=level), "Gradient norm", "Before clipping, of the gradients that the step uses."))  # fmt: skip
    clipped = _curve(steps, "clipped_steps")
    if not limit:
        missing.append("nothing was clipped: the recipe has optimizer.max_grad_norm: 0.")
    elif clipped:
        shares = [
            (b, (m - n) / (b - a)) for (a, n), (b, m) in zip([(0.0, 0.0), *clipped], clipped, strict=False) if b > a
        ]
        drawn.append(Figure(figures.lines("clipped", {"clipped": shares}, "optimizer step", "steps clipped", percent=True, bottom=-0.03, top=1.03), "Clip rate", f"Share of the steps since the point before; {clipped[-1][1]:,.0f} of {clipped[-1][0]:,.0f} steps in all."))  # fmt: skip
    elif steps:
        missing.append(f"the clip rate is {_absent(run)}")
    if steps and steps[-1].get("skipped_steps"):
        said.append(f"{steps[-1]['skipped_steps']:,} steps had a gradient that was not finite, and wrote nothing.")
    return Section("Gradients", said, drawn, missing=missing)


def _selection(run: Record) -> Section:
    chosen, moved = run.chosen(), [line for line in run.selection if "kept" in line]
    if chosen is None:
        why = _absent(run) if run.results or run.steps else "not known: nothing had been chosen yet."
        return Section("Selection", missing=[f"which weights were chosen is {why}"])
    lines, first = len(run.selection), run.selection[0]["step"]
    often = (
        f"Mean over {lines:,} looks, one with every line of the log." if lines > 1 else f"As it was at step {first:,}."
    )
    said = [
        f"{chosen.share:.2%} of the weights that take part were chosen. What takes no part is frozen and not counted here."
    ]
    drawn = _map("chosen", "Chosen, % of the entries", often, chosen)
    if moved:
        kept = {"kept": [(float(first), 1.0), *_curve(moved, "kept")], "left": _curve(moved, "left")}
        chance = run.chance()
        level = None if chance is None else (chance, "kept by chance")
        drawn.append(Figure(figures.lines("moved", kept, "optimizer step", "share of what was chosen", percent=True, bottom=-0.03, top=1.03, level=level), "How the selection moved", "kept: of the first selection, what is chosen now. left: of what was chosen at the point before, what is not now. Of a sample of each tensor; good to about 1 %."))  # fmt: skip
    elif "first" in run.selection[0]:
        said.append("There was one look only: nothing can be said of how it moved.")
    else:
        said.append("It was made once, and did not move.")
    return Section("Selection", said, drawn)


def _map(salt: str, title: str, said: str, tensors: Tensors) -> list[Figure]:
    """A heat map of the blocks, and below it what lies outside them."""
    inside = tensors.blocks()
    if not inside.of:
        return []
    rows, columns, shares = inside.cells()
    rest = [[name, f"{share:.2%}", f"{of:,}"] for name, share, of in tensors.outside()]
    under = Table(["outside the blocks", "share", "entries"], rest) if rest else None
    return [Figure(figures.heat(salt, rows, columns, shares), title, f"Layer by kind of matrix. {said}", under=under)]


def _changed(run: Record) -> Section:
    title, changed, delta = "Weights changed", run.changed(), run.delta
    if changed is None or delta is None:
        return Section(
            title, missing=[UNFINISHED if run.results is None else "there is no delta.safetensors in the folder."]
        )
    info = delta.info()
    kinds = sorted({str(change.kind[1]).removeprefix("torch.") for change in delta.changes.values()})
    reverted = (run.results or {}).get("reverted")
    facts = [
        ["changed", f"{info['changed']:,} of {info['weights']:,} ({info['share'] or 0:.2%})"],
        ["held in", ", ".join(kinds)],
        ["counted", "an entry whose bits differ from the base's; the tolerance is none"],
        ["tensors with a change", f"{info['tensors']:,}"],
        ["stored as", ", ".join(f"{unit} in {n:,}" for unit, n in sorted(info["units"].items()))],
        [
            "taken off again",
            "not tried" if reverted is None else "the base, bit for bit" if reverted else "NOT the base",
        ],
    ]
    said = "Of the delta: what differs from the base in the end."
    drawn = _map("changed", "Changed, % of the entries", said, changed)
    return Section(title, figures=drawn, tables=[Table([], facts, text=True)], beside=True)


def _resources(run: Record) -> Section:
    title, lines = "Time and memory", run.resources
    missing = [] if lines else [f"memory over time is {_absent(run)}"]
    curves = {
        word: [(x, y / 1e6) for x, y in _curve(lines, key)]
        for word, key in (("process", "host_bytes"), ("GPU", "gpu_bytes"))
    }
    drawn, facts = list[Figure](), list[list[str]]()
    for word, points in curves.items():
        if points:
            drawn.append(Figure(figures.lines(f"memory {word}", {word: points}, "optimizer step", "MB", bottom=0), f"Memory of the {word}", "The most that was held since the point before, when all gradients of a step are there."))  # fmt: skip
    if len(lines) > 1:
        (a, s), (b, t) = [(line["step"], line["seconds"]) for line in (lines[0], lines[-1])]
        facts.append(["a step", f"{(t - s) / max(b - a, 1):.3g} s, the mean after step {a:,}"])
        facts.append(["training", clock(t)])
    if run.results is not None:
        facts.append(["the optimizer's state", size(run.results.get("state_bytes"))])
        for key, when in (("train_peak_bytes", "until training ended"), ("peak_bytes", "until evaluation ended")):
            peaks = (run.results.get(key) or {}).items()
            facts += [[f"peak of the {'GPU' if k == 'gpu' else 'process'}", f"{size(n)} {when}"] for k, n in peaks]
    return Section(
        title, figures=drawn, tables=[Table([], facts, text=True)] if facts else [], missing=missing, beside=True
    )


def _samples(run: Record) -> Section:
    title = "Samples"
    if run.samples:
        return Section(title, ["Rows of the evaluation file, spread over it; greedy generations. ✓: what the task counts as right."], samples=run.samples)  # fmt: skip
    one = (run.results or {}).get("sample")
    if one:
        return Section(title, ["One row; this run noted no more."], samples=[{**one, "right": False}])
    if run.results is None:
        return Section(title, missing=[UNFINISHED])
    asked = run.recipe.data.eval is not None
    why = f"answers are {_absent(run)}" if asked else "the recipe has no data.eval: nothing was asked."
    return Section(title, missing=[why])


def _recipe(run: Record) -> Section:
    said = ["Every default is written out; of local paths only the last part is shown."]
    data = (run.results or {}).get("data") or {}
    rows = [
        [name, f"{of['rows']:,}", f"{of['truncated']:,}", f"{of['without_target']:,}", f"{of['tokens_learnt']:,}"]
        for name in ("train", "eval")
        if (of := data.get(name))
    ]
    tables = [Table(["data", "rows", "cut to max_length", "left out", "tokens that bear loss"], rows)] if rows else []
    return Section("Recipe", said, tables=tables, verbatim=run.recipe.to_yaml())


def _made_of(run: Record) -> Section:
    base = [["revision of the base", str(run.delta.base.revision)]] if run.delta and run.delta.base.revision else []
    hashes = [[f"sha256 of {name}", value] for name, value in run.hashes.items()]
    versions = [[str(name), str(value)] for name, value in run.environment.items()]
    return Section(
        "Versions and hashes", tables=[Table([], [*base, *hashes], text=True), Table([], versions, text=True)]
    )


def _curve(lines: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the lines that have one; JSON has no NaN, so a value that was none is null."""
    found = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    if odd := [value for _, value in found if not isinstance(value, int | float)]:
        raise TypeError(f"{key} is {odd[0]!r}")
    return found


def _absent(run: Record) -> str:
    """Why something is not in the folder that every run has now."""
    name = run.recipe.method.name
    return (
        EARLIER
        if name in METHODS
        else f"not recorded: {name} is not one of Finetooth's methods, which are looked into."
    )


def _words(key: str) -> str:
    return key.replace("_", " ")


def _headed(key: str) -> str:
    return f"{_words(key)} {'↑' if key in tally.HIGHER else '↓'}"


def _better(key: str) -> str:
    return "more is better" if key in tally.HIGHER else "less is better"


def _difference(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else number(after - before, sign="+")
