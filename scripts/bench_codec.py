"""How small, how good and how fast the codec is, on a model's own KV: `python scripts/bench_codec.py [--json FILE]`.

Every level is encoded and decoded for real, chunk by chunk, on held-out documents, every byte counted; then the model
answers questions over what came back, paired with its answers over the KV as it was. A control that drops all KV but
the last 64 tokens must fail, or the measure is worthless. Round trips are checked before they are timed.

Plain int8, int4 and int2 (keys per channel, values per token, as KIVI has them) stand beside it. With `--lmcache
PYTHON` (the interpreter of a virtual environment that has it, see scripts/bench_lmcache.py) LMCache's CacheGen codes
the same tensors in the same run, at several settings of its bins.

`kl` is the worse of answers and continued text, on tokens that depend on the context; `delta_nll` and
`greedy_agreement` are the worse of both on all scored tokens. `ideal_bits_per_value` is the empirical entropy of the
integers per channel and chunk, without any side information; `over` is what a chunk of exactly that many tokens costs
more. Speeds are bf16 megabytes a second of one core.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from codec.allocate import KV, Sample  # noqa: E402
from codec.profile import Profile, load_profile  # noqa: E402
from scripts.codec_measures import (  # noqa: E402
    PLAIN_GROUP,
    Through,
    chunks_of,
    plain_integers,
    speeds,
    without_matrices,
)

SEED = 4321  # not calibration's
NUM_FACTS = 16
LENGTHS = (600, 1000, 1400, 1800, 800, 1200, 1600, 2000)
TEXT_LENGTHS = (512, 768, 1024, 1536)
NEAR_TOKENS = 64
PLAIN_BITS = (8, 4, 2)
LMCACHE_BINS = ("default", "16,16,16,16,16", "8,8,8,8,8", "6,6,6,6,6", "4,4,4,4,4")


def make_loss(model_path: Path, text: Path, num_questions: int, num_texts: int) -> Any:
    """The documents, their KV, and the model that judges it."""
    import transformers

    from prefill.model import load_model
    from scripts import model_data
    from scripts.calibration_documents import make_documents, read_text
    from scripts.calibration_loss import ModelLoss

    loaded = load_model(model_path)
    own = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).eval()
    exact = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    filler = model_data.encode(loaded.tokenizer, read_text(text))
    room = loaded.max_context - 160
    documents = make_documents(
        loaded.tokenizer,
        filler.tolist() if hasattr(filler, "tolist") else filler,
        recall_lengths=[min(LENGTHS[i % len(LENGTHS)], room) for i in range(math.ceil(num_questions / NUM_FACTS))],
        text_lengths=[min(TEXT_LENGTHS[i % len(TEXT_LENGTHS)], room) for i in range(num_texts)],
        num_facts=NUM_FACTS,
        seed=SEED,
    )
    return ModelLoss(own, exact, loaded.rope_tables, documents)


def row_of(level: str, measures: dict[str, float], raw: dict[str, float], bits: float, ideal: float) -> dict[str, Any]:
    return {
        "level": level,
        "bits_per_value": round(bits, 4),
        "ratio_vs_bf16": round(16 / bits, 3) if bits else None,
        "ideal_bits_per_value": None if math.isnan(ideal) else round(ideal, 4),
        "kl": measures["kl"],
        "delta_nll": measures["delta_nll"],
        "greedy_agreement": measures["greedy_agreement"],
        "recall_drop": raw["recall"] - measures["recall"] if "recall" in raw else None,
        "measures": measures,
    }


def measure_levels(loss: Any, profile: Profile, chunk_tokens: int) -> list[dict[str, Any]]:
    """One row a level, and the control."""
    raw = loss(lambda sample: (sample.k, sample.v))
    rows = []
    for name in profile.level_names:
        through = Through(profile, name, chunk_tokens)
        measures = loss(through)
        row = row_of(name, measures, raw, through.bits_per_value, through.ideal_bits_per_value)
        rows.append(row | {"overhead_bits_per_value": round(through.overhead_bits_per_value, 4)})
        print(f"  {name} done", file=sys.stderr)
    control = loss(lambda sample: (sample.k, sample.v), keep_last_tokens=NEAR_TOKENS)
    rows.append(row_of("control", control, raw, 0.0, math.nan))
    return rows


def broken_promises(rows: Sequence[dict[str, Any]], profile: Profile) -> list[str]:
    """Promised KL that was not kept, and promises that even the control keeps (which would prove nothing)."""
    by_name = {row["level"]: row for row in rows}
    wrong = []
    for name, promise in profile.promise.items():
        if promise.kl is None or name not in by_name:
            continue
        if by_name[name]["kl"] > promise.kl + 1e-6:
            wrong.append(f"{name}: kl {by_name[name]['kl']:.4f}, promised {promise.kl:.4f}")
        if promise.kl >= by_name["control"]["kl"]:
            wrong.append(f"{name}: the control keeps its promise too")
    return wrong


def measure_plain(loss: Any, ours: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Plain int8 and int4 on the same tensors; beside each our smallest level of equal or lower KL."""
    raw = loss(lambda sample: (sample.k, sample.v))
    rows = []
    for bits in PLAIN_BITS:
        row = row_of(f"plain int{bits}", loss(plain_integers(bits)), raw, bits + 32 / PLAIN_GROUP, math.nan)
        rows.append(row | _best_of(ours, row))
    return rows


