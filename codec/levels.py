"""What a level is: plain data. Pure, numpy.

Legend: L layers, H KV heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from codec.entropy import CodeBook


class LevelKind(IntEnum):
    """How a level's bodies are coded. The numbers are in the bitstream."""

    RAW = 0  # the plain bytes
    LOSSLESS = 1  # exponents entropy coded, sign and mantissa plain
    QUANTIZED = 2  # unrotated (keys), centred, quantized, perhaps delta coded, entropy coded


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorPlan:
    """How one of K, V is coded at one level, found by calibration.

    index [L, H, 2, D] uint8: table of each channel, [.., 0, :] for plain tokens and anchors, [.., 1, :] for deltas.
    step [L, H] float32, bf16-representable (unused by lossless). group [L] int64: anchor group in tokens, 0 = off.
    """

    index: np.ndarray
    step: np.ndarray
    group: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Level:
    """One level. `k` and `v` are None where statistics travel inside each blob ("shipped"), as without calibration.

    step_factor: for shipped quantized levels, the step as a multiple of the segment's typical channel spread.
    """

    name: str
    kind: LevelKind
    codebook: CodeBook | None = None
    k: TensorPlan | None = None
    v: TensorPlan | None = None
    step_factor: float = 0.0

    @property
    def is_shipped(self) -> bool:
        return self.kind is not LevelKind.RAW and self.k is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What calibration measured for a level against the uncompressed model; None where nothing was measured.

    kl: nats a token on tokens that depend on the far context. delta_nll: nats a token. greedy_agreement and
    recall_drop: shares of 1.
    """

    kl: float | None = None
    delta_nll: float | None = None
    greedy_agreement: float | None = None
    recall_drop: float | None = None


EXACT = Promise(kl=0.0, delta_nll=0.0, greedy_agreement=1.0, recall_drop=0.0)
