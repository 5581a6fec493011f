"""One of two ranks that write a checkpoint together; the second is late."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch.distributed as dist

import finetooth
from finetooth.saved import fault


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for step in (1, 2, 3):
        with finetooth.saving(out / f"step-{step}", keep=2) as folder:
            time.sleep(0.3 * rank)
            (folder / f"random_state_{rank}.pth").write_text(f"{rank} at {step}")
        assert fault(out / f"step-{step}") is None, "every rank goes on when it is complete"
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
