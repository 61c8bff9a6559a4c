"""A compiled function on torch's own threads.

A second set of threads beside torch's would fight with it for the cores: OpenMP's threads spin for a while after each
of torch's products, ready for the next. So we borrow them, by the entry point that compilers use for a parallel region.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch


@cache
def _parallel() -> Any:
    """GOMP_parallel(function, data, threads, flags) of the OpenMP that torch runs on: GNU's, or Intel's or LLVM's,
    which have it as well. None if torch was built without."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # Looked up in the library and in those it depends on: not in another OpenMP that somebody else loaded.
        found = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    found.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    found.restype = None
    return found


def run_on_threads(function: Any, data: int, threads: int) -> None:
    """`function`, a ctypes function of an address (it must not raise), once on each of up to `threads` threads, the
    caller's among them. Returns when all have. The GIL is not held."""
    parallel = _parallel() if threads > 1 else None
    if parallel is None:
        function(data)
    else:
        parallel(ctypes.cast(function, ctypes.c_void_p), data, threads, 0)
