"""`finetooth push`: a run's delta, card, recipe, results and versions, to a repository of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetooth.cli import show


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that is done.")],
    repo: Annotated[str, typer.Argument(metavar="REPO_ID", help="org/name, or your-name/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make the new repository a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to commit to; it is made if need be.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Add a commit to a repository that exists.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and say what would go; no request.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")] = False,
) -> None:
    """Upload a run to the hub, in one commit; `finetooth delta apply BASE org/name` then finds its delta there.

    What goes: delta.safetensors, README.md, recipe.yaml without local paths, results.json and environment.json. The
    token is the one that `hf auth login` or HF_TOKEN gave.
    """
    with show.clean_errors():
        show.quiet()
        from finetooth import hub

        found = hub.push(run, repo, private=private, revision=revision, update=update, dry_run=dry_run)
        if not as_json:
            for note in found.pop("notes"):
                show.note(note)
        show.facts(found, as_json, "would be pushed" if dry_run else "pushed")
