"""TRL's KTOTrainer on single answers, each good or bad; like DPO's, its reference is the policy with the delta taken off.

python examples/kto.py path/to/preferences      # train.jsonl.gz, test.jsonl.gz: {"prompt", "chosen", "rejected"}
"""

from pathlib import Path

import torch
import typer
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig, KTOTrainer, unpair_preference_dataset

import finetooth
from finetooth import embedded

MODEL = str(embedded.path("stories260K"))


def main(data: Path, model: str = MODEL, steps: int = 40) -> None:
    """Fine-tune, and say how the rewards of good and bad answers came apart."""
    tokenizer, policy = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    files = {part: str(data / f"{part}.jsonl.gz") for part in ("train", "test")}
    pairs = load_dataset("json", data_files=files).select_columns(["prompt", "chosen", "rejected"])
    rows = unpair_preference_dataset(pairs).shuffle(seed=0)

    opt = finetooth.build("hft", policy, lr=1e-4)  # the one line

    args = KTOConfig(
        output_dir="runs/kto",
        max_steps=steps,
        per_device_train_batch_size=8,
        max_length=256,
        gradient_checkpointing=False,  # this model is small
        lr_scheduler_type="cosine",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = KTOTrainer(
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
    for name in ("eval_loss", "eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins"):
        typer.echo(f"{name}: {before[name]:.4f} -> {after[name]:.4f}")
    typer.echo(f"{opt.verify_frozen()} tensors checked: the frozen half of the matrices is the base")


if __name__ == "__main__":
    typer.run(main)
