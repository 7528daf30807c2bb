"""SIGKILL in every stage, mid-write and mid-checkpoint included, then the same command: the same logical hashes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_in_every_stage_ends_like_an_undisturbed_run(tmp_path):
    seed = int(os.environ.get("DCCOT_KILL_SEED") or random.SystemRandom().randrange(1 << 31))
    print(f"seed {seed} (set DCCOT_KILL_SEED to repeat)")
    driver = Path(__file__).parent / "kill_driver.py"
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, str(driver), str(tmp_path), str(seed), "5"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, f"seed {seed}\n{done.stderr[-4000:]}"
    result = json.loads(done.stdout.strip().splitlines()[-1])
    print({stage: Counter(outcomes) for stage, outcomes in result["kills"].items()})
    assert result["last"] == "finished"
    assert result["rough"] == result["quiet"], f"seed {seed}"
    finished = Counter(entry["finished"] for entry in result["journal"] if "finished" in entry)
    chunks = Counter(entry["chunk"] for entry in result["journal"] if "chunk" in entry)
    assert finished and max(finished.values()) == 1, f"seed {seed}: a finished stage was repeated: {finished.most_common(3)}"
    assert chunks and max(chunks.values()) == 1, f"seed {seed}: a committed chunk was repeated: {chunks.most_common(3)}"
    for stage, outcomes in result["kills"].items():
        hits = sum(outcome in ("killed", "killed itself") for outcome in outcomes)
        assert hits >= 5, f"seed {seed}: {stage} was killed {hits} times: {outcomes}"
    assert result["kills"]["train"][0] == "killed", f"seed {seed}: the kill in mid-checkpoint did not hit"
