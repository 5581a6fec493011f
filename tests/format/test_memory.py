"""Applying, taking off and verifying a checkpoint holds one tensor and its change."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import delta_files

# One tensor has 32 MiB, the model 96. Beside a tensor there are its change (a hundredth of the entries, at most 24 bytes
# each while they are decoded and scattered: 4 MiB), modules that are imported late, and what the allocator keeps.
SLACK = 20


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is set back through /proc"
)
def test_the_peak_is_one_tensor_and_its_change() -> None:
    found = {line["way"]: line for line in delta_files.peaks(argparse.Namespace(side=4096, tensors=3), {})}
    assert len(found) == 6
    too_much = {way: line["peak_mb"] for way, line in found.items() if line["peak_mb"] > line["largest_mb"] + SLACK}
    assert not too_much
    assert all(line["whole_mb"] > line["largest_mb"] + 2 * SLACK for line in found.values())  # else this shows nothing
