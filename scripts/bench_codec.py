"""How fast and how small the codec is on one core: `python scripts/bench_codec.py [--profile FILE] [--json FILE]`.

Every level's round trip is checked before it is timed. With a model, its own KV over held-out text is coded; without,
random KV and the default profile. Speeds are bf16 megabytes a second, best of several rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from codec.chunk import decode_chunk, encode_chunk, warmup  # noqa: E402
from codec.codebook import entropy_bits  # noqa: E402
from codec.entropy import histogram  # noqa: E402
from codec.levels import LevelKind  # noqa: E402
from codec.profile import CodecLayout, Profile, default_profile, load_profile  # noqa: E402
from codec.quantize import bf16_to_float, quantize  # noqa: E402
from codec.rope import RopeTable, unrotate  # noqa: E402

ROUNDS = 7


def best_seconds(work: Callable[[], Any]) -> float:
    """CPU time of this thread, so that a busy machine distorts less."""
    times = []
    for _ in range(ROUNDS):
        started = time.thread_time()
        work()
        times.append(time.thread_time() - started)
    return min(times)


def random_chunk(tokens: int) -> tuple[torch.Tensor, torch.Tensor, RopeTable, Profile]:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(12, tokens, 2, 64, generator=generator).bfloat16() for _ in "kv")
    angle = np.arange(tokens)[:, None] * 10000.0 ** (-np.arange(0, 64, 2) / 64)
    both = np.concatenate([angle, angle], axis=1)
    layout = CodecLayout(num_layers=12, num_kv_heads=2, head_dim_k=64, head_dim_v=64)
    return k, v, RopeTable(np.cos(both), np.sin(both)), default_profile(layout)


def model_chunk(model: Path, text: Path, tokens: int) -> tuple[torch.Tensor, torch.Tensor, RopeTable]:
    """The KV of the first tokens of the held-out text."""
    import transformers

    from prefill.model import load_model

    loaded = load_model(model)
    plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    ids = loaded.tokenizer(text.read_text(encoding="utf-8")[: 12 * tokens])["input_ids"][:tokens]
    with torch.inference_mode():
        cache = plain(torch.tensor([ids]), use_cache=True, logits_to_keep=1).past_key_values
    k = torch.stack([layer.keys[0].transpose(0, 1) for layer in cache.layers]).contiguous()
    v = torch.stack([layer.values[0].transpose(0, 1) for layer in cache.layers]).contiguous()
    return k, v, RopeTable(*loaded.rope_tables(0, len(ids)))


def ideal_bits(k: torch.Tensor, v: torch.Tensor, rope: RopeTable, profile: Profile, name: str) -> float | None:
    """Empirical entropy of the symbols per channel of this chunk, no side information (calibrated lossy levels)."""
    level = profile.level(name)
    if level.kind is not LevelKind.QUANTIZED or level.is_shipped:
        return None
    bits = []
    for which, tensor, plan, mean in (("K", k, level.k, profile.mean_k), ("V", v, level.v, profile.mean_v)):
        raw = tensor.view(torch.int16).numpy().view(np.uint16)
        for layer in range(raw.shape[0]):
            for head in range(raw.shape[2]):
                x = bf16_to_float(raw[layer, :, head])
                x = unrotate(x, *rope.inverse()) if which == "K" else x
                assert plan is not None
                q = quantize(x, mean[layer, head], np.float32(1) / plan.step[layer, head])
                assert q is not None
                bits.append(entropy_bits(histogram(q)).mean())
    return float(np.mean(bits))


def bench(k: torch.Tensor, v: torch.Tensor, rope: RopeTable, profile: Profile) -> list[dict[str, Any]]:
    """One row a level. Raises AssertionError rather than report the speed of a wrong result."""
    warmup(profile)
    megabytes = (k.numel() + v.numel()) * 2 / 1e6
    out = (torch.empty_like(k), torch.empty_like(v))
    rows = []
    for name in profile.level_names:
        blob = encode_chunk(k, v, level=name, profile=profile, rope=rope)
        decode_chunk(blob, profile=profile, rope=rope, out=out)
        if profile.level(name).kind is not LevelKind.QUANTIZED:
            assert torch.equal(out[0], k) and torch.equal(out[1], v), f"{name} is not exact"
        again = decode_chunk(blob, profile=profile, rope=rope)
        assert all(torch.equal(a, b) for a, b in zip(again, out, strict=True)), f"{name} decodes in two ways"
        error = float(((out[1] - v).float().square().mean() / v.float().square().mean()).sqrt())
        assert error < 1.0, f"{name} loses more than everything"
        encode_s = best_seconds(lambda n=name: encode_chunk(k, v, level=n, profile=profile, rope=rope))
        decode_s = best_seconds(lambda b=blob: decode_chunk(b, profile=profile, rope=rope, out=out))
        bits = 8 * len(blob) / (k.numel() + v.numel())
        rows.append(
            {
                "level": name,
                "bits_per_value": round(bits, 4),
                "ideal_bits_per_value": ideal_bits(k, v, rope, profile, name),
                "ratio_vs_bf16": round(16 / bits, 3),
                "relative_error_v": round(error, 5),
                "encode_mb_s": round(megabytes / encode_s, 1),
                "decode_mb_s": round(megabytes / decode_s, 1),
                "threads": 1,
                "device": "cpu",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "model", help="default: the bundled model")
    parser.add_argument("--text", type=Path, help="default: heldout.txt beside the model")
    parser.add_argument("--profile", type=Path, help="default: profile.kvp beside the model")
    parser.add_argument("--random", action="store_true", help="random KV and the default profile, no model")
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.random:
        k, v, rope, profile = random_chunk(args.chunk_tokens)
    else:
        k, v, rope = model_chunk(args.model, args.text or args.model / "heldout.txt", args.chunk_tokens)
        profile = load_profile(args.profile or args.model / "profile.kvp")
    rows = bench(k, v, rope, profile)
    machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    result = {
        **machine,
        "profile": profile.id,
        "chunk_tokens": int(k.shape[1]),
        "values": k.numel() + v.numel(),
        "levels": rows,
    }
    print(f"{'level':<9} {'bits':>7} {'ideal':>7} {'ratio':>6} {'err V':>7} {'enc MB/s':>9} {'dec MB/s':>9}")
    for row in rows:
        ideal = "" if row["ideal_bits_per_value"] is None else f"{row['ideal_bits_per_value']:.3f}"
        print(
            f"{row['level']:<9} {row['bits_per_value']:>7.3f} {ideal:>7} {row['ratio_vs_bf16']:>6.2f} "
            f"{row['relative_error_v']:>7.4f} {row['encode_mb_s']:>9.1f} {row['decode_mb_s']:>9.1f}"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
