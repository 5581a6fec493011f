"""A loop with accelerate: prepare, accumulate, step. The optimizer clips, so nothing here does.

python examples/accelerate_loop.py                                  # BANKING77, in the package
accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py --steps 200
"""

from pathlib import Path

import torch
import typer
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, get_cosine_schedule_with_warmup

import finetooth
from finetooth import embedded

MODEL = str(embedded.path("stories260K"))
DATA = embedded.path("banking77/train")


def main(data: Path = DATA, model: str = MODEL, steps: int = 60) -> None:
    """Fine-tune on prompts and completions; only completions are learnt."""
    tokenizer, policy = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        asked = tokenizer(row["prompt"] + "\n")["input_ids"]
        said = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return {"input_ids": asked + said, "labels": [-100] * len(asked) + said}

    rows = load_dataset("json", data_files=str(data), split="train")
    rows = rows.map(encode, remove_columns=rows.column_names)
    loader = DataLoader(rows, batch_size=8, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))

    opt = finetooth.build("grad", policy, lr=1e-2, keep=0.05)  # the one line
    schedule = get_cosine_schedule_with_warmup(opt, 5, steps)

    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
    policy, opt, loader, schedule = accelerator.prepare(policy, opt, loader, schedule)
    policy.train()
    done, losses = 0, []
    while done < steps:
        for batch in loader:
            with accelerator.accumulate(policy):
                loss = policy(**batch).loss
                accelerator.backward(loss)
                opt.step()
                schedule.step()
                opt.zero_grad()
            losses.append(loss.item())
            done += accelerator.sync_gradients
            if done == steps:
                break
    own = opt.optimizer  # accelerate's wrapper has ours inside
    checked = own.verify_frozen()  # on every rank
    accelerator.print(
        f"loss: {sum(losses[:10]) / 10:.3f} -> {sum(losses[-10:]) / 10:.3f}, gradient norm {own.grad_norm:.3f}"
    )
    accelerator.print(f"{own.steps} steps; {checked} tensors checked: nothing moved outside the selection")


if __name__ == "__main__":
    typer.run(main)
