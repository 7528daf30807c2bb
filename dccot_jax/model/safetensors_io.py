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
from dccot_jax.model.hf_files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_WRITE_BYTES = 8 << 20  # cast and written at a time
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
            others = f"; and {len(problems) - 1:,} more" if problems[1:] else ""
            raise ModelError(f"{self.directory}: {problems[0]}{others}")

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._maps)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._maps[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._maps[name].dtype

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A copy of tensor[index] in the file's dtype; only the pages that hold it are touched."""
        data = np.array(self._maps[name][index])
        self.bytes_read[name] += data.nbytes
        self.largest = max(self.largest, data.nbytes)
        return data

    def _files(self) -> list[str]:
        if (self.directory / INDEX).exists():
            weight_map = read_json(self.directory / INDEX).get("weight_map")
            if not weight_map:
                raise ModelError(f"{self.directory / INDEX}: names no file (weight_map)")
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
            try:
                header = json.loads(stream.read(length))
            except ValueError:
                problems.append(f"{file} is no safetensors file: its header is not JSON")
                return
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


class SafetensorsFile:
    """One file under way: rows of its tensors in any order. Written beside and renamed by `close`.

    Attributes:
      path: where it will be. bytes: its size when whole.
    """

    def __init__(self, path: Path, shapes: Mapping[str, Sequence[int]], dtype: np.dtype):
        """shapes: of the tensors, which lie in this order."""
        header, self.bytes = _header(shapes, dtype)
        self.path, self.dtype, self._shapes = path, dtype, {name: tuple(shape) for name, shape in shapes.items()}
        starts = json.loads(header[8:])
        self._starts = {name: len(header) + starts[name]["data_offsets"][0] for name in shapes}
        self._missing = self.bytes - len(header)
        self._beside = path.with_name(path.name + ".part")
        self._stream = self._beside.open("wb")
        self._stream.write(header)

    def put(self, name: str, array: np.ndarray, row: int = 0) -> None:
        """Rows `row`, `row` + 1, ... of a tensor, each once; cast a few at a time. Raises ModelError if they do not fit it."""
        shape = self._shapes.get(name)
        if shape is None or array.ndim != len(shape) or array.shape[1:] != shape[1:] or row + len(array) > shape[0]:
            raise ModelError(f"{self.path.name}: got rows from {row} of {name} {array.shape}, expected {shape}")
        row_bytes = math.prod(shape[1:]) * self.dtype.itemsize
        self._stream.seek(self._starts[name] + row * row_bytes)
        step = max(1, _WRITE_BYTES // max(1, row_bytes))
        for first in range(0, len(array), step):
            self._stream.write(np.ascontiguousarray(array[first : first + step], self.dtype).view(np.uint8).data)
        self._missing -= len(array) * row_bytes
        if not self._missing:
            self.close()

    def close(self) -> None:
        """Called by the `put` that completes the file, too. Raises ModelError if rows are missing."""
        if self._stream.closed:
            return
        self._stream.close()
        if self._missing:
            raise ModelError(f"{self.path.name}: {self._missing} bytes of its tensors were never written")
        os.replace(self._beside, self.path)


def safetensors_bytes(shapes: Mapping[str, Sequence[int]], dtype: np.dtype) -> int:
    """Size of a whole file."""
    return _header(shapes, dtype)[1]


def write_safetensors(path: Path, shapes: Mapping[str, Sequence[int]], dtype: np.dtype, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    """Write one file from a stream of (name, array), one array held at a time. Raises ModelError if they are not those of `shapes`."""
    file = SafetensorsFile(path, shapes, dtype)
    for name, array in tensors:
        file.put(name, array)
    file.close()


def _header(shapes: Mapping[str, Sequence[int]], dtype: np.dtype) -> tuple[bytes, int]:
    """The header with its length, and the size of the whole file."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start aligned
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + offset
