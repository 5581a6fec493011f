"""The house rules, read from the source: import order, sizes, types, and what no file may contain.

Nothing is imported and nothing is run: every rule looks at the syntax tree of `src/finetooth`. An import
inside a function counts like one at the top. A function's length is its lines without its docstring, so that
nobody saves on the explanation.
"""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src"
PACKAGE = SRC / "finetooth"

# From low to high. A module may import its own level and those below; a cycle is never allowed.
LEVELS = (
    {"units", "kernels", "shards", "quantize", "files", "nearest", "schema"},
    {"ranked", "selection", "weight", "rule", "pieces", "saved"},
    {"scores", "when", "rest", "base", "probe", "anatomy", "halves", "checkpoint"},
    {
        "optim",
        "checks",
        "choosing",
        "gradients",
        "guard",
        "moments",
        "noise",
        "named",
        "state",
        "slot",
        "linear",
        "window",
    }
    | {
        "twins",
        "coding",
        "varint",
        "zigzag",
        "codec",
        "made",
        "manifest",
        "archive",
        "diff",
        "fit",
        "delta",
        "meter",
        "reverted",
        "reference",
        "shira",
        "serve",
    }
    | {"moves", "merging", "conflicting", "contrast", "chain", "switch"},
    {"method", "methods", "spelled", "exclude", "assemble"},
    {"recipe", "embedded", "data", "answers", "pretrained"},
    {"jobs", "measure", "train", "trainer", "run", "evaluate", "preview", "report", "hf", "settings", "reporting"}
    | {"generated"}
    | {"history", "turnover", "lines", "record", "page", "figures", "comparison", "reporter"}
    | {"card", "hub", "overlap", "preflight", "harness", "appraisal", "survival"}
    | {"outsiders", "contest", "entrant", "inputs", "tally", "scatter", "compare"},
    {"longest", "understudy", "rehearsal", "plan", "trial"},
    {"cli"},
    {"__init__", "__main__"},
)
MAX_FILE, MEDIAN_FILE, MEDIAN_FUNCTION, P90_FUNCTION = 350, 150, 12, 40

Function = ast.FunctionDef | ast.AsyncFunctionDef


def files() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)


def ids(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    """`src/finetooth/cli/main.py` -> `finetooth.cli.main`; a package is named like its folder."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def area(module: str) -> str:
    """The part of the design a module belongs to: `finetooth.cli.main` -> `cli`; the package itself -> `__init__`."""
    return module.split(".")[1] if "." in module else "__init__"


def level(module: str) -> int:
    found = [i for i, names in enumerate(LEVELS) if area(module) in names]
    assert found, f"{module} has no place in LEVELS: say in {Path(__file__).name} which parts it may import."
    return found[0]


def imports(path: Path, known: frozenset[str]) -> set[str]:
    """Modules of this package that a file imports anywhere, `from finetooth import units` resolved."""
    here, out = module_name(path), set()
    package = here if path.name == "__init__.py" else here.rpartition(".")[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*up, *([node.module] if node.module else [])])
            inner = {f"{source}.{alias.name}" for alias in node.names} & known
            out |= inner if len(inner) == len(node.names) else inner | {source}
    return {name for name in out if name.split(".")[0] == "finetooth"} - {here}


@cache
def graph() -> dict[str, set[str]]:
    known = frozenset(module_name(p) for p in files())
    return {module_name(p): imports(p, known) for p in files()}


def functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, Function))


def length(node: Function) -> int:
    first = node.body[0]
    doc = 0
    if ast.get_docstring(node, clean=False) is not None:
        doc = (first.end_lineno or 0) - first.lineno + 1
    return (node.end_lineno or 0) - node.lineno + 1 - doc


def dotted(node: ast.expr) -> str:
    """`torch.cuda.empty_cache` of an attribute chain; '' where it does not start at a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else f".{node.attr}"
    return ""


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(SRC.parent)}:{getattr(node, 'lineno', 0)}"


def test_there_are_files() -> None:
    assert PACKAGE / "units.py" in files()


@pytest.mark.parametrize("path", files(), ids=ids)
def test_imports_go_one_way(path: Path) -> None:
    here = module_name(path)
    upwards = sorted(other for other in graph()[here] if level(other) > level(here))
    assert not upwards, f"{here} (level {level(here)}) imports {upwards}: imports go one way, see LEVELS."


def test_no_import_cycles() -> None:
    # A package's own __init__ may gather its modules: they then do not import the package itself.
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail("these modules import each other: " + " -> ".join(error.args[1]))


