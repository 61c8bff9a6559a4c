"""kernels/kv_quant.py and kv_quant_numba.py against kv_quant_reference.py, bit for bit; golden vectors of fp8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import kv_quant, kv_quant_numba
from kernels import kv_quant_reference as reference
from kernels.attention import TILE_TOKENS

KINDS = ("int8", "int4", "int2", "fp8")
GOLDEN = Path(__file__).parent / "golden" / "fp8_e4m3.npz"
T = 32


def random_block(seed: int, num_heads: int, dim: int, *, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[T, H, D] with what keys have: channels far from 0, tokens that stand out, constant channels, zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((T, num_heads, dim)) * 10.0 ** rng.uniform(-6, 3, (1, num_heads, 1))
    x += rng.choice([0.0, 1.0, 50.0], (1, num_heads, dim)) * rng.choice([0.0, 1.0])
    x[rng.integers(T)] *= rng.choice([0.0, 1.0, 30.0])
    x[:, :, rng.integers(dim)] = rng.choice([0.0, 3.0, -1e-8])
    return torch.from_numpy(x).to(dtype)


shapes = st.tuples(st.integers(1, 3), st.sampled_from([4, 12, 16, 32, 64, 96, 128]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_channel", [True, False], ids=["keys", "values"])
@given(seed=st.integers(0, 2**32 - 1), shape=shapes, dtype=st.sampled_from([torch.bfloat16, torch.float32]))
@settings(max_examples=60, deadline=None)
def test_torch_gives_the_references_bits(kind: str, per_channel: bool, seed: int, shape, dtype) -> None:
    x = torch.stack([random_block(seed + i, *shape, dtype=dtype) for i in range(2)])
    codes, scale, zero = kv_quant.quantize_blocks(x, kind, per_channel=per_channel)
    values = kv_quant.dequantize_blocks(codes, scale, zero, kind, per_channel=per_channel)
    for i in range(2):
        expected = reference.quantize_block(x[i].float().numpy(), kind, per_channel=per_channel)
        np.testing.assert_array_equal(codes[i].numpy(), expected.codes)
        np.testing.assert_array_equal(scale[i].numpy(), expected.scale)
        if expected.zero is not None:
            np.testing.assert_array_equal(zero[i].numpy(), expected.zero)
        wanted = reference.dequantize_block(expected, kind, per_channel=per_channel)
        np.testing.assert_array_equal(values[i].transpose(0, 1).numpy(), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_channel", [True, False], ids=["keys", "values"])
@given(seed=st.integers(0, 2**32 - 1), shape=shapes, dtype=st.sampled_from([torch.bfloat16, torch.float32]))
@settings(max_examples=40, deadline=None)
def test_tiles_hold_the_blocks_at_their_places(kind: str, per_channel: bool, seed: int, shape, dtype) -> None:
    """Both ways: of bf16 with whole vectors numba fills the tiles, of all others torch."""
    heads, dim = shape
    rng = np.random.default_rng(seed)
    x = torch.stack([random_block(seed + i, heads, dim) for i in range(7)])
    codes, scale, zero = kv_quant.quantize_blocks(x, kind, per_channel=per_channel)
    per_tile = TILE_TOKENS // T
    blocks = torch.from_numpy(rng.choice(7, 5, replace=False))
    places = torch.from_numpy(rng.choice(3 * per_tile, 5, replace=False))
    out = torch.full((3, heads, TILE_TOKENS, dim), 7.0, dtype=dtype)
    assert kv_quant_numba.can_fill(out, kind) == (
        dtype == torch.bfloat16 and dim % (16 * reference.CODES_A_BYTE[kind]) == 0
    )
    kv_quant.fill_tiles(out, codes, scale, zero, kind, blocks, places, per_channel=per_channel)
    values = kv_quant.dequantize_blocks(codes, scale, zero, kind, per_channel=per_channel).to(dtype)
    expected = torch.full_like(out, 7.0)
    for block, place in zip(blocks.tolist(), places.tolist(), strict=True):
        at = place % per_tile * T
        expected[place // per_tile, :, at : at + T] = values[block]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("per_channel", [True, False], ids=["keys", "values"])
@pytest.mark.parametrize(("kind", "levels"), reference.LEVELS.items())
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_no_value_is_further_off_than_half_a_step(kind: str, levels: int, per_channel: bool, seed: int) -> None:
    x = random_block(seed, 2, 16).float().numpy()
    back = reference.dequantize_block(
        reference.quantize_block(x, kind, per_channel=per_channel), kind, per_channel=per_channel
    )
    axis = 0 if per_channel else 2
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    # Rounding the zero and the scale to float16 costs 2**-11 of each; below 2**-24 float16 has nothing left.
    slack = np.abs(low) * 2.0**-11 + (high - low) * 2.0**-10 + (levels + 1) * 2.0**-24
    assert (np.abs(back - x) <= (high - low) / levels / 2 + slack).all()


def test_codes_stand_as_the_format_says() -> None:
    packed = reference.pack(np.arange(8, dtype=np.uint8), "int4")
    assert packed.tolist() == [0x10, 0x32, 0x54, 0x76]
    assert reference.unpack(packed, "int4").tolist() == list(range(8))
    quarters = np.array([0, 1, 2, 3, 3, 2, 1, 0], np.uint8)
    packed = reference.pack(quarters, "int2")
    assert packed.tolist() == [0b01_11_10_00, 0b00_10_11_01]
    assert reference.unpack(packed, "int2").tolist() == quarters.tolist()


def test_constant_and_huge_blocks() -> None:
    for kind in reference.LEVELS:
        constant = np.full((T, 1, 4), 2.5, np.float32)
        quantized = reference.quantize_block(constant, kind, per_channel=True)
        assert not quantized.codes.any() and not quantized.scale.any()
        assert (reference.dequantize_block(quantized, kind, per_channel=True) == 2.5).all()
        huge = np.linspace(-3e38, 3e38, T * 4, dtype=np.float32).reshape(T, 1, 4)
        back = reference.dequantize_block(
            reference.quantize_block(huge, kind, per_channel=False), kind, per_channel=False
        )
        assert np.isfinite(back).all()


def golden_floats() -> np.ndarray:
    """Every code's value, the middles between neighbours and what lies just beside them, of both signs."""
    values = reference.fp8_decode(np.arange(127, dtype=np.uint8))
    middles = (values[1:] + values[:-1]) / 2
    beside = np.concatenate([np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, np.float32(0))])
    positive = np.concatenate([values, middles, beside, np.array([463.9, 464.0], np.float32)]).astype(np.float32)
    return np.concatenate([positive, -positive])


