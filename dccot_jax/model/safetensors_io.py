"""Safetensors by byte range: read any slice of a tensor without the rest, write a file tensor by tensor.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from dccot_jax.model.config import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: Mapping[str, np.dtype] = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}


class TensorReader:
    """Slices of the tensors in a directory of safetensors files.

    Attributes:
      bytes_read: bytes fetched per tensor name, for tests and for progress. largest: the largest single fetch, in bytes.
    """

    def __init__(self, directory: str | os.PathLike):
        """Raises ModelError: no safetensors file, a missing or torn file, a dtype that is not float32, bfloat16 or float16."""
        self.directory = Path(directory)
        self.bytes_read: Counter[str] = Counter()
        self.largest = 0
        self._maps: dict[str, np.memmap] = {}
        problems: list[str] = []
        for file in self._files():
            self._open(file, problems)
        if problems:
            raise ModelError(f"{self.directory}: " + "; ".join(problems))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._maps)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._maps[name].shape

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A copy of tensor[index] in the file's dtype; only the pages that hold it are touched."""
        data = np.array(self._maps[name][index])
        self.bytes_read[name] += data.nbytes
        self.largest = max(self.largest, data.nbytes)
        return data

    def _files(self) -> list[str]:
        if (self.directory / INDEX).exists():
            weight_map = json.loads((self.directory / INDEX).read_text())["weight_map"]
            return sorted(set(weight_map.values()))
        if (self.directory / SINGLE).exists():
            return [SINGLE]
        raise ModelError(f"{self.directory}: neither {SINGLE} nor {INDEX} is there")

    def _open(self, file: str, problems: list[str]) -> None:
        path = self.directory / file
        if not path.exists():
            problems.append(f"{file} is named in the index and missing")
            return
        size = path.stat().st_size
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))
            if length + 8 > size:
                problems.append(f"{file} is torn: its header is cut off")
                return
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape, (start, end) = DTYPES.get(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
            if dtype is None:
                problems.append(f"{name} has dtype {entry['dtype']}; only {', '.join(DTYPES)} are read")
            elif 8 + length + end > size or end - start != math.prod(shape) * dtype.itemsize:
                problems.append(f"{file} is torn: {name} reaches beyond its end")
            else:
                self._maps[name] = np.memmap(path, dtype, "r", 8 + length + start, shape)


def write_safetensors(path: Path, shapes: Mapping[str, Sequence[int]], dtype: np.dtype, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    """Write one file from a stream of (name, array) in the order of `shapes`; one tensor is held at a time.

    Written beside and renamed. Raises ModelError if the stream does not match `shapes`.
    """
    code = next(code for code, known in DTYPES.items() if known == dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start aligned
    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for expected, (name, array) in zip(shapes, tensors, strict=True):
            if name != expected or tuple(array.shape) != tuple(shapes[expected]):
                raise ModelError(f"{path.name}: got {name} {array.shape}, expected {expected} {tuple(shapes[expected])}")
            stream.write(np.ascontiguousarray(array, dtype).tobytes())
    os.replace(beside, path)
