"""The codec's front door: one chunk's K and V <-> one blob. CPU tensors; no model, no sockets.

    blob = encode_chunk(k, v, level="q2", profile=profile, rope=RopeTable(cos, sin))
    k, v = decode_chunk(blob, profile=profile, rope=RopeTable(cos, sin))
    half = decode_chunk(blob, profile=profile, rope=rope, heads=(0, 4))     # reads these heads alone
    small = cut_chunk(blob, profile=profile, level="q3")                    # a coarser level, without coding

Legend: L layers, T tokens, H KV heads, D head dim (K's and V's may differ).
"""

from __future__ import annotations

import numpy as np
import torch

from codec import bitstream
from codec.bitstream import BlobInfo
from codec.cut import cut_chunk, cut_layers, level_sizes, refine_blobs, refine_chunk, refinement_of, split_blobs
from codec.decode import decode_chunk
from codec.encode import encode_chunk
from codec.profile import Profile
from codec.rope import RopeTable

__all__ = [
    "BlobInfo", "cut_chunk", "cut_layers", "decode_chunk", "encode_chunk", "inspect_blob", "level_sizes",
    "refine_blobs", "refine_chunk", "refinement_of", "split_blobs", "warmup",
]  # fmt: skip


def inspect_blob(blob: bytes | bytearray | memoryview) -> BlobInfo:
    """Level, layout, dtype, tokens and sizes, from the header alone. Raises BlobError subclasses."""
    return bitstream.parse_header(memoryview(blob).cast("B"))


def warmup(profile: Profile) -> None:
    """Compiles (or loads from numba's cache) every coder the profile's levels use; call it before serving."""
    lay = profile.layout
    k = torch.zeros(lay.num_layers, 1, lay.num_kv_heads, lay.head_dim_k, dtype=torch.bfloat16)
    v = torch.zeros(lay.num_layers, 1, lay.num_kv_heads, lay.head_dim_v, dtype=torch.bfloat16)
    dims = min(2, lay.head_dim_k // 2 * 2)
    rope = RopeTable(np.ones((1, dims), np.float32), np.zeros((1, dims), np.float32))
    for name in profile.level_names:
        blob = encode_chunk(k, v, level=name, profile=profile, rope=rope)
        decode_chunk(blob, profile=profile, rope=rope)