def _best_of(ours: Sequence[dict[str, Any]], peer: dict[str, Any]) -> dict[str, Any]:
    best = min(
        (row for row in ours if row["level"] != "control" and row["kl"] <= peer["kl"]),
        key=lambda row: float(row["bits_per_value"]),
    )
    return {"our_level": best["level"], "our_share_of_bytes": best["bits_per_value"] / peer["bits_per_value"]}


def measure_lmcache(
    python: str, loss: Any, ours: Sequence[dict[str, Any]], chunk_tokens: int, settings: Sequence[str]
) -> list[dict[str, Any]]:
    """CacheGen on the same tensors; beside each setting our smallest level of equal or lower KL."""
    from safetensors.torch import load_file, save_file

    raw = loss(lambda sample: (sample.k, sample.v))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        kv, out, report = (Path(folder) / name for name in ("kv.safetensors", "out.safetensors", "report.json"))
        save_file(
            {f"{n}.{i}": getattr(s, n).contiguous() for i, s in enumerate(loss.samples) for n in ("k", "v")}, str(kv)
        )
        for setting in settings:
            command = [python, str(ROOT / "scripts" / "bench_lmcache.py"), "--kv", str(kv), "--out", str(out)]
            command += ["--json", str(report), "--chunk-tokens", str(chunk_tokens)]
            command += [] if setting == "default" else ["--bins", setting]
            subprocess.run(command, check=True, timeout=3600, stdout=sys.stderr)
            found, tensors = json.loads(report.read_text(encoding="utf-8")), load_file(str(out))
            number = {id(sample): i for i, sample in enumerate(loss.samples)}

            def decoded(sample: Sample, tensors: Any = tensors, number: dict[int, int] = number) -> KV:
                i = number[id(sample)]
                return tensors[f"k.{i}"], tensors[f"v.{i}"]

            row = row_of(f"cachegen {setting}", loss(decoded), raw, found["bits_per_value"], math.nan)
            names = ("encode_mb_s", "decode_mb_s", "encode_mb_s_pool", "decode_mb_s_pool", "wrong_values", "lmcache")
            row |= {name: found[name] for name in names}
            row |= _best_of(ours, row)
            best = next(r for r in ours if r["level"] == row["our_level"])
            for way in ("encode", "decode"):  # against its CPU path as it ships, with its thread pool
                row[f"our_{way}_speedup"] = best[f"{way}_mb_s"] / row[f"{way}_mb_s_pool"]
                row[f"our_{way}_speedup_without_matrices"] = (
                    best[f"{way}_mb_s_without_matrices"] / row[f"{way}_mb_s_pool"]
                )
            rows.append(row)
    return rows


def add_speeds(rows: Sequence[dict[str, Any]], chunk: Sample, profile: Profile) -> None:
    """Into the rows: of the profile as it is, and of the same integers with decorrelation off."""
    whole = speeds(chunk, profile, profile.level_names)
    plain = speeds(*without_matrices(chunk, profile), profile.level_names) if profile.lossy.k is not None else whole
    for row in rows:
        if row["level"] in whole:
            row |= whole[row["level"]] | {"threads": 1, "device": "cpu"}
            row |= {f"{name}_without_matrices": plain[row["level"]][name] for name in ("encode_mb_s", "decode_mb_s")}


