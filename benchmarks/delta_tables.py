"""The tables of deltas on docs/benchmarks.md, of the rows that `delta_files.py`, `delta_jobs.py` and `switch.py` append. Of every measure the last run is shown."""

from __future__ import annotations

from rows import Row, number, table, threads


def delta_tables(rows: list[Row]) -> str:
    """Sizes and speeds of the codings, sizes of real fine-tunes, and peaks."""
    shown = {measure: _last([r for r in rows if r["measure"] == measure]) for measure in ("coding", "trained", "peak")}
    if not any(shown.values()):
        return "Not measured yet."
    parts = [(shown["coding"], _codings), (shown["trained"], _trained), (shown["peak"], _peaks)]
    return "\n\n".join(f"{_where(lines[0])}\n\n{make(lines)}" for lines, make in parts if lines)


def switch_table(rows: list[Row]) -> str:
    """Going from one fine-tune to another: milliseconds, the first way being ours, and the others as multiples of it."""
    if not rows:
        return "Not measured yet."
    shown = _last(rows)
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for r in shown:
        cases.setdefault((r["size"], r["dtype"]), {})[r["way"]] = r
    lines = []
    for (size, dtype), found in cases.items():
        ours = float(next(iter(found.values()))["median_ms"])
        for way, r in found.items():
            times = [number(float(r[f"{key}_ms"])) for key in ("median", "min", "max")]
            ratio = number(float(r["median_ms"]) / ours)
            lines.append(
                [
                    f"{size} {dtype}",
                    way,
                    f"{times[0]} ({times[1]}-{times[2]})",
                    ratio,
                    number(float(r["forward_ms"])),
                    r["held_mb"],
                ]
            )
    head = ["", "way", "switch, ms", "× DeltaSwitch", "a forward of 16 tokens, ms", "held beside the model, MiB"]
    r = shown[0]
    place = f"{r['hardware']}{threads(r['threads'])}; torch {r['torch']}, transformers {r['transformers']}, peft {r['peft']}"
    said = f"{place}; {r['run'][:10]}, commit {r['commit']}; {r['repeats']} repeats:"
    return f"{said}\n\n```sh\n{r['command']}\n```\n\n{table(head, lines)}"


def jobs_table(rows: list[Row]) -> str:
    """Of each job, how long it takes and how much of that is coding."""
    if not rows:
        return "Not measured yet."
    shown = _last(rows)
    lines = []
    for r in shown:
        whole, inside = float(r["ms"]), float(r["coding_ms"])
        lines.append([r["job"], r["values"], number(whole), number(inside), f"{100 * inside / whole:.1f} %"])
    head = [
        f"{int(shown[0]['weights']):,} weights in bf16, 1 % changed",
        "values",
        "ms",
        "of these coding, ms",
        "share",
    ]
    return f"{_where(shown[0])}\n\n{table(head, lines)}"


def _last(rows: list[Row]) -> list[Row]:
    return [r for r in rows if r["run"] == rows[-1]["run"]]


def _where(r: Row) -> str:
    libraries = f"torch {r['torch']}, numpy {r['numpy']}" + (f", zstandard {r['zstandard']}" if r["zstandard"] else "")
    place = f"{r['hardware']}{threads(r['threads'])}; {libraries}; {r['run'][:10]}"
    return f"{place}, commit {r['commit']}:\n\n```sh\n{r['command']}\n```"


def _codings(rows: list[Row]) -> str:
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for r in rows:
        cases.setdefault((r["dtype"], r["unit"], r["share"]), {})[r["way"]] = r
    ways = list(dict.fromkeys(r["way"] for r in rows))
    sized = [w for w in ways if w != "copy" and not w.endswith(", compiled")]  # which gives the same bytes
    sizes, speeds = [], []
    for (dtype, unit, share), found in cases.items():
        case = [f"{dtype}, {unit}s, {100 * float(share):g} %"]
        sizes.append(case + [number(float(found[w]["stream_bytes_per_weight"])) for w in sized])
        pairs = [(float(found[w]["encode_gb_s"]), float(found[w]["decode_gb_s"])) for w in ways]
        speeds.append(case + [f"{number(e)} / {number(d)}" for e, d in pairs])
    left = table(["bytes per changed weight", *sized], sizes)
    return f"{left}\n\n{table(['encode / decode, GB/s of ids and values', *ways], speeds)}"


def _trained(rows: list[Row]) -> str:
    lines = [
        [f"{r['model']}, `{r['method']}`, lr {float(r['lr']):g}", f"{int(r['changed']):,}", r["way"]]
        + [number(float(r[key])) for key in ("stream_bytes_per_weight", "bytes_per_weight")]
        for r in rows
    ]
    return table(["fine-tuned in bf16, 1 %", "changed", "values", "bytes per weight", "with the header"], lines)


def _peaks(rows: list[Row]) -> str:
    keys = ("peak_mb", "largest_mb", "whole_mb")
    lines = [[f"`{r['way']}`", *(number(float(r[key])) for key in keys)] for r in rows]
    return table(["on a folder", "peak, MiB", "largest tensor", "model"], lines)
