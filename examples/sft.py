"""TRL's SFTTrainer on prompts and completions: `gift-sw`, a few columns of every matrix train.

python examples/sft.py                                      # BANKING77, in the package
python examples/sft.py path/to/tasks/e2e_nlg --steps 200    # a folder with train.jsonl.gz and test.jsonl.gz
"""

from pathlib import Path

import torch
import typer
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import finetooth
from finetooth import embedded

MODEL = str(embedded.path("stories260K"))
DATA = embedded.path("banking77/train").parent


def main(data: Path = DATA, model: str = MODEL, steps: int = 60) -> None:
    """Fine-tune, and say what was learnt and what it takes to keep it."""
    tokenizer, policy = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    files = {part: str(data / f"{part}.jsonl.gz") for part in ("train", "test")}
    rows = load_dataset("json", data_files=files).select_columns(["prompt", "completion"])
    rows = rows.map(lambda row: {"prompt": row["prompt"] + "\n"})

    sentences = [tokenizer(text, return_tensors="pt") for text in rows["train"]["prompt"][:64]]
    opt = finetooth.build("gift-sw", policy, lr=3e-3, keep=8, calibration=sentences)  # the one line

    args = SFTConfig(
        output_dir="runs/sft",
        max_steps=steps,
        per_device_train_batch_size=16,
        lr_scheduler_type="cosine",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = SFTTrainer(
        policy,
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"].select(range(200)),
        processing_class=tokenizer,
        optimizers=(opt, None),
        callbacks=[finetooth.SelectiveCallback(opt)],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    typer.echo(f"loss on the test rows: {before:.4f} -> {trainer.evaluate()['eval_loss']:.4f}")
    typer.echo(f"{opt.verify_frozen()} tensors checked: nothing moved outside the chosen columns")
    delta = finetooth.Delta.extract(policy, opt)
    delta.save("runs/sft/delta.safetensors")
    typer.echo(f"runs/sft/delta.safetensors: {delta.info()['changed']:,} weights, {delta.info()['bytes']:,} bytes")


if __name__ == "__main__":
    typer.run(main)
