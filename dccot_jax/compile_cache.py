"""Compiled programs are kept on disk: a command that starts again loads what it compiled before."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

OFF = "off"
_WORTH_SECONDS = 0.1  # of compiling, from which a program is kept; JAX's own default is 1


def enable(folder: str | None = None) -> Path | None:
    """Keep compiled programs in `folder`, by default in ~/.cache/dccot_jax/compiled or what $DCCOT_COMPILE_CACHE names.

    "off" there turns it off. What JAX itself was told (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE) is left alone.

    Returns the directory, or None where it is not ours to set or cannot be written.
    """
    import jax

    folder = folder or os.environ.get("DCCOT_COMPILE_CACHE") or str(_home() / "compiled")
    if folder == OFF or jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return None
    # Code for one CPU may not run on another, and home directories are shared.
    place = Path(folder).expanduser() / f"{platform.machine()}-{_cpu()}"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(place, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_SECONDS)
    return place


def _home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dccot_jax"


def _cpu() -> str:
    """What the CPU can do, as ten digits."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    features = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0] if lines else "")
    return hashlib.sha256(features.encode()).hexdigest()[:10]
