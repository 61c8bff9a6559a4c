"""The shape of a model's KV. Plain data over torch's dtypes; imports nothing of ours."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """The shape of one token's KV."""

    num_layers: int
    num_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def bytes_per_token(self) -> int:
        values = self.num_layers * self.num_kv_heads * (self.head_dim_k + self.head_dim_v)
        return values * int(self.torch_dtype.itemsize)
