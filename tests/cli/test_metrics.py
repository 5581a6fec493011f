"""Numbers against numbers: made by hand, by the libraries, and by the plainest loop that gives them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetooth import embedded, evaluate, overlap
from finetooth.data import IGNORE, Choices, Tokens


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded.path("stories260K"))


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(embedded.path("stories260K"), dtype=torch.float32)


class Bigram(nn.Module):
    """The next token by a table of probabilities."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table).log())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


PAD, ASK, A, B = range(4)
TABLE = [[0.25] * 4, [0.05, 0.05, 0.5, 0.4], [0.25] * 4, [0.025, 0.025, 0.05, 0.9]]


def asked(choices: list[list[int]], right: int) -> Tokens:
    return Tokens([ASK, A], [IGNORE, A], 1, asked=[ASK], choices=Choices(choices, [len(c) for c in choices], right))


def test_choices_by_hand() -> None:
    """p(a) = 0.5, p(bb) = 0.4 * 0.9 = 0.36: `a` is likelier; for each character `bb` is: ln(0.36) / 2 > ln(0.5)."""
    model, rows = Bigram(TABLE), [asked([[A], [B, B]], 1), asked([[B, B], [A]], 1), asked([[A], [B]], 0)]
    for batch in (1, 2, 16):
        found = evaluate.choice_accuracy(model, rows, PAD, batch)
        assert found == {"choice_accuracy": 2 / 3, "choice_accuracy_per_character": 2 / 3}
    assert evaluate.choice_accuracy(model, rows[:1], PAD, 4) == {
        "choice_accuracy": 0.0,
        "choice_accuracy_per_character": 1.0,
    }
    assert evaluate.choice_accuracy(model, rows, PAD, 4, rows=6)["choice_accuracy"] == 2 / 6  # three were misses


def test_losses_by_hand() -> None:
    rows = [Tokens([ASK, B, B], [IGNORE, B, B], 1), Tokens([ASK, A], [IGNORE, A], 1), Tokens([A, B], [A, IGNORE], 0)]
    expected = [-math.log(0.36), -math.log(0.5), 0.0]
    model = Bigram(TABLE)
    assert evaluate.summed_losses(model, rows, PAD, 2) == pytest.approx(expected, rel=1e-6)  # float32's seven digits
    assert evaluate.task_loss(model, rows, PAD) == pytest.approx(sum(expected) / 3, rel=1e-6)


def test_batches_change_nothing(model: Any, tokenizer: Any) -> None:
    """Against one example at a time and the model's own loss. Padding only changes the order of sums: 1e-4 is ten times that."""
    texts = [
        "Once upon a time",
        "a",
        "The cat sat on the mat and it was very happy.",
        "Lily likes to play with her toys. ",
    ]
    rows = [Tokens(ids, [IGNORE, *ids[1:]], 1) for ids in (tokenizer(t)["input_ids"] for t in texts)]
    with torch.no_grad():
        alone = [float(model(torch.tensor([r.ids]), labels=torch.tensor([r.labels])).loss) for r in rows]
    expected = [loss * (len(r.ids) - 1) for loss, r in zip(alone, rows, strict=True)]
    for batch in (1, 3, 64):
        assert evaluate.summed_losses(model, rows, 0, batch) == pytest.approx(expected, rel=1e-4)


def test_general_loss_is_of_all_tokens(model: Any, tokenizer: Any) -> None:
    """Long and short documents: every token weighs the same, and windows after the first lose one token each."""
    documents = ["Once upon a time there was a little girl who had a red ball.", "Tom ran."]
    total, count = 0.0, 0
    for document in documents:
        ids = tokenizer(document)["input_ids"]
        for start in range(0, len(ids), 8):
            window = torch.tensor([ids[start : start + 8]])
            if window.shape[1] > 1:
                total += float(model(window, labels=window).loss.detach()) * (window.shape[1] - 1)
                count += window.shape[1] - 1
    assert evaluate.general_loss(model, tokenizer, documents, 8) == pytest.approx(total / count, rel=1e-4)


def test_rows_of_bfloat16_are_summed_in_float32() -> None:
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1)).bfloat16()
    labels = torch.tensor([[0, 1, 2, 3, 4], [IGNORE] * 5, [IGNORE, 6, IGNORE, 5, IGNORE]])
    log = logits.double().log_softmax(-1)
    expected = [
        -sum(float(log[i, t - 1, y]) for t, y in enumerate(row) if t and y != IGNORE)
        for i, row in enumerate(labels.tolist())
    ]
    found = evaluate.by_row(logits, labels)
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx(expected, rel=1e-6)


def test_bleu_by_hand() -> None:
    """Of five words four are right, of their n-grams 4/5, 3/4, 2/3 and 1/2: the fourth root of 0.2."""
    sacrebleu = pytest.importorskip("sacrebleu", reason="BLEU is sacrebleu's: pip install 'finetooth[eval]'")
    assert overlap.bleu(["a b c d e"], [["a b c d f"]]) == pytest.approx(100 * 0.2**0.25, abs=1e-9)
    texts = ["a b c d e", "the cat sat on the mat", ""]
    references = [["a b c d f"], ["the cat sat on a mat", "a cat was on the mat"], ["nothing came of this"]]
    streams = [[r[0] for r in references], [None, references[1][1], None]]
    assert overlap.bleu(texts, references) == sacrebleu.corpus_bleu(texts, streams).score
    assert overlap.bleu(texts[1:2], [references[1][1:]]) < overlap.bleu(texts[1:2], references[1:2])


def test_rouge_by_hand() -> None:
    pytest.importorskip("rouge_score", reason="ROUGE is rouge-score's: pip install 'finetooth[eval]'")
    text, reference = "the cat sat", "the cat is here"  # two of three and four words, one of two and three pairs
    expected = {"rouge1": 4 / 7, "rouge2": 2 / 5, "rougeL": 4 / 7}
    assert overlap.rouge([text], [[reference]]) == pytest.approx(expected)
    assert overlap.rouge([text], [["nothing", reference]]) == pytest.approx(expected)  # the best reference
    halves = {kind: value / 2 for kind, value in expected.items()}
    assert overlap.rouge([text, ""], [[reference], [reference]]) == pytest.approx(halves)  # the mean over rows


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "find_spec", lambda name: None)
    overlap.check("choice")
    for task, package in (("bleu", "sacrebleu"), ("rouge", "rouge-score")):
        with pytest.raises(ValueError, match=rf"{task} needs {package}: pip install 'finetooth\[eval\]'"):
            overlap.check(task)
