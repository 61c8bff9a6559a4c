"""Rotary position embedding as a codec step: keys are coded before RoPE and rotated again after decoding.

Knows cos and sin only, no model. Rotating mixes two channels by an angle that changes with every token, which spreads
a channel's constant part over both and makes a quantization error depend on position; undoing it first is worth most
at coarse steps. Convention: transformers' rotate_half, channel d pairs with d + R/2 for d < R/2; channels from R on
(partial rotary) are left alone, and so are layers that the table does not turn: layers of a model with several kinds
of RoPE, or none. cos and sin may carry a model's attention scaling; the inverse divides it out.

Source: Su et al., "RoFormer" (arXiv:2104.09864).   Legend: L layers, T tokens, R rotary dims, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from codec.errors import CodecError


@dataclass(frozen=True, slots=True, eq=False)
class RopeTable:
    """cos, sin [T, R] (any array or CPU tensor): the chunk's T positions, from the model's own rotary module. R = 0
    turns nothing. layers [L] bool, of the whole model: those whose keys are turned so; None is all of them."""

    cos: np.ndarray
    sin: np.ndarray
    layers: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("cos", "sin"):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=np.float32))
        if self.cos.ndim != 2 or self.cos.shape != self.sin.shape or self.cos.shape[1] % 2:
            raise CodecError(
                f"RopeTable wants cos and sin of one shape [T, R] with R even, not {self.cos.shape}, {self.sin.shape}"
            )
        half = self.half_dim
        if not (
            np.array_equal(self.cos[:, :half], self.cos[:, half:])
            and np.array_equal(self.sin[:, :half], self.sin[:, half:])
        ):
            raise CodecError(
                "this RoPE does not pair channel d with d + R/2 (interleaved: not supported); pass rope=None"
            )
        if not np.isfinite(self.cos).all() or not np.isfinite(self.sin).all():
            raise CodecError("cos and sin must be finite")
        if (np.abs(self.cos).max(initial=0) > 64) or (np.abs(self.sin).max(initial=0) > 64):
            raise CodecError("cos and sin over 64 make no rotation; check what was passed")
        if self.layers is not None:
            object.__setattr__(self, "layers", np.ascontiguousarray(self.layers, dtype=bool))
            if self.layers.ndim != 1:
                raise CodecError(f"RopeTable wants one flag for each layer, not {self.layers.shape}")

    @property
    def num_tokens(self) -> int:
        return int(self.cos.shape[0])

    @property
    def half_dim(self) -> int:
        return int(self.cos.shape[1]) // 2

    def part(self, start: int, stop: int) -> RopeTable:
        """Of tokens start to stop."""
        return RopeTable(self.cos[start:stop], self.sin[start:stop], self.layers)

    def turned(self, start: int, stop: int) -> np.ndarray:
        """[stop - start] bool: whether keys of these layers are turned."""
        return np.ones(stop - start, bool) if self.layers is None else self.layers[start:stop]

    def forward(self) -> tuple[np.ndarray, np.ndarray]:
        """(cos, sin) [T, R/2] float32 that rotate."""
        half = self.half_dim
        return np.array(self.cos[:, :half], order="C"), np.array(self.sin[:, :half], order="C")

    def inverse(self) -> tuple[np.ndarray, np.ndarray]:
        """(cos, sin) [T, R/2] float32 that undo it: both over cos^2 + sin^2, which is 1 unless attention is scaled."""
        cos, sin = self.forward()
        norm = cos.astype(np.float64) ** 2 + sin.astype(np.float64) ** 2
        if (norm < 1e-6).any():
            raise CodecError("a rotation with cos = sin = 0 cannot be undone")
        return (cos / norm).astype(np.float32), (sin / norm).astype(np.float32)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Reference: x [T, D] float32, cos, sin [T, R/2] of forward() -> rotated, in the twins' order of operations."""
    half = cos.shape[1]
    out = x.copy()
    a, b = x[:, :half], x[:, half : 2 * half]
    out[:, :half] = a * cos - b * sin
    out[:, half : 2 * half] = b * cos + a * sin
    return out


def unrotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Reference: undoes rotate; cos, sin [T, R/2] of inverse()."""
    half = cos.shape[1]
    out = x.copy()
    a, b = x[:, :half], x[:, half : 2 * half]
    out[:, :half] = a * cos + b * sin
    out[:, half : 2 * half] = b * cos - a * sin
    return out
