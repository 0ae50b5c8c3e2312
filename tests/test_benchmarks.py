"""The benchmarks' checks, in a process of their own.

What they import to compare with (SpeechBrain patches torch's loader) and what they silence must not
reach other tests.
"""

from __future__ import annotations

import re
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
from torch.distributed import checkpoint as dcp

CHECKS = Path(__file__).with_name("_benchmark_checks.py")


@pytest.mark.ratios
def test_ratios_hold_with_wide_margins_and_each_check_can_fail():
    """Saving, loading, finding, idle cost, import and memory, against other libraries."""
    # Not the options of this run: no doctests, no selection by marker.
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", str(CHECKS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # Nothing was left out, nor skipped but with an older torch; some checks have several cases.
    (last,) = re.findall(r"^\d+ passed.*$", done.stdout, re.MULTILINE)
    older = "no_dist" not in signature(dcp.async_save).parameters
    assert older or "skipped" not in last
    skipped = 4 if older else 0
    assert int(last.split()[0]) + skipped >= CHECKS.read_text().count("\ndef test_")
