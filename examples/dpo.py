"""TRL's DPOTrainer on preference pairs: the reference model is the policy with its delta taken off, not a second model.

python examples/dpo.py path/to/preferences      # train.jsonl.gz, test.jsonl.gz: {"prompt", "chosen", "rejected"}
"""

from pathlib import Path

import torch
import typer
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import finetooth
from finetooth import embedded

MODEL = str(embedded.path("stories260K"))


def main(data: Path, model: str = MODEL, steps: int = 40) -> None:
    """Fine-tune, and say how far the policy has learnt to prefer what was chosen."""
    tokenizer, policy = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    files = {part: str(data / f"{part}.jsonl.gz") for part in ("train", "test")}
    rows = load_dataset("json", data_files=files).select_columns(["prompt", "chosen", "rejected"])

    opt = finetooth.build("dst", policy, lr=1e-4, keep=0.2)  # the one line

    args = DPOConfig(
        output_dir="runs/dpo",
        max_steps=steps,
        per_device_train_batch_size=4,
        max_length=256,
        gradient_checkpointing=False,  # this model is small
        lr_scheduler_type="cosine",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = DPOTrainer(
        policy,
        ref_model=finetooth.Reference(policy, opt),  # holds nothing of its own
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"].select(range(64)),
        processing_class=tokenizer,
        optimizers=(opt, None),
        callbacks=[finetooth.SelectiveCallback(opt)],
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"):
        typer.echo(f"{name}: {before[name]:.4f} -> {after[name]:.4f}")
    typer.echo(f"{opt.verify_frozen()} tensors checked: what was not chosen is the base")
    info = finetooth.Delta.extract(policy, opt).info()
    typer.echo(f"the delta: {info['changed']:,} of {info['weights']:,} weights, {info['bytes']:,} bytes")


if __name__ == "__main__":
    typer.run(main)
