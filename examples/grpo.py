"""TRL's GRPOTrainer with a reward of one line: stories in which somebody speaks.

python examples/grpo.py                                     # beginnings of TinyStories, in the package
python examples/grpo.py path/to/stories.txt.xz --steps 60
"""

import lzma
from pathlib import Path

import torch
import typer
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import finetooth
from finetooth import embedded

MODEL = str(embedded.path("stories260K"))
DATA = embedded.path("tinystories")


def speaks(completions: list[str], **_: object) -> list[float]:
    """1 for a text with direct speech."""
    return [float('"' in text) for text in completions]


def main(data: Path = DATA, model: str = MODEL, steps: int = 40) -> None:
    """Fine-tune, and say how the reward and the distance to the base have grown."""
    with lzma.open(data, "rt", encoding="utf-8") as file:
        stories = [text.strip() for text in file.read().split("<|endoftext|>") if text.strip()][:2000]
    prompts = Dataset.from_list([{"prompt": " ".join(t.split()[:8])} for t in stories])
    tokenizer, policy = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)

    opt = finetooth.build("grad", policy, lr=3e-3, keep=0.1)  # the one line

    args = GRPOConfig(
        output_dir="runs/grpo",
        max_steps=steps,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=48,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    told = {"processing_class": tokenizer, "optimizers": (opt, None), "callbacks": [finetooth.SelectiveCallback(opt)]}
    trainer = GRPOTrainer(policy, reward_funcs=speaks, args=args, train_dataset=prompts, **told)
    trainer.beta, trainer.ref_model = 0.04, finetooth.Reference(policy, opt)  # beta in args loads a second model
    trainer.train()
    lines = [line for line in trainer.state.log_history if "reward" in line]
    typer.echo(f"stories in which somebody speaks: {lines[0]['reward']:.2f} -> {lines[-1]['reward']:.2f}")
    typer.echo(f"KL to the base: {lines[0]['kl']:.4f} -> {lines[-1]['kl']:.4f}")
    typer.echo(f"{opt.verify_frozen()} tensors checked: nothing moved outside the selection")


if __name__ == "__main__":
    typer.run(main)
