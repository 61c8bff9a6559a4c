"""The numba backend: the coders that `codec/` calls, under one name. See the two files for what they do."""

from __future__ import annotations

from kernels.rans_decode_numba import decode_lossless, decode_quantized
from kernels.rans_encode_numba import OK, choose_tables, encode_lossless, encode_quantized

__all__ = [
    "OK",
    "choose_tables",
    "decode_lossless",
    "decode_quantized",
    "encode_lossless",
    "encode_quantized",
]
