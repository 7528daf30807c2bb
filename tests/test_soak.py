"""A training that is killed again and again, in the middle of a step or of a write, ends bit for bit like one left alone (CPU, float32)."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dccot_jax.stopping import STOPPED

KILLS = 20


@pytest.mark.slow
def test_twenty_kills_at_random_steps_leave_no_trace(tmp_path):
    seed = int(os.environ.get("DCCOT_KILL_SEED") or random.SystemRandom().randrange(1 << 31))
    print(f"seed {seed} (set DCCOT_KILL_SEED to repeat)")
    driver = Path(__file__).parent / "soak_driver.py"
    done = subprocess.run([sys.executable, str(driver), str(tmp_path), str(seed), str(KILLS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"seed {seed}\n{done.stderr[-4000:]}"
    report = json.loads(done.stdout.strip().splitlines()[-1])
    first, *middle, last = report["codes"]
    assert first == last == 0, f"seed {seed}: {report['codes']}\n{done.stderr[-4000:]}"
    assert middle.count(-signal.SIGKILL) == KILLS - KILLS // 5 and middle.count(STOPPED) == KILLS // 5, f"seed {seed}: {middle}"
    assert report["killed"] == report["alone"], f"seed {seed}"
