"""TRL's ORPOTrainer (experimental there): preferences without any reference model.

python examples/orpo.py path/to/preferences     # train.jsonl.gz, test.jsonl.gz: {"prompt", "chosen", "rejected"}
"""

from pathlib import Path

import torch
import typer
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import finetooth
from finetooth import embedded

MODEL = str(embedded.path("stories260K"))


def main(data: Path, model: str = MODEL, steps: int = 40) -> None:
    """Fine-tune, and say how often the chosen answer is the likelier one."""
    tokenizer, policy = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    files = {part: str(data / f"{part}.jsonl.gz") for part in ("train", "test")}
    rows = load_dataset("json", data_files=files).select_columns(["prompt", "chosen", "rejected"])

    opt = finetooth.build("gmt-strict", policy, lr=1e-3, keep=0.2)  # the one line

    args = ORPOConfig(
        output_dir="runs/orpo",
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
    trainer = ORPOTrainer(
        policy,
        args=args,
        train_dataset=rows["train"].select(range(1000)),
        eval_dataset=rows["test"].select(range(64)),
        processing_class=tokenizer,
        optimizers=(opt, None),
        callbacks=[finetooth.SelectiveCallback(opt)],
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_log_odds_ratio"):
        typer.echo(f"{name}: {before[name]:.4f} -> {after[name]:.4f}")


if __name__ == "__main__":
    typer.run(main)
