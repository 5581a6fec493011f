"""The second process of law 6: load what the first saved, do the remaining steps, save the end."""

import sys
from pathlib import Path

import torch

from tests.laws.toy import DTYPES, Toy, batches, build, snapshot, train


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for saved in sorted(folder.glob("*.half.pt")):
        row, dtype = saved.name.split(".")[:2]
        state = torch.load(saved, weights_only=True)  # noqa: TID251 - tensors only
        model = Toy(DTYPES[dtype])
        opt = build(row, model, weight_decay=0.1)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])
        list(train(model, opt, batches(6)[3:]))
        torch.save(
            {"model": snapshot(model), "selective": opt.state_dict()["selective"]}, folder / f"{row}.{dtype}.end.pt"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
