"""How near generated texts come to their references: BLEU and ROUGE, each by the library that others report it with.

    bleu                   corpus BLEU of sacrebleu, 0 to 100: tokenizer 13a, exponential smoothing, case kept
    rouge1 rouge2 rougeL   F-measures of rouge-score, 0 to 1, without stemming: the best reference of a row, the mean over rows

sacrebleu: Post, "A Call for Clarity in Reporting BLEU Scores", arXiv 1804.08771. rouge-score is Google Research's rewriting of
ROUGE-1.5.5 (Lin, 2004). An own BLEU would be twenty lines and comparable with nobody's.

Both come with the extra `eval` and are imported when they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import zip_longest

ROUGE = ("rouge1", "rouge2", "rougeL")
LIBRARIES = {"bleu": ("sacrebleu", "sacrebleu"), "rouge": ("rouge_score", "rouge-score")}  # task: module, package


def check(task: str) -> None:
    """Raise ValueError if the library of a task is not installed."""
    if task in LIBRARIES and find_spec(LIBRARIES[task][0]) is None:
        raise ValueError(f"evaluate.task: {task} needs {LIBRARIES[task][1]}: pip install 'finetooth[eval]'.")


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU, 0 to 100. `references[i]` are those of `texts[i]`, as many as it has."""
    from sacrebleu import corpus_bleu

    streams = [list(stream) for stream in zip_longest(*references)]  # None where a row has no more
    return float(corpus_bleu(list(texts), streams).score)


def rouge(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L, 0 to 1. `references[i]` are those of `texts[i]`."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE, use_stemmer=False)
    found = [scorer.score_multi(list(known), text) for text, known in zip(texts, references, strict=True)]
    return {kind: sum(f[kind].fmeasure for f in found) / max(len(found), 1) for kind in ROUGE}
