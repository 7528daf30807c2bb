"""A bucket in memory that answers as Google Cloud Storage does: to fsspec (so to epath) in the process, to tensorstore over HTTP.

As there, a directory is a prefix of names and no thing, there is no append, and a rename is a copy.
"""

from __future__ import annotations

import contextlib
import http.server
import io
import itertools
import json
import sys
import threading
import types
import urllib.parse
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
from fsspec.spec import AbstractFileSystem

OBJECTS: dict[str, bytes] = {}  # "bucket/name" -> contents
_GENERATIONS: dict[str, int] = {}
_COUNTER = itertools.count(1)
_LOCK = threading.RLock()


def put(name: str, data: bytes) -> int:
    with _LOCK:
        OBJECTS[name] = data
        _GENERATIONS[name] = next(_COUNTER)
        return _GENERATIONS[name]


def delete(name: str) -> None:
    with _LOCK:
        OBJECTS.pop(name, None)


def _name(path: str) -> str:
    return path.removeprefix("gs://").removeprefix("gcs://").rstrip("/")


class _Upload(io.BytesIO):
    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def close(self) -> None:
        if not self.closed:
            put(self._name, self.getvalue())
        super().close()


class BucketFileSystem(AbstractFileSystem):
    protocol = ("gcs", "gs")
    cachable = False

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = _name(path)
        with _LOCK:
            below = [name[len(path) + 1 :] for name in OBJECTS if name.startswith(path + "/")]
            if not below:
                return [self.info(path) if detail else path]
            names = sorted({f"{path}/{name.split('/')[0]}" for name in below})
            return [self.info(name) for name in names] if detail else names

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = _name(path)
        with _LOCK:
            if path in OBJECTS:
                return {"name": path, "size": len(OBJECTS[path]), "type": "file"}
            if any(name.startswith(path + "/") for name in OBJECTS):
                return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        path = _name(path)
        if mode == "wb":
            return _Upload(path)
        if mode != "rb":
            raise NotImplementedError(f"mode {mode!r}")
        self.info(path)
        return io.BytesIO(OBJECTS[path])

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        path = _name(path)
        if self.info(path)["type"] == "directory" and not recursive:
            raise IsADirectoryError(path)
        for name in [name for name in OBJECTS if name == path or name.startswith(path + "/")]:
            delete(name)

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        if self.info(path1)["type"] == "file":
            put(_name(path2), OBJECTS[_name(path1)])

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass


class _Handler(http.server.BaseHTTPRequestHandler):
    """What tensorstore asks: read (a range of) an object, write one, delete one, list names."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        bucket, name, query = self._asked()
        if name is None:
            prefix, start, end = query.get("prefix", ""), query.get("startOffset", ""), query.get("endOffset")
            with _LOCK:
                names = sorted(key[len(bucket) + 1 :] for key in OBJECTS if key.startswith(f"{bucket}/{prefix}"))
            items = [{"name": n, "generation": "1", "size": "0"} for n in names if n >= start and (end is None or n < end)]
            self._answer(200, json.dumps({"items": items}).encode())
            return
        with _LOCK:
            data, generation = OBJECTS.get(f"{bucket}/{name}"), _GENERATIONS.get(f"{bucket}/{name}", 0)
        if data is None:
            self._answer(404, b"")
        elif query.get("ifGenerationNotMatch") == str(generation):
            self._answer(304, b"")
        elif query.get("alt") != "media":
            self._answer(200, json.dumps({"name": name, "size": str(len(data)), "generation": str(generation)}).encode())
        elif "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            begin = int(first) if first else len(data) - int(last)
            end_ = min(int(last) + 1, len(data)) if first and last else len(data)
            more = {"Content-Range": f"bytes {begin}-{end_ - 1}/{len(data)}"}
            self._answer(206, data[begin:end_], generation, more)
        else:
            self._answer(200, data, generation)

    def do_POST(self) -> None:
        bucket, _, query = self._asked()
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name = query["name"]
        with _LOCK:
            here = _GENERATIONS.get(f"{bucket}/{name}", 0) if f"{bucket}/{name}" in OBJECTS else 0
            if query.get("ifGenerationMatch", str(here)) != str(here):
                self._answer(412, b"{}")
                return
            generation = put(f"{bucket}/{name}", data)
        self._answer(200, json.dumps({"name": name, "size": str(len(data)), "generation": str(generation)}).encode())

    def do_DELETE(self) -> None:
        bucket, name, _ = self._asked()
        delete(f"{bucket}/{name}")
        self._answer(204, b"")

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _asked(self) -> tuple[str, str | None, dict[str, str]]:
        parts = urllib.parse.urlsplit(self.path)
        query = {key: values[-1] for key, values in urllib.parse.parse_qs(parts.query).items()}
        bucket, _, rest = parts.path.partition("/b/")[2].partition("/o")
        return bucket, urllib.parse.unquote(rest[1:]) if rest else None, query

    def _answer(self, code: int, body: bytes, generation: int | None = None, more: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in (more or {}).items():
            self.send_header(key, value)
        if generation is not None:
            self.send_header("x-goog-generation", str(generation))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def serving(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """While this is open, gs:// paths are in `OBJECTS`."""
    from etils.epath import backend

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_address[1]}")
    patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "x")
    patch.setenv("EPATH_USE_TF", "false")
    before = dict(fsspec.registry)
    for scheme in BucketFileSystem.protocol:
        fsspec.register_implementation(scheme, BucketFileSystem, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    # Orbax asks whether the bucket has real directories.
    storage = types.ModuleType("google.cloud.storage")
    storage.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: types.SimpleNamespace(name=name))  # type: ignore[attr-defined]
    cloud = types.ModuleType("google.cloud")
    cloud.storage = storage  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "google.cloud", cloud)
    patch.setitem(sys.modules, "google.cloud.storage", storage)
    OBJECTS.clear()
    try:
        yield
    finally:
        server.shutdown()
        for scheme in BucketFileSystem.protocol:
            if scheme in before:
                fsspec.register_implementation(scheme, before[scheme], clobber=True)
        backend.fsspec_backend._get_filesystem.cache_clear()
