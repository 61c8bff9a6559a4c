"""Triton's interpreter, made to treat bf16 and fp8 as a GPU does. For processes with TRITON_INTERPRET=1.

It multiplies the bit patterns of bf16 operands as if they were integers, and truncates where a GPU rounds to the
nearest even value, to fp8 too. Both are replaced here; kernels are not touched.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def fix_floats() -> None:
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    convert = InterpreterBuilder.create_fp_to_fp

    def wide_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    def rounding_cast(self: Any, x: TensorHandle, dtype: Any) -> TensorHandle:
        if x.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(x.data)).to(torch.bfloat16)
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, x, dtype)

    def rounding_fp8(self: Any, x: TensorHandle, dtype: Any, mode: Any) -> TensorHandle:
        if x.dtype.scalar == tl.float32 and dtype.scalar == tl.float8e4nv:
            rounded = torch.from_numpy(np.ascontiguousarray(x.data)).to(torch.float8_e4m3fn)
            return TensorHandle(rounded.view(torch.uint8).numpy(), tl.float8e4nv)
        return convert(self, x, dtype, mode)

    InterpreterBuilder.create_dot = wide_dot
    InterpreterBuilder.cast_impl = rounding_cast
    InterpreterBuilder.create_fp_to_fp = rounding_fp8
