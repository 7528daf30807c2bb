"""Load a checkpoint in a process of its own, or in one of two, and print, as JSON and in bytes, how much anonymous memory that took at
most, and how much of the file was read.

The baseline is taken when JAX has started and every module is in: a tiny checkpoint has been loaded through the same programs.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from pathlib import Path

import jax

from dccot_jax.model.hf import load_hf
from dccot_jax.model.safetensors_io import TensorReader
from dccot_jax.model.sharding import make_mesh


def anonymous() -> int:
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return 1024 * int(found[1])


class Peak(threading.Thread):
    """The largest value of `anonymous` while it runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.value, self.over = 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.001):
            self.value = max(self.value, anonymous())


def main(tiny: str, large: str, dtype: str, fsdp: int, port: str, index: int) -> None:
    if port:
        jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    mesh = make_mesh({"fsdp": fsdp}) if fsdp > 1 else None
    load_hf(tiny, mesh, dtype=dtype, block_bytes=1)
    baseline = anonymous()
    reader = TensorReader(large)
    peak = Peak()
    peak.start()
    _, params = load_hf(large, mesh, dtype=dtype, reader=reader)
    peak.over.set()
    peak.join()
    target = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    read = sum(reader.bytes_read.values())
    print(json.dumps({"above": peak.value - baseline, "end": anonymous() - baseline, "target": target, "read": read}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5], int(sys.argv[6]))
