"""Every file in `attacks/` is refused with its own message, at once, and with nothing changed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from finetooth.delta import Delta, DeltaError
from tests.format.attacks import make

pytestmark = pytest.mark.usefixtures("loops")

HERE = make.HERE
NOT_WHOLE = "is not a whole safetensors file: "
NAME = "'layers.0.weight'"
PRINTABLE = "expected 1 to 1024 printable characters"
SAYS = {
    "header-longer-than-the-file": NOT_WHOLE,
    "header-of-2-to-the-63": NOT_WHOLE,
    "header-of-2-to-the-64-less-1": NOT_WHOLE,
    "header-of-no-bytes": NOT_WHOLE,
    "header-nested-deeply": NOT_WHOLE,
    "header-with-a-thousand-empty-tensors": "has, beyond what its metadata lists, 'x0' and 999 more",
    "header-with-a-key-twice": "is not a whole safetensors file: a key is there twice",
    "offsets-overlap": NOT_WHOLE,
    "offsets-the-same": NOT_WHOLE,
    "offsets-backwards": NOT_WHOLE,
    "offsets-of-no-bytes": NOT_WHOLE,
    "offsets-with-a-hole": NOT_WHOLE,
    "offsets-past-the-end": NOT_WHOLE,
    "shape-of-nothing-times-2-to-the-63": "the file has, beyond what its metadata lists, 'x'",
    "shape-that-overflows": NOT_WHOLE,
    "index-twice": f"the index of {NAME} is not strictly increasing",
    "index-unsorted": f"the index of {NAME} is not strictly increasing",
    "index-negative": f"the index of {NAME} is out of range: it has an id of -1, the tensor 8 units",
    "index-past-the-end": f"the index of {NAME} is out of range: it has an id of 8, the tensor 8 units",
    "index-the-largest": f"the index of {NAME} is out of range: it has an id of 2147483647,",
    "index-overflows-32-bits": f"the index of {NAME} is out of range: it has an id of 4294967302,",
    "value-not-a-number": f"{NAME} has new values that are not finite",
    "value-infinite": f"{NAME} has new values that are not finite",
    "count-too-small": f"{NAME} has changed 2: expected a whole number from 1 to 1",
    "count-huge": f"{NAME} has count 4611686018427387904: expected a whole number from 1 to 8",
    "changed-more-than-there-is": f"{NAME} has changed 3: expected a whole number from 1 to 2",
    "shape-smaller": f"the index of {NAME} is out of range: it has an id of 6, the tensor 6 units",
    "shape-huge": "no tensor is that large",
    "shape-of-hundreds": f"{NAME} has shape [1, 1, 1",
    "dtype-another": f"the values of {NAME} are F32 [2, 1]: expected torch.bfloat16",
    "unit-a-row": f"the index of {NAME} is out of range: it has an id of 6, the tensor 2 units",
    "unit-a-block-of-billions": f"{NAME} has count 2: expected a whole number from 1 to 1",
    "fingerprints-the-same": f"{NAME} has the fingerprints",
    "fingerprint-of-another-kind": "expected two different ones, sha256:<64 hex digits>",
    "version-newer": "format version 99 is newer than this library reads",
    "version-of-other-digits": "expected a whole number",
    "index-coding-unknown": f"{NAME} has index_coding 'zip'",
    "value-coding-unknown": f"{NAME} has value_coding 'pickle'",
    "recipe-nested-deeply": "recipe is not JSON",
    "recipe-a-number-of-5000-digits": "recipe is not JSON: Exceeds the limit",
    "recipe-an-infinite-number": "recipe is not JSON: 1e999 is not JSON",
    "recipe-half-a-character": "recipe is not JSON: 'utf-8' codec can't encode character",
    "base-with-a-key-twice": "base is not JSON: a key is there twice",
    "tensors-with-a-key-twice": "tensors is not JSON: a key is there twice",
    "name-empty": PRINTABLE,
    "name-with-nul": rf"a tensor is called 'layers.0\x00.weight': {PRINTABLE}",
    "name-with-an-escape-sequence": rf"a tensor is called '\x1b[2Jlayers.0.weight': {PRINTABLE}",
    "name-that-turns-writing-around": rf"a tensor is called 'layers.0.\u202ethgiew': {PRINTABLE}",
    "name-with-an-invisible-letter": rf"a tensor is called 'layers.0.\u200bweight': {PRINTABLE}",
    "name-of-5000-letters": PRINTABLE,
    "tied-and-given-twice": f"tied says that {NAME} is 'head.weight': an alias names a tensor, and has no entry itself",
    "tied-in-a-chain": "tied says that 'a' is 'b'",
    "tied-to-itself": "tied says that 'a' is 'a'",
    "two-tensors-in-one-place": NOT_WHOLE,
}
# Of files that load: what is said when they are applied.
REFUSED = {
    "lie-of-a-value": "do not give the tensor that the delta promises",
    "lie-of-an-index": "do not give the tensor that the delta promises",
    "lie-of-the-result": "do not give the tensor that the delta promises",
    "lie-of-the-base": f"{NAME} is not that of org/name: expected sha256:{'0' * 64}, found sha256:",
    "lie-of-how-many-changed": f"says that it changes 1 entries of {NAME}: it changes 2",
    "lie-of-the-shape": f"{NAME} is F32 [2, 4], and F32 [4, 2] in the delta",
    "name-a-path-up": "the target has no '../../layers.0.weight'",
    "name-a-path-from-the-root": "the target has no '/etc/layers.0.weight'",
    "name-of-a-look-alike": "the target has no 'l\u0430yers.0.weight'",
}


def model() -> dict[str, torch.Tensor]:
    return {"layers.0.weight": torch.tensor(make.OLD).reshape(make.SHAPE), "other": torch.ones(2)}


def test_every_attack_has_its_file_and_its_message() -> None:
    files = {p.stem: p.read_bytes() for p in HERE.glob("*.safetensors")}
    assert set(SAYS) == set(make.ATTACKS) and set(REFUSED) == set(make.LIARS)
    assert files == {name: make.made(name) for name in (*SAYS, *REFUSED)}, "python -m tests.format.attacks.make"
    assert max(map(len, files.values())) < 300_000


def test_without_the_attack_it_is_a_good_file(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(make.Draft().bytes())
    x = model()
    Delta.load(tmp_path / "good").apply(x)
    assert x["layers.0.weight"].flatten().tolist() == make.tuned()


@pytest.mark.parametrize("attack", SAYS)
def test_a_file_that_is_refused(attack: str) -> None:
    path = HERE / f"{attack}.safetensors"
    with pytest.raises(DeltaError, match=re.escape(SAYS[attack])) as caught:
        Delta.load(path)
    message = str(caught.value)
    assert message.startswith(path.name) and len(message) < 1100 and message.isprintable()


@pytest.mark.parametrize("attack", REFUSED)
def test_a_file_that_lies(attack: str) -> None:
    delta, x = Delta.load(HERE / f"{attack}.safetensors"), model()
    with pytest.raises(DeltaError, match=re.escape(REFUSED[attack])):
        delta.apply(x)
    assert all(torch.equal(t, model()[n]) for n, t in x.items())
