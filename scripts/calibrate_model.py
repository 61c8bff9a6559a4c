"""Calibrates the codec for one transformers model: `kvstream calibrate`, and `python -m scripts.calibrate_model`.

Runs the model over held-out text and recall documents, hands its KV, the KV's Fisher information and a loss to
codec.calibrate, writes the profile and a report (Markdown, JSON, a picture). Minutes for the bundled model.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from codec.calibrate import calibrate
from prefill.errors import ModelRefused
from prefill.model import LoadedModel, load_model
from scripts import model_data
from scripts.calibration_documents import make_documents, read_text, split_tokens
from scripts.calibration_loss import ModelLoss
from scripts.calibration_report import write_report

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_REPORT = ROOT / "docs" / "benchmarks" / "profile-bundled-model-202611.md"
# Lengths of the recall documents, every other one with names the bundled model never saw, and of the text's contexts.
LEARN = {
    "recall": (600, 500, 900, 700, 700, 1000, 1200, 800, 500, 600, 1000, 900, 2048, 750, 800, 1100) * 2,
    "text": tuple(range(500, 1000, 25)),
}
JUDGE = {
    "recall": (600, 650, 2048, 900, 1000, 700, 1300, 1200, 4000, 800, 700, 1000, 1600, 1500, 800, 600) * 2,
    "text": tuple(range(500, 1012, 16)),
}
NUM_FACTS = 12


def _quiet(what: str, share: float) -> None:
    del what, share


def check_can_be_calibrated(model: LoadedModel) -> None:
    """Calibration takes KV from transformers' own cache. Raises `ModelRefused` where that holds something else than
    what attention reads."""
    config = model.model.config
    reason = None
    if model.layout.has_windows:
        reason = "keeps only the windows of its sliding layers"
    elif getattr(config, "kv_lora_rank", None):
        reason = "holds its latents"
    if reason is not None:
        raise ModelRefused(
            f"{type(model.model).__name__} cannot be calibrated yet: transformers' cache {reason}. "
            "It is served with the levels of an uncalibrated model"
        )


def _losses(
    loaded: LoadedModel, model_path: Path, text_path: Path, seed: int, progress: Callable[[str, float], None]
) -> tuple[ModelLoss, ModelLoss]:
    """To learn from and to judge by: from disjoint parts of the text."""
    own = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).eval()
    exact = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    most = loaded.max_context - 128
    longest = min(max(max(part["recall"]) for part in (LEARN, JUDGE)), most)
    parts = split_tokens(model_data.encode(loaded.tokenizer, read_text(text_path)), longest)
    out = []
    for number, (lengths, filler) in enumerate(zip((LEARN, JUDGE), parts, strict=True)):
        progress("documents", 0.08 * number)
        documents = make_documents(
            loaded.tokenizer, filler, num_facts=NUM_FACTS, seed=seed + number,
            recall_lengths=[min(n, most) for n in lengths["recall"]],
            text_lengths=[min(n, most) for n in lengths["text"]],
        )  # fmt: skip
        out.append(ModelLoss(own, exact, loaded.rope_tables, documents))
    return out[0], out[1]


def calibrate_model(
    model_path: str | Path,
    out: str | Path,
    text_path: str | Path | None = None,
    *,
    report_path: str | Path | None = None,
    seed: int = 2026,
    fingerprint: str | None = None,
    progress: Callable[[str, float], None] = _quiet,
) -> dict[str, Any]:
    """Writes the profile to `out` and, if asked, a report; returns a summary. text_path: a file, or a folder of .txt
    and .md files, of some ten thousand tokens that the model was not trained on (default: heldout.txt beside it)."""
    started = time.monotonic()
    model_path = Path(model_path)
    text_path = Path(text_path) if text_path is not None else model_path / "heldout.txt"
    if not text_path.exists():
        raise FileNotFoundError(f"no calibration text at {text_path}; give a file or a folder of .txt with --text")
    loaded = load_model(model_path)
    check_can_be_calibrated(loaded)
    learn, judge = _losses(loaded, model_path, text_path, seed, progress)
    fisher = learn.fisher(seed=seed, progress=lambda share: progress("fisher", 0.16 + 0.14 * share))
    provenance = {
        "model": loaded.name,
        "text": text_path.name,
        "seed": seed,
        "lengths": {"learn": {k: list(v) for k, v in LEARN.items()}, "judge": {k: list(v) for k, v in JUDGE.items()}},
        "judged_on": judge.counts,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "made": time.strftime("%Y-%m-%d"),
    }
    profile, report = calibrate(
        learn.samples, fisher, learn, fingerprint=fingerprint or loaded.fingerprint,
        validate=(judge.samples, judge), provenance=provenance,
        progress=lambda what, share: progress(what, 0.3 + 0.7 * share),
    )  # fmt: skip
    profile.save(out)
    summary = {
        "profile": profile.id,
        "fingerprint": profile.fingerprint,
        "profile_bytes": Path(out).stat().st_size,
        "seconds": round(time.monotonic() - started, 1),
        "levels": report.levels,
        "control": report.control,
    }
    if report_path is not None:
        write_report(Path(report_path), profile, report, summary)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description="Calibrate the codec for a model.")
    parser.add_argument("--model", default=ROOT / "model", type=Path)
    parser.add_argument("--out", type=Path, help="default: profile.kvp beside the model")
    parser.add_argument("--text", type=Path, help="file or folder; default: heldout.txt beside the model")
    parser.add_argument(
        "--report",
        type=Path,
        default=None,
        help=f"Markdown; default for the bundled model: {DEFAULT_REPORT.name}",
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = args.report or (DEFAULT_REPORT if args.model.resolve() == ROOT / "model" else None)
    summary = calibrate_model(
        args.model, args.out or args.model / "profile.kvp", args.text, report_path=report,
        progress=lambda what, share: print(f"\r{share:4.0%} {what:<12}", end="", flush=True),
    )  # fmt: skip
    print()
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
