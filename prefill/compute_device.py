"""The device that a worker computes on: chosen by name, and the one rule that orders what threads do to pages on a GPU.

**A call that reads or writes pages returns when the device has done it.** `completed` holds it: `Engine.forward`, the
pools' copies and the codec run inside of one. A kernel that was only asked for is then never somebody else's concern:
whoever is told that pages are written (under the worker's lock, or through a queue) may read them, and whoever is told
that they are free may overwrite them, in whatever stream, exactly as on a CPU. No events, no streams that wait for one
another. It costs the engine the time in which the host could have asked for the next thing, some tens of microseconds a
step; and it makes the times that estimators see times of the device.

`side_stream` is for threads beside the engine's: without one of its own, a thread's copies would stand in line behind
the engine's step, and waiting for them would be waiting for it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, get_args

import torch

from prefill.errors import ModelRefused

DeviceName = Literal["auto", "cpu", "cuda"]
DEVICES: tuple[DeviceName, ...] = get_args(DeviceName)

P = ParamSpec("P")
R = TypeVar("R")


class OnDevice(Protocol):
    device: torch.device


Self = TypeVar("Self", bound=OnDevice)


def pick_device(wanted: str = "auto") -> torch.device:
    """auto: the GPU if there is one. Raises `ModelRefused` if there is none and `cuda` is asked for."""
    if wanted not in DEVICES:
        raise ModelRefused(f"device {wanted!r} is not known: use one of {', '.join(DEVICES)}")
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no usable GPU"
        raise ModelRefused(
            f"device cuda was asked for and {why} here: look at `nvidia-smi` and CUDA_VISIBLE_DEVICES, or use "
            "device cpu (or auto)"
        )
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def completed(device: torch.device) -> Iterator[None]:
    """Leaves when the device has done all that this thread asked of it; after an error, too, because pages may be
    given to others then."""
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def completes(method: Callable[Concatenate[Self, P], R]) -> Callable[Concatenate[Self, P], R]:
    """A method of something on a device, `completed`."""

    @functools.wraps(method)
    def run(self: Self, *args: P.args, **options: P.kwargs) -> R:
        with completed(self.device):
            return method(self, *args, **options)

    return run


def side_stream(device: torch.device) -> AbstractContextManager[Any]:
    """This thread's own stream, for the length of a with-block; nothing on a CPU. What is done in it has to be
    `completed` inside."""
    if device.type != "cuda":
        return nullcontext()
    stream = getattr(_of_thread, "stream", None)
    if stream is None or stream.device != device:
        stream = _of_thread.stream = torch.cuda.Stream(device)
    return torch.cuda.stream(stream)


_of_thread = threading.local()
