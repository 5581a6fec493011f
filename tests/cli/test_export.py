"""`finetooth delta export` makes a folder that a server takes as it is: weights, tokenizer, chat templates, generation settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from finetooth import embedded
from tests.cli.test_delta import ok

TALK = [{"role": "user", "content": "A comb?"}, {"role": "assistant", "content": "With fine teeth."}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """The embedded model with two chat templates and generation settings, in shards; and the same, trained."""
    source = embedded.path("stories260K")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": TEMPLATE, "tool": "TOOL" + TEMPLATE}
    model.generation_config = GenerationConfig(max_new_tokens=7, do_sample=True, top_k=3)
    for name in ("base", "tuned"):
        model.save_pretrained(tmp_path / name, max_shard_size="400KB")
        tokenizer.save_pretrained(tmp_path / name)
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.view(-1)[i % p.numel()] += 0.5
    return tmp_path / "base", tmp_path / "tuned"


def test_a_checkpoint_has_all_that_its_base_had(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    ok("extract", base, tuned, "-o", tmp_path / "d")
    ok("export", tmp_path / "d", "--base", base, "--to", tmp_path / "out")
    names = {str(p.relative_to(base)) for p in base.rglob("*") if p.is_file()}
    assert {"chat_template.jinja", "additional_chat_templates/tool.jinja", "generation_config.json"} <= names
    assert {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()} == names
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index == json.loads((base / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    made, was = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", base))
    for template in (None, "tool"):
        said = [t.apply_chat_template(TALK, chat_template=template, tokenize=False) for t in (made, was)]
        assert said[0] == said[1] and "<user>A comb?" in said[0]
        assert said[0].startswith("TOOL") == (template == "tool")
    assert made("once upon a time")["input_ids"] == was("once upon a time")["input_ids"]


def test_its_logits_are_the_tuned_models(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    ok("extract", base, tuned, "-o", tmp_path / "d")
    ok("export", tmp_path / "d", "--base", base, "--to", tmp_path / "out")
    one, two, three = (
        AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (tmp_path / "out", tuned, base)
    )
    ids = torch.arange(40)[None] % 512
    with torch.no_grad():
        assert torch.equal(one(ids).logits, two(ids).logits)
        assert not torch.equal(one(ids).logits, three(ids).logits)
    assert (one.generation_config.max_new_tokens, one.generation_config.top_k) == (7, 3)
