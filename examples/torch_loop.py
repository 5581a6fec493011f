"""A bare PyTorch loop: only the line that makes the optimizer is Finetooth's.

python examples/torch_loop.py                               # BANKING77, in the package
python examples/torch_loop.py path/to/train.jsonl.gz --steps 200
"""

import gzip
import json
import random
from pathlib import Path

import torch
import typer
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetooth
from finetooth import embedded

MODEL = str(embedded.path("stories260K"))
DATA = embedded.path("banking77/train")


def main(data: Path = DATA, model: str = MODEL, steps: int = 60) -> None:
    """Fine-tune on whole rows, take the delta, and put the base back."""
    tokenizer, policy = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    with gzip.open(data, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = [torch.tensor(tokenizer(f"{row['prompt']}\n{row['completion']}")["input_ids"][:256]) for row in rows]

    opt = finetooth.build("dst", policy, lr=2e-3, keep=0.1)  # the one line
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)

    draw, losses = random.Random(0), []
    policy.train()
    for _ in range(steps):
        for _ in range(2):  # accumulation
            labels = pad_sequence(draw.sample(texts, 8), batch_first=True, padding_value=-100)
            loss = policy(input_ids=labels.clamp(min=0), attention_mask=(labels >= 0).long(), labels=labels).loss
            (loss / 2).backward()
            losses.append(loss.item())
        opt.step()  # selects, clips, updates
        schedule.step()
        opt.zero_grad()

    typer.echo(f"loss: {sum(losses[:10]) / 10:.3f} -> {sum(losses[-10:]) / 10:.3f}")
    typer.echo(f"{opt.verify_frozen()} tensors checked: what was not chosen is the base, bit for bit")
    delta = finetooth.Delta.extract(policy, opt)
    typer.echo(
        f"the delta: {delta.info()['changed']:,} of {delta.info()['weights']:,} weights, {delta.info()['bytes']:,} bytes"
    )
    base = AutoModelForCausalLM.from_pretrained(model)
    with delta.reverted(policy):
        back = all(torch.equal(p, q) for p, q in zip(policy.parameters(), base.parameters(), strict=True))
    typer.echo(f"with the delta taken off it is the base again: {back}")


if __name__ == "__main__":
    typer.run(main)