def test_fp8_is_torchs_e4m3fn() -> None:
    x = golden_floats()
    expected = torch.from_numpy(x).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(reference.fp8_encode(x), expected.view(torch.uint8).numpy())
    codes = np.arange(256, dtype=np.uint8)
    decoded = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(reference.fp8_decode(codes), decoded)


def test_fp8_golden_vectors() -> None:
    """For a GPU's conversion, on any machine: floats and the codes that a CPU's torch.float8_e4m3fn made of them."""
    golden = np.load(GOLDEN)
    assert len(golden["x"]) > 900
    got, scale, zero = kv_quant.quantize_blocks(torch.from_numpy(golden["block"]), "fp8", per_channel=True)
    assert zero is None
    np.testing.assert_array_equal(got.numpy(), golden["block_codes"])
    np.testing.assert_array_equal(scale.numpy(), golden["block_scale"])
    np.testing.assert_array_equal(reference.fp8_encode(golden["x"]), golden["codes"])


def make_golden() -> None:
    x = golden_floats()
    block = torch.stack([random_block(seed, 2, 16, dtype=torch.float32) for seed in range(4)])
    codes, scale, _ = kv_quant.quantize_blocks(block, "fp8", per_channel=True)
    made = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.savez_compressed(
        GOLDEN, x=x, codes=made, block=block.numpy(), block_codes=codes.numpy(), block_scale=scale.numpy()
    )


if __name__ == "__main__":
    make_golden()
