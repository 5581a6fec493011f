"""The tables of delta files on docs/benchmarks.md, of the rows that `delta_files.py` appends. Of every measure the last run is shown."""

from __future__ import annotations

from rows import Row, number, table, threads


def delta_tables(rows: list[Row]) -> str:
    """Sizes and speeds of the codings, sizes of real fine-tunes, and peaks."""
    shown = {measure: _last([r for r in rows if r["measure"] == measure]) for measure in ("coding", "trained", "peak")}
    if not any(shown.values()):
        return "Not measured yet."
    parts = [(shown["coding"], _codings), (shown["trained"], _trained), (shown["peak"], _peaks)]
    return "\n\n".join(f"{_where(lines[0])}\n\n{make(lines)}" for lines, make in parts if lines)


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
    sizes, speeds = [], []
    for (dtype, unit, share), found in cases.items():
        case = [f"{dtype}, {unit}s, {100 * float(share):g} %"]
        sizes.append(case + [number(float(found[w]["stream_bytes_per_weight"])) for w in ways if w != "copy"])
        pairs = [(float(found[w]["encode_gb_s"]), float(found[w]["decode_gb_s"])) for w in ways]
        speeds.append(case + [f"{number(e)} / {number(d)}" for e, d in pairs])
    left = table(["bytes per changed weight", *(w for w in ways if w != "copy")], sizes)
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