def show(rows: Sequence[dict[str, Any]], say: Callable[[str], None] = print) -> None:
    say(
        f"{'level':<24}{'bits':>8}{'ideal':>8}{'over':>7}{'ratio':>7}{'kl':>9}{'d nll':>9}{'agree':>8}{'recall-':>9}"
        f"{'enc':>7}{'dec':>7}{'enc w/o':>9}{'dec w/o':>9}"
    )
    for row in rows:
        ideal = row["ideal_bits_per_value"]
        cells = [f"{row['level']:<24}{row['bits_per_value']:>8.3f}"]
        cells.append(f"{ideal:>8.3f}" if ideal is not None else " " * 8)
        over = row.get("overhead_bits_per_value")
        cells.append(f"{over:>7.3f}" if over is not None else " " * 7)
        cells.append(f"{row['ratio_vs_bf16']:>7.2f}" if row["ratio_vs_bf16"] else " " * 7)
        cells.append(f"{row['kl']:>9.5f}{row['delta_nll']:>9.4f}{row['greedy_agreement']:>8.4f}")
        cells.append(f"{row['recall_drop']:>9.4f}" if row["recall_drop"] is not None else " " * 9)
        for name, width in (("encode_mb_s", 7), ("decode_mb_s", 7), ("encode_mb_s_without_matrices", 9),
                            ("decode_mb_s_without_matrices", 9)):  # fmt: skip
            cells.append(f"{row[name]:>{width}.0f}" if name in row else " " * width)
        say("".join(cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "model", help="default: the bundled model")
    parser.add_argument("--text", type=Path, help="a file or folder; default: heldout.txt beside the model")
    parser.add_argument("--profile", type=Path, help="default: profile.kvp beside the model")
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--questions", type=int, default=1024, help="paired recall questions (0: none)")
    parser.add_argument("--texts", type=int, default=48, help="documents of plain text that go on for 96 tokens")
    parser.add_argument("--speed-only", action="store_true")
    parser.add_argument("--lmcache", metavar="PYTHON", help="also run LMCache's CacheGen, with this interpreter")
    parser.add_argument("--lmcache-bins", nargs="+", default=LMCACHE_BINS, help="default: %(default)s")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    profile = load_profile(args.profile or args.model / "profile.kvp")
    text = args.text or args.model / "heldout.txt"
    result: dict[str, Any] = {
        "machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__,
        "profile": profile.id, "chunk_tokens": args.chunk_tokens,
    }  # fmt: skip
    loss = make_loss(args.model, text, 0 if args.speed_only else args.questions, 4 if args.speed_only else args.texts)
    chunk = next(chunks_of(max(loss.samples, key=lambda s: s.k.shape[1]), args.chunk_tokens))
    rows: list[dict[str, Any]]
    if args.speed_only:
        rows = [row_of(name, _nothing(), {}, 16.0, math.nan) for name in profile.level_names]
        for row in rows:
            through = Through(profile, row["level"], args.chunk_tokens)
            through(chunk)
            row["bits_per_value"], row["ratio_vs_bf16"] = through.bits_per_value, 16 / through.bits_per_value
    else:
        rows = measure_levels(loss, profile, args.chunk_tokens)
        result["questions"] = args.questions
        result["broken_promises"] = broken_promises(rows, profile)
    add_speeds(rows, chunk, profile)
    result["levels"] = rows
    show(rows)
    if not args.speed_only:
        result["plain"] = measure_plain(loss, rows)
        show(result["plain"])
    if args.lmcache:
        result["lmcache"] = measure_lmcache(args.lmcache, loss, rows, args.chunk_tokens, args.lmcache_bins)
        show(result["lmcache"])
        for row in result["lmcache"]:
            print(
                f"{row['level']}: our {row['our_level']} takes {row['our_share_of_bytes']:.2f} of its bytes, encodes "
                f"{row['our_encode_speedup']:.0f} and decodes {row['our_decode_speedup']:.0f} times as fast as it ships"
            )
    for line in result.get("broken_promises", []):
        print(f"PROMISE NOT KEPT {line}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if result.get("broken_promises") else 0


def _nothing() -> dict[str, float]:
    return {"kl": math.nan, "delta_nll": math.nan, "greedy_agreement": math.nan}


if __name__ == "__main__":
    sys.exit(main())
