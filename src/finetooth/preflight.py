"""What a person should know about the data before training starts: counted for each file, each thing said once.

Nothing here stops a run: what must stop it is a DataError while the rows are read. Both `finetooth train` and
`finetooth data preview` say all of it, the second without loading a weight.

    lengths      rows that train.max_length cuts, and those that lose all that bears loss
    labels       rows whose answer is empty
    templates    what a template leaves out, and a generation prompt that is missing, or is not what training sees
    end          no row teaches a token at which generation stops
    leakage      evaluation rows that are training rows as well

Not covered: near duplicates, and rows whose labels are wrong.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, GenerationConfig

from finetooth import checkpoint
from finetooth.data import Flaw, Prepared, Tokens

SAID: dict[Flaw, str] = {
    "prompt unread": "data.template leaves out the prompt",
    "content unread": "the chat template leaves out or rewrites what a message says",
    "tools unread": "tools are not read: the chat template is given the messages only",
    "no header": "the chat template has no generation prompt, so the answer's own header is learnt and must be generated",
    "asked otherwise": (
        "the chat template's generation prompt is not, token for token, what stands before the answers (evaluation asks with "
        "it, as a server does, and training does not see all of it)"
    ),
    "empty": "the answer is empty, so that only its end is learnt",
    "choices cut": "a choice does not fit into train.max_length, which counts as a miss",
}


def remarks(learn: Prepared, test: Prepared | None, ends: set[int]) -> list[str]:
    """All there is to say, if anything, about training rows and evaluation rows; `ends` are the tokens at which generation stops."""
    out = about(learn, "training")
    if not any(ends.intersection(e.labels) for e in learn.examples):
        out.append("no row teaches the end-of-sequence token: generations will not stop by themselves.")
    if test is not None:
        out += about(test, "evaluation")
        if both := in_both(learn, test):
            out.append(f"asked in the training rows as well, word for word: {both} of {test.rows} evaluation rows.")
    return out


def about(found: Prepared, of: str) -> list[str]:
    """What there is to say about one file; `of` is training or evaluation."""
    out, rows = [], f"of {found.rows} {of} rows"
    if found.truncated:
        out.append(
            f"cut to train.max_length: {found.truncated} {rows}, which lose the end of the answer; the longest has "
            f"{found.longest} tokens."
        )
    if found.lost:
        counted = "" if of == "training" else "; they count as misses"
        out.append(f"left out, as the cut takes all that bears loss: {len(found.lost)} {rows}{counted}.")
    return out + [f"{words}: {found.flaws[flaw]} {rows}." for flaw, words in SAID.items() if found.flaws[flaw]]


def in_both(learn: Prepared, test: Prepared) -> int:
    """How many evaluation rows have the prompt of a training row, or its text where there is no prompt."""
    seen = {_asked(e) for e in learn.examples + learn.lost}
    return sum(_asked(e) in seen for e in test.examples + test.lost)


def _asked(e: Tokens) -> tuple[int, ...]:
    return tuple(e.asked or e.ids)


def stops(model: str, tokenizer: Any) -> set[int]:
    """The tokens at which generation stops: those of the model's generation config, else the tokenizer's own."""
    source = str(checkpoint.resolve(model))
    try:
        given = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:  # there is no generation_config.json
        given = getattr(AutoConfig.from_pretrained(source), "eos_token_id", None)
    ids = given if isinstance(given, list) else [tokenizer.eos_token_id if given is None else given]
    return {i for i in ids if i is not None}
