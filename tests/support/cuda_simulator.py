"""What numba's CUDA simulator lacks for our kernels: the warp's votes and shuffles, and three intrinsics.

For a process started with NUMBA_ENABLE_CUDASIM=1. The simulator runs a block's threads as Python threads; here a warp's
32 threads meet at a barrier, leave their values, meet again and read. A block's threads are waited for, not polled,
which takes the simulator's own loop off the interpreter's lock: several times faster.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numba.cuda.simulator import kernel, kernelapi

WARP = 32
PATIENCE_S = 120  # of a barrier: longer than any case, so that a thread that failed ends the rest


class _Warp:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.values: list[Any] = [0] * size


_warps: dict[tuple[int, int], _Warp] = {}
_lock = threading.Lock()


def _exchange(value: Any) -> list[Any]:
    """Every lane's value, once all lanes of the warp have come."""
    thread = threading.current_thread()
    manager = thread._manager  # type: ignore[attr-defined]  # one a block
    number, lane = divmod(thread.thread_id, WARP)  # type: ignore[attr-defined]
    with _lock:
        warp = _warps.get((id(manager), number))
        if warp is None:
            threads = int(np.prod(manager._block_dim))
            assert threads % WARP == 0, "whole warps only"
            warp = _warps[id(manager), number] = _Warp(WARP)
            warp.manager = manager  # type: ignore[attr-defined]  # keeps its id from being used again
    warp.values[lane] = value
    warp.barrier.wait(timeout=PATIENCE_S)
    values = list(warp.values)
    warp.barrier.wait(timeout=PATIENCE_S)
    return values


def _run_block(manager: Any, grid_point: Any, *args: Any) -> None:
    """BlockManager.run without polling. A thread that raises breaks the barriers that the others wait at."""
    threads = [
        kernel.BlockThread(lambda: manager._f(*args), manager, grid_point, place, manager._debug)
        for place in np.ndindex(*manager._block_dim)
    ]
    manager.barrier = threading.Barrier(len(threads))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [thread.exception for thread in threads if thread.exception]
    # A broken barrier is what the first failure did to the others.
    errors.sort(key=lambda error: isinstance(error[0], threading.BrokenBarrierError))
    for error, trace in errors:
        raise error.with_traceback(trace)


def _guarded_run(thread: Any) -> None:
    _plain_run(thread)
    if thread.exception:
        thread._manager.barrier.abort()
        with _lock:
            for (manager, _), warp in _warps.items():
                if manager == id(thread._manager):
                    warp.barrier.abort()


_plain_run = kernel.BlockThread.run


def _syncthreads(thread: Any) -> None:
    thread._manager.barrier.wait(timeout=PATIENCE_S)


def _lane() -> int:
    return threading.current_thread().thread_id % WARP  # type: ignore[attr-defined,no-any-return]


def _ballot_sync(_self: Any, mask: int, predicate: Any) -> np.int32:
    assert mask == 0xFFFFFFFF, "the kernels vote with whole warps"
    votes = _exchange(bool(predicate))
    return np.uint32(sum(1 << j for j, vote in enumerate(votes) if vote)).astype(np.int32)


def _shfl_sync(_self: Any, mask: int, value: Any, source: Any) -> Any:
    assert mask == 0xFFFFFFFF
    return _exchange(value)[int(source)]


def _shfl_xor_sync(_self: Any, mask: int, value: Any, distance: Any) -> Any:
    assert mask == 0xFFFFFFFF
    return _exchange(value)[_lane() ^ int(distance)]


def _syncwarp(_self: Any, mask: int = 0xFFFFFFFF) -> None:
    _exchange(0)


class _Libdevice:
    """The intrinsics in numpy's float32, which neither fuses nor widens."""

    @staticmethod
    def fmul_rn(a: Any, b: Any) -> np.float32:
        return np.float32(np.float32(a) * np.float32(b))

    @staticmethod
    def fadd_rn(a: Any, b: Any) -> np.float32:
        return np.float32(np.float32(a) + np.float32(b))

    @staticmethod
    def float_as_int(a: Any) -> np.int32:
        return np.float32(a).view(np.int32)


def install(*modules: Any) -> None:
    """Completes the simulator; `modules`: the kernels' own, whose `libdevice` is replaced."""
    kernel.BlockManager.run = _run_block
    kernel.BlockThread.run = _guarded_run
    kernel.BlockThread.syncthreads = _syncthreads
    fake = kernelapi.FakeCUDAModule
    fake.ballot_sync = _ballot_sync
    fake.shfl_sync = _shfl_sync
    fake.shfl_xor_sync = _shfl_xor_sync
    fake.syncwarp = _syncwarp
    for module in modules:
        if hasattr(module, "libdevice"):
            module.libdevice = _Libdevice
