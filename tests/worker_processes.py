"""A test's own file as several real processes that form one JAX run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def reports_of(script: str, folder: Path, processes: int, *, devices: int = 2) -> list[Any]:
    """Run `script FOLDER INDEX PORT` once per process; what each prints as JSON on its last line."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = Path(script)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here.parent.parent)]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    started = [
        subprocess.Popen([sys.executable, str(here), str(folder), str(i), str(port)], env=environment, stdout=-1, stderr=-1, text=True)
        for i in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, outputs):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(text.splitlines()[-1]) for text, _ in outputs]
