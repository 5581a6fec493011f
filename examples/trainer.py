"""transformers.Trainer on plain text: `gmt`, every weight may move, the large gradients of every step decide which do.

python examples/trainer.py                                  # TinyStories, in the package
python examples/trainer.py path/to/stories.txt.xz --steps 200
"""

import lzma
from pathlib import Path

import typer
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import finetooth
from finetooth import embedded

MODEL = str(embedded.path("stories260K"))
DATA = embedded.path("tinystories")


def main(data: Path = DATA, model: str = MODEL, steps: int = 60) -> None:
    """Fine-tune on documents that lines of <|endoftext|> separate; the last tenth is for evaluation."""
    with lzma.open(data, "rt", encoding="utf-8") as file:
        stories = [text.strip() for text in file.read().split("<|endoftext|>") if text.strip()][:2000]
    tokenizer, policy = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = Dataset.from_dict(dict(tokenizer(stories, truncation=True, max_length=256))).train_test_split(
        0.1, shuffle=False
    )

    opt = finetooth.build("gmt", policy, lr=3e-4, keep=0.2)  # the one line

    args = TrainingArguments(
        output_dir="runs/trainer",
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(
        policy,
        args,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        optimizers=(opt, None),
        callbacks=[finetooth.SelectiveCallback(opt)],  # true figures in the logs, contradictions refused
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    typer.echo(f"loss on stories it has not seen: {before:.4f} -> {trainer.evaluate()['eval_loss']:.4f}")


if __name__ == "__main__":
    typer.run(main)
