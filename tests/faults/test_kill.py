"""A few of the random moments of `kill.py`; the command in its first lines takes more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc")
@pytest.mark.parametrize("what", ["distill", "experts", "benchmark"])
def test_killed_at_random_moments_it_ends_as_if_undisturbed(what):
    script = Path(__file__).with_name("kill.py")
    done = subprocess.run(
        [sys.executable, str(script), what, "--count", os.environ.get("POTSTILL_KILLS", "3"), "--seed", "1"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["survived"] == told["kills"] >= 3 and told["runs"] >= 1
