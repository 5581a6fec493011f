"""Our side of PEFT's MetaMathQA script: what it is given instead of its functions does what the script expects of those."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetooth
from finetooth import embedded

KIT = Path(__file__).resolve().parents[2] / "benchmarks" / "peft_method_comparison" / "run.py"
MODEL = str(embedded.path("stories260K"))


@pytest.fixture(scope="module")
def kit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peft_kit", KIT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Script(ModuleType):
    """The names of PEFT's script that are replaced, and its order of calls: optimizer, steps without clipping, size."""

    def __init__(self) -> None:
        super().__init__("run")
        self.get_tokenizer = self.get_optimizer_and_scheduler = self.get_file_size = None
        self.train = self._train

    def _train(
        self, *, model: Any, batch_size: int, optimizer_kwargs: dict[str, Any], query_template: str
    ) -> SimpleNamespace:
        make: Any = self.get_optimizer_and_scheduler
        optimizer, schedule = make(
            model, optimizer_type="AdamW", max_steps=4, lr_scheduler_arg="cosine", **optimizer_kwargs
        )
        rates = []
        for _ in range(4):
            optimizer.zero_grad()
            ids = torch.arange(20).view(2, 10)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            schedule.step()
            rates.append(schedule.get_last_lr()[0])
        return SimpleNamespace(num_trainable_params=0, rates=rates, error_msg="")


@pytest.mark.parametrize(("row", "options"), [("magnitude", {"keep": 0.01}), ("gmt", {"keep": 0.2}), ("full", {})])
def test_a_row_in_the_place_of_the_optimizer(
    row: str, options: dict[str, Any], kit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "utils", SimpleNamespace(WARMUP_STEP_RATIO=0.25))
    script, model = Script(), AutoModelForCausalLM.from_pretrained(MODEL)
    ours = kit.Row(script, row, options, 2, MODEL, tmp_path)
    kwargs = {"lr": 1e-3, "weight_decay": 0.1, "finetooth": {"row": row}}
    result = script.train(model=model, batch_size=4, optimizer_kwargs=kwargs, query_template="{query}")
    assert result.rates[0] == 1e-3, "one step of warm-up"
    assert result.rates[-1] == 0.0
    chosen = ours.optimizer.selections()
    total = sum(p.numel() for p in model.parameters())
    assert result.num_trainable_params == (sum(s.numel for s in chosen.values()) if row != "full" else total)
    size: Any = script.get_file_size
    assert (
        size(model, peft_config=None, clean=True, print_fn=lambda _: None)
        == (tmp_path / "delta.safetensors").stat().st_size
    )
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    finetooth.Delta.load(tmp_path).apply(base)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), model.parameters(), strict=True))


def test_what_a_recipe_would_fill_in(kit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of the run for `spiel`; for `ssu` batches of what must not be forgotten, not of what is trained on."""
    monkeypatch.setitem(sys.modules, "utils", SimpleNamespace(WARMUP_STEP_RATIO=0.25))
    build, given = finetooth.build, list[dict[str, Any]]()
    monkeypatch.setattr(finetooth, "build", lambda *a, **k: (given.append(k), build(*a, **k))[1])
    (text := tmp_path / "source.txt").write_text(
        "A cat.\n<|endoftext|>\nThe dog ran to the park.\n<|endoftext|>\nA ball.\n"
    )
    for row, source in (("spiel", None), ("ssu", text)):
        model = AutoModelForCausalLM.from_pretrained(MODEL)
        ours = kit.Row(script := Script(), row, {}, 2, MODEL, tmp_path, source)
        ours.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        ours.tokenizer.pad_token = ours.tokenizer.eos_token
        script.train(model=model, batch_size=2, optimizer_kwargs={"lr": 1e-3}, query_template="{query}")
    assert given[0]["steps"] == 4
    assert "steps" not in given[1]
    first, second = given[1]["calibration"]
    assert "dog ran" in ours.tokenizer.decode(first["input_ids"][1])
    assert first["labels"][0].tolist().count(-100) > 0, "padding is not learnt"
    assert len(second["input_ids"]) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--row", "ssu"], "give texts of that, --source TEXT"),
        (["--row", "gmt", "--source", __file__], "--source is not read by gmt"),
        (["--row", "ssu", "--source", "nowhere.txt"], "there is no file nowhere.txt"),
    ],
)
def test_sources(
    given: list[str], said: str, kit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--peft", "peft", *given])
    with pytest.raises(SystemExit):
        kit.arguments()
    assert said in capsys.readouterr().err


def test_the_experiment_is_where_the_script_looks(kit: ModuleType, tmp_path: Path) -> None:
    path = kit.experiment(tmp_path, "a", {"grad_norm_clip": 0})
    assert Path(path).parts == ("experiments", "finetooth", "a"), "PEFT's validate_experiment_path wants three parts"
    assert json.loads((tmp_path / path / "training_params.json").read_text()) == {"grad_norm_clip": 0}


def test_the_main_of_older_and_newer_scripts(kit: ModuleType) -> None:
    """`bucket_name` came in the summer of 2026; an error that the script only writes down is one here."""
    called: list[dict[str, Any]] = []

    def newer(*, path_experiment: str, experiment_name: str, clean: bool, bucket_name: str | None) -> None:
        called.append({"path": path_experiment, "name": experiment_name, "clean": clean, "bucket": bucket_name})

    def older(*, path_experiment: str, experiment_name: str, clean: bool) -> None:
        called.append({"path": path_experiment, "name": experiment_name, "clean": clean})

    for main in (newer, older):
        run = SimpleNamespace(main=main, validate_experiment_path=lambda path: f"name of {path}")
        kit.play(run, "a/b/c", SimpleNamespace(error=""))
    told = {"path": "a/b/c", "name": "name of a/b/c", "clean": True}
    assert called == [{**told, "bucket": None}, told]
    with pytest.raises(SystemExit, match="did not end: out of memory"):
        kit.play(run, "a/b/c", SimpleNamespace(error="out of memory"))


@pytest.mark.parametrize("key", ["grad_norm_clip", "optimizer_kwargs", "optimizer_type"])
def test_what_is_not_for_params(
    key: str, kit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--peft", "peft", "--row", "full", "--params", json.dumps({key: 1})])
    with pytest.raises(SystemExit):
        kit.arguments()
    assert f"{key} is set by" in capsys.readouterr().err


def test_no_checkout(kit: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="git clone"):
        kit.opened(tmp_path)


@pytest.mark.parametrize(("row", "more", "said"), [("gmt", ["--set", "kep=1"], "kep"), ("rows", [], "needs rows=")])
def test_an_option_is_refused_before_anything_is_loaded(
    row: str, more: list[str], said: str, kit: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--peft", "no such folder", "--row", row, *more])
    with pytest.raises(SystemExit, match=f"^--set: .*{said}"):
        kit.main()
