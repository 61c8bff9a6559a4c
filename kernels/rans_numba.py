"""The numba backend: the coders that `codec/` calls, under one name. See the two files for what they do."""

from __future__ import annotations

from kernels.rans_decode_numba import (
    BAD_FINAL_STATE,
    BAD_STATE,
    EXCEPTIONS,
    OK,
    OUT_OF_WORDS,
    UNUSED_WORDS,
    decode_bytes,
    decode_quantized,
    join_bf16,
)
from kernels.rans_encode_numba import (
    NO_ROOM,
    VALUE_RANGE,
    choose_tables,
    encode_bytes,
    encode_quantized,
    split_bf16,
)

__all__ = [
    "BAD_FINAL_STATE",
    "BAD_STATE",
    "EXCEPTIONS",
    "NO_ROOM",
    "OK",
    "OUT_OF_WORDS",
    "UNUSED_WORDS",
    "VALUE_RANGE",
    "choose_tables",
    "decode_bytes",
    "decode_quantized",
    "encode_bytes",
    "encode_quantized",
    "join_bf16",
    "split_bf16",
]