@pytest.mark.parametrize("path", files(), ids=ids)
def test_docstring_and_size(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines < MAX_FILE, f"{ids(path)} has {lines} lines: fewer than {MAX_FILE}, one idea to a file."
    assert ast.get_docstring(tree(path)), f"{ids(path)} does not say what it is: give it a module docstring."


def test_median_file() -> None:
    sizes = [len(p.read_text(encoding="utf-8").splitlines()) for p in files()]
    assert statistics.median(sizes) <= MEDIAN_FILE


def test_function_lengths() -> None:
    lengths = sorted(length(f) for path in files() for f in functions(path))
    p90 = lengths[int(0.9 * (len(lengths) - 1))]
    longest = sorted(((length(f), f"{ids(p)}::{f.name}") for p in files() for f in functions(p)), reverse=True)[:5]
    assert statistics.median(lengths) <= MEDIAN_FUNCTION, f"the longest are {longest}"
    assert p90 <= P90_FUNCTION, f"the longest are {longest}"


def public(path: Path) -> Iterator[Function]:
    """Functions and methods that a user can reach: no underscore in front, not inside another function."""

    def inside(body: list[ast.stmt]) -> Iterator[Function]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from inside(node.body)
            elif isinstance(node, Function) and (not node.name.startswith("_") or node.name == "__init__"):
                yield node

    return inside(tree(path).body)


@pytest.mark.parametrize("path", files(), ids=ids)
def test_public_functions_are_typed(path: Path) -> None:
    for node in public(path):
        args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        bare = [a.arg for a in args if a and a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare, f"{where(path, node)}: {node.name} has arguments without a type: {bare}"
        said = node.returns is not None or node.name == "__init__"  # which returns nothing, as mypy knows
        assert said, f"{where(path, node)}: {node.name} does not say what it returns"


BANNED_CALLS = ("print", "eval", "exec", "breakpoint")
BANNED_ENDS = (".empty_cache", "basicConfig")
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
BANNED_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("path", files(), ids=ids)
def test_banned_calls_and_modules(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            assert name not in BANNED_CALLS, f"{where(path, node)}: {name}() is not used in this package."
            assert not name.endswith(BANNED_ENDS), f"{where(path, node)}: {name}() is not used in this package."
        elif isinstance(node, ast.Import | ast.ImportFrom):
            roots = {alias.name.split(".")[0] for alias in node.names} if isinstance(node, ast.Import) else set()
            roots |= {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()
            assert not roots & BANNED_MODULES, f"{where(path, node)}: {roots & BANNED_MODULES} can run foreign code."


@pytest.mark.parametrize("path", files(), ids=ids)
def test_torch_load_is_weights_only(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and dotted(node.func) == "torch.load":
            safe = [k for k in node.keywords if k.arg == "weights_only"]
            value = safe[0].value if safe else None
            assert isinstance(value, ast.Constant), f"{where(path, node)}: torch.load needs weights_only=True"
            assert value.value is True, f"{where(path, node)}: torch.load needs weights_only=True"


@pytest.mark.parametrize("path", files(), ids=ids)
def test_no_mutable_defaults(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, Function | ast.Lambda):
            for default in [*node.args.defaults, *node.args.kw_defaults]:
                shared = isinstance(default, MUTABLE)
                if isinstance(default, ast.Call):
                    shared = dotted(default.func) in ("list", "dict", "set", "bytearray")
                assert not shared, f"{where(path, node)}: a mutable default is shared by all calls."


@pytest.mark.parametrize("path", files(), ids=ids)
def test_only_shards_is_distributed(path: Path) -> None:
    if area(module_name(path)) == "shards":
        return
    for node in ast.walk(tree(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [dotted(node)]
        far = [n for n in names if n.startswith("torch.distributed")]
        assert not far, f"{where(path, node)}: {far[0]} belongs into shards.py."


DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"}
DRAWS_LIKE = {"rand_like", "randn_like", "randint_like", "dropout", "alpha_dropout"}
DRAWS_IN_PLACE = {
    "normal_",
    "uniform_",
    "bernoulli_",
    "random_",
    "exponential_",
    "cauchy_",
    "geometric_",
    "log_normal_",
}
SEEDERS = {
    "torch.manual_seed", "torch.seed", "torch.random.manual_seed", "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all", "torch.set_rng_state", "torch.random.set_rng_state", "np.random.seed",
    "numpy.random.seed", "random.seed", "set_seed", "transformers.set_seed", "torch.default_generator",
}  # fmt: skip
NUMPY_FREE = {"default_rng", "Generator", "SeedSequence", "PCG64", "Philox"}


@pytest.mark.parametrize("path", files(), ids=ids)
def test_no_global_generator(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        name, given = dotted(node.func), {k.arg for k in node.keywords}
        head, _, tail = name.rpartition(".")
        assert name not in SEEDERS, f"{where(path, node)}: {name} changes a global generator."
        from_torch = head == "torch" and tail in DRAWS
        from_like = head in ("torch", "F", "torch.nn.functional") and tail in DRAWS_LIKE
        in_place = "." in name and tail in DRAWS_IN_PLACE and not head.endswith("init")
        if from_torch or from_like or in_place:
            assert "generator" in given, f"{where(path, node)}: {name} without generator= draws from the global one."
        if head in ("np.random", "numpy.random"):
            assert tail in NUMPY_FREE, f"{where(path, node)}: {name} draws from numpy's global generator."
        if head == "random":
            assert tail == "Random", f"{where(path, node)}: {name} draws from Python's global generator."
