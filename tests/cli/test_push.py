"""`finetooth push`, and a delta used by its hub id, against a hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetooth import embedded
from finetooth.cli.main import app
from finetooth.delta import Delta
from tests.cli.fake_hub import TOKEN, Hub, running
from tests.cli.test_train import call, recipe, runner

FILES = {"delta.safetensors", "README.md", "recipe.yaml", "results.json", "environment.json"}
# The client reads its settings when it is imported, so it is used in a process of its own: one for a series of calls.
CALLS = """
import json, os, sys
from typer.testing import CliRunner
from finetooth.cli.main import app
for token, words in json.load(sys.stdin):
    os.environ["HF_TOKEN"] = token
    found = CliRunner().invoke(app, words)
    sys.__stdout__.write(json.dumps([found.exit_code, found.stdout, found.stderr]) + "\\n")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    call("train", recipe(folder, evaluate={"task": "loss"}), "--json")
    return folder / "run"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as found:
        yield found


def finetooth(url: str, home: Path, *calls: tuple[str, list[object]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of every call (token, words), with the hub at `url` and a cache in `home`."""
    env = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    words = json.dumps([(token, [str(w) for w in given]) for token, given in calls])
    done = subprocess.run(
        [sys.executable, "-c", CALLS], input=words, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_a_run_is_pushed_and_used_again(run: Path, hub: Hub, tmp_path: Path) -> None:
    base = embedded.path("stories260K")
    pushed, info, applied, branch, old = finetooth(
        hub.url,
        tmp_path / "home",
        (TOKEN, ["push", run, "me/stories", "--private", "--json"]),
        (TOKEN, ["delta", "info", "me/stories", "--json"]),
        (TOKEN, ["delta", "apply", base, "me/stories", "--out", tmp_path / "tuned", "--json"]),
        (TOKEN, ["push", run, "me/stories", "--update", "--revision", "v2", "--json"]),
        (TOKEN, ["delta", "verify", tmp_path / "tuned", "me/stories@v2", "--json"]),
    )
    assert [code for code, _, _ in (pushed, info, applied, branch, old)] == [0] * 5, (
        pushed,
        info,
        applied,
        branch,
        old,
    )
    repo, found = hub.repos["me/stories"], json.loads(pushed[1])
    assert repo.private and set(repo.branches["main"]) == set(found["files"]) == FILES
    assert found["commit"] == repo.commits[0] and found["url"].endswith(repo.commits[0])
    assert repo.branches["main"]["delta.safetensors"] == (run / "delta.safetensors").read_bytes()
    assert {name: len(data) for name, data in repo.branches["main"].items()} == found["files"]
    everything = b"".join(repo.branches["main"].values())
    assert str(run.parent).encode() not in everything and str(Path.home() / "x").encode() not in everything
    shared = yaml.safe_load(repo.branches["main"]["recipe.yaml"])
    assert shared["model"] == "embedded:stories260K" and shared["output"] == "run"
    assert json.loads(info[1])["changed"] == json.loads((run / "results.json").read_text())["changed"]
    assert Delta.load(run).verify(tmp_path / "tuned") == "applied"
    assert json.loads(old[1])["state"] == "applied" and set(repo.branches) == {"main", "v2"}
    assert "PUT object" in hub.requests and not any("metrics" in asked for asked in hub.requests)


def test_what_the_hub_refuses_is_said_in_a_line(run: Path, hub: Hub, tmp_path: Path) -> None:
    cases: list[tuple[str, list[object], int, str]] = [
        (TOKEN, ["push", run, "me/one"], 0, ""),
        (TOKEN, ["push", run, "me/one"], 2, "(409): it exists already: give another name, or --update"),
        (TOKEN, ["push", run, "others/one"], 2, "(403): the token may not write to others"),
        (TOKEN, ["push", run, "me/two", "--update"], 2, "(404): there is no such repository"),
        ("hf_bad", ["push", run, "me/two"], 2, "(401): the token is not valid: run `hf auth login`"),
        ("", ["push", run, "me/two"], 2, "no token for the hub"),
        (TOKEN, ["push", run, "me/one", "--update", "--private"], 2, "--private is for a new repository"),
        (TOKEN, ["delta", "info", "me/nothing"], 2, "neither a path nor a repository on the hub"),
        (TOKEN, ["delta", "info", "me/one@v9"], 2, "Invalid rev id: v9"),
    ]
    found = finetooth(hub.url, tmp_path / "home", *[(token, words) for token, words, _, _ in cases])
    for (_, words, wanted, says), (code, _, stderr) in zip(cases, found, strict=True):
        assert (code, says in stderr) == (wanted, True), (words, code, stderr)
        assert wanted == 0 or stderr.count("\n") == 1, stderr
    assert set(hub.repos) == {"me/one"} and len(hub.repos["me/one"].commits) == 1


def test_no_hub_to_reach(run: Path, tmp_path: Path) -> None:
    with running() as gone:
        url = gone.url
    found = finetooth(url, tmp_path, (TOKEN, ["push", run, "me/x"]), (TOKEN, ["delta", "info", "me/x"]))
    assert found[0][0] == 1 and "the hub cannot be reached" in found[0][2]
    assert found[1][0] == 2 and "can be reached" in found[1][2]


def test_a_dry_run_asks_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    found = call("push", run, "me/x", "--dry-run", "--json")
    assert set(found["files"]) == FILES and found["commit"] is None and found["notes"] == []
    said = runner.invoke(app, ["push", str(run), "me/x", "--dry-run"])
    assert "would be pushed" in said.stdout and "README.md" in said.stdout


def _without(folder: Path) -> None:
    (folder / "results.json").unlink()


def _other_delta(folder: Path) -> None:
    delta = Delta.load(folder)
    first = dict([next(iter(delta.changes.items()))])
    Delta(first, {}, delta.base, delta.method).save(folder / "delta.safetensors")


def _cut(folder: Path) -> None:
    file = folder / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _own_words(folder: Path) -> None:
    file = folder / "README.md"
    file.write_text(file.read_text() + f"\nThe data is in {folder.parent}/rows.jsonl.\n")


def _home(folder: Path) -> None:
    file = folder / "README.md"
    file.write_text(file.read_text() + "\nThe data is in /home/somebody/rows.jsonl.\n")


@pytest.mark.parametrize(
    ("edit", "repo", "says"),
    [
        (_without, "me/x", "has no results.json: give the folder of a run that is done"),
        (shutil.rmtree, "me/x", "is not a folder"),
        (_other_delta, "me/x", "is not the delta of results.json: changed is"),
        (_cut, "me/x", "not a whole safetensors file"),
        (_own_words, "me/x", "a path of this machine"),
        (_home, "me/x", "README.md says '/home/somebody', a path of this machine"),
        (None, "x", "not the id of a repository: write org/name"),
        (None, "me/a..b", "Cannot have -- or .. in repo_id"),
    ],
)
def test_what_is_not_fit_is_refused_before_any_request(
    edit: Any, repo: str, says: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    if edit is not None:
        edit(folder)
    for more in ([], ["--dry-run"]):
        result = runner.invoke(app, ["push", str(folder), repo, *more])
        assert result.exit_code == 2 and says in result.stderr, result.output


def test_offline_is_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)  # the tests are offline: conftest.py
    result = runner.invoke(app, ["push", str(run), "me/x"])
    assert result.exit_code == 1 and "cannot be reached" in result.stderr and "offline" in result.stderr.lower()


def test_a_local_base_is_pointed_out(run: Path, tmp_path: Path) -> None:
    from finetooth import hub

    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    card = folder / "README.md"
    card.write_text(card.read_text().replace("# no base_model:", "# base_model: the hub id of"))
    assert "local folder" in hub.notes(hub.contents(folder))[0]
