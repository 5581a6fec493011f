"""Applying, taking off and verifying a checkpoint holds one tensor and its change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import delta_peaks
from finetooth import diff

# One tensor has 32 MiB, the model 96. Beside a tensor there are its change (a hundredth of the entries, at most 24 bytes
# each while they are decoded and scattered: 4 MiB), and what the allocator keeps.
SLACK = 12

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is set back through /proc"
)


def test_the_peak_is_one_tensor_and_its_change() -> None:
    found = {line["way"]: line for line in delta_peaks.measured(4096, 3)}
    assert len(found) == 6
    too_much = {way: line["peak_mb"] for way, line in found.items() if line["peak_mb"] > line["largest_mb"] + SLACK}
    assert not too_much
    assert all(line["whole_mb"] > line["largest_mb"] + 2 * SLACK for line in found.values())  # else this shows nothing


def test_a_difference_takes_a_byte_for_a_flag() -> None:
    """torch's sum of flags takes eight bytes for each: 128 MiB here."""
    old = torch.zeros(4096, 4096, dtype=torch.bfloat16)
    new = old.clone()
    new.view(-1)[::1000] = 1
    diff.change("w", old[:8].clone(), new[:8].clone())  # what is loaded on the way
    Path("/proc/self/clear_refs").write_text("5")
    before = delta_peaks.status("VmHWM")
    assert diff.change("w", old, new) is not None
    assert delta_peaks.status("VmHWM") - before < 4 * old.numel()
