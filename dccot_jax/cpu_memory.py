"""Memory of compiled programs on a CPU: kept by the process between runs of a program, instead of asked for anew each time.

XLA allocates what a program needs besides arguments and results each time it runs. Blocks of this size glibc takes from the kernel
and gives back at once, and the kernel clears them page by page: 2 µs for 4 KiB, a tenth of the CPU time of a gradient pass that
keeps its activations. With the two settings of `keep` (mallopt(3)) freed blocks stay with the process, which then holds its
peak until it ends. Only the first thread's heap can grow so far, so programs are run from the thread that calls them.
"""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of malloc.h


def keep() -> bool:
    """Keep freed memory, where programs run on the one CPU device of this process; True if that is so.

    To be called before anything touches JAX's devices, on the main thread. It does nothing where there are accelerators, several CPU
    devices or processes, or another C library, and leaves what the user chose ($GLIBC_TUNABLES, $MALLOC_...) alone.
    """
    import jax

    chosen = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    several = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or jax.config.jax_num_cpu_devices > 1
    if chosen or several or platform.libc_ver()[0] != "glibc" or jax.distributed.is_initialized():
        return False
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # read when the devices are made
    if jax.default_backend() != "cpu":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, -1))
