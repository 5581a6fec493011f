"""A run, shared: its delta, card, recipe, results and versions as one commit to a repository of the hub.

Everything is checked before the first request: that the run is complete, that its delta is the one its results speak
of, and that no text says where things lie on this machine. `recipe.yaml` goes up in its public form; checkpoints,
metrics and a merged model stay here. One commit holds all files, so a reader never sees half a run.

The client is huggingface_hub's, with the token that it finds (`hf auth login`, HF_TOKEN). A repository that exists is
left alone unless `update` is said: its card would be replaced, and it may be someone's.

Not covered: pull requests, and datasets or spaces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from finetooth.checkpoint import DELTA, HUB_ID
from finetooth.delta import Delta
from finetooth.recipe import Recipe, parse
from finetooth.run import to_json

TEXTS = ("README.md", "environment.json", "recipe.yaml", "results.json")
_HOME = re.compile(r"(?:/home/|/Users/|[A-Za-z]:\\Users\\)[\w.-]+")


def push(
    run: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    update: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Upload the run folder `run` to `repo` (`org/name`), to the branch `revision` if one is named; what was done.

    With `dry_run` everything is checked and nothing is asked of the hub; `commit` and `url` are then None.

    Raises ValueError for a run or an id that is not fit to be pushed, before any request, and where the hub refuses
    (no token, no rights, the repository exists); RuntimeError where it cannot be reached or fails.
    """
    files = contents(run)
    check_repo(repo)
    if private and update:
        raise ValueError("--private is for a new repository: an existing one keeps what its settings say.")
    facts = {"repo": repo, "commit": None, "url": None, "files": sizes(files), "notes": notes(files)}
    if dry_run:
        return facts
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise ValueError("there is no token for the hub: run `hf auth login`, or set HF_TOKEN.")
    api, message = HfApi(library_name="finetooth"), f"{Path(run).resolve().name}, with finetooth push"
    with _explained(repo):
        if not update:
            api.create_repo(repo, private=private or None)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        adds = [CommitOperationAdd(name, data) for name, data in files.items()]
        done = api.create_commit(repo, adds, commit_message=message, revision=revision)
    return {**facts, "commit": done.oid, "url": str(done.commit_url)}


def contents(run: str | Path) -> dict[str, bytes | Path]:
    """What a push uploads, by its name there. ValueError if the run is not complete, or a text names a local path."""
    folder = Path(run)
    missing = [name for name in (DELTA, *TEXTS) if not (folder / name).is_file()]
    if missing:
        kind = "is not a folder" if not folder.is_dir() else f"has no {missing[0]}"
        raise ValueError(f"{folder} {kind}: give the folder of a run that is done (finetooth train RECIPE).")
    recipe = parse(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")))
    delta = _matching(folder)
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in TEXTS}
    texts["recipe.yaml"] = recipe.public().to_yaml()
    for name, text in {**texts, DELTA: to_json(delta.recipe)}.items():
        _refuse_paths(name, text, recipe, folder)
    return {DELTA: folder / DELTA, **{name: text.encode() for name, text in texts.items()}}


def check_repo(repo: str) -> None:
    """ValueError unless `repo` can be the id of a repository."""
    if not HUB_ID.fullmatch(repo):
        raise ValueError(f"{repo!r} is not the id of a repository: write org/name, or your-name/name.")
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not in __all__

    validate_repo_id(repo)


def sizes(files: dict[str, bytes | Path]) -> dict[str, int]:
    """Bytes by file."""
    return {name: len(data) if isinstance(data, bytes) else data.stat().st_size for name, data in files.items()}


def notes(files: dict[str, bytes | Path]) -> list[str]:
    """What a person should do before others can use it."""
    card = files["README.md"]
    assert isinstance(card, bytes)
    if b"# base_model: the hub id of" not in card:
        return []
    return ["the base was a local folder: say in README.md where others find it (base_model, and in the example)."]


def _matching(folder: Path) -> Delta:
    """The run's delta; ValueError unless it is the one that the results are about."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        said = {key: results[key] for key in ("changed", "method", "delta_bytes", "reverted")}
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{folder / 'results.json'} is not the results of a run: {e}") from e
    delta = Delta.load(folder)
    size = (folder / DELTA).stat().st_size
    found = {"changed": delta.info()["changed"], "method": delta.method, "delta_bytes": size, "reverted": True}
    wrong = [key for key in said if said[key] != found[key]]
    if wrong:
        key = wrong[0]
        raise ValueError(
            f"{folder / DELTA} is not the delta of results.json: {key} is {found[key]!r}, and {said[key]!r} there."
        )
    return delta


def _refuse_paths(name: str, text: str, recipe: Recipe, folder: Path) -> None:
    data, here = recipe.data, (str(folder.resolve()), str(Path.home()))
    given = (recipe.model, data.train, data.eval, recipe.evaluate.forgetting, recipe.output, *here)
    whole = [Path(path) for path in given if path and Path(path).is_absolute()]
    local = [str(path) for path in (*whole, *(path.parent for path in whole)) if len(path.parts) > 2]
    found = [path for path in local if path in text] or _HOME.findall(text)
    if found:
        raise ValueError(f"{name} says {found[0]!r}, a path of this machine: take it out before the run is shared.")


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """The hub's refusals in one sentence: what was asked, and what to do."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as e:
        status, said = e.response.status_code, " ".join(str(e.server_message or e).split())
        advice = {
            401: "the token is not valid: run `hf auth login`, or set HF_TOKEN",
            403: f"the token may not write to {repo.partition('/')[0]}: use one with the right to write",
            404: "there is no such repository: leave --update out to make it",
            409: "it exists already: give another name, or --update to add a commit to it",
        }.get(status)
        if advice is None:
            raise RuntimeError(f"the hub could not take {repo} ({status}): {said}") from e
        raise ValueError(f"the hub refused {repo} ({status}): {advice}. It says: {said}") from e
    except Exception as e:
        unreachable = HfHubHTTPError.__mro__[1]  # the HTTP client's own base error: httpx's, or httpx2's
        if not isinstance(e, unreachable | OSError):
            raise
        raise RuntimeError(f"the hub cannot be reached: {' '.join(str(e).split())}") from e
