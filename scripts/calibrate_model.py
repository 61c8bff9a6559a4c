"""Calibrates the codec for one transformers model: `kvstream calibrate`, and `python -m scripts.calibrate_model`.

Runs the model over held-out text and recall documents, hands its KV and a loss to codec.calibrate, writes the profile
and a report (Markdown and JSON). Minutes for the bundled model on one core.
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
from prefill.model import load_model
from scripts.calibration_loss import ModelLoss, make_documents
from scripts.calibration_report import write_report

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_REPORT = ROOT / "docs" / "benchmarks" / "profile-bundled-model-202611.md"
LENGTHS = (600, 800, 1000, 1200, 1536, 2048, 900, 1800)
VALIDATION_LENGTHS = (600, 900, 1200, 1500, 1800, 2048, 700, 1000, 1300, 1600, 800, 1900)
NUM_FACTS = 16
NUM_TEXT = 2


def _quiet(what: str, share: float) -> None:
    del what, share


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
    """Writes the profile to `out` and, if asked, a report; returns a summary. text_path: a text file of at least a few
    thousand tokens that the model was not trained on (default: heldout.txt beside the model)."""
    started = time.monotonic()
    model_path = Path(model_path)
    text_path = Path(text_path) if text_path is not None else model_path / "heldout.txt"
    if not text_path.is_file():
        raise FileNotFoundError(f"no calibration text at {text_path}; give one with --text FILE")
    loaded = load_model(model_path)
    own = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).eval()
    exact = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    sets = []
    for lengths, offset in ((LENGTHS, 0), (VALIDATION_LENGTHS, 1)):
        room = [min(n, loaded.max_context - 128) for n in lengths]
        documents = make_documents(
            loaded.tokenizer,
            text_path,
            lengths=room,
            num_text=NUM_TEXT,
            num_facts=NUM_FACTS,
            seed=seed + offset,
        )
        progress("documents", 0.05 * offset)
        sets.append(ModelLoss(own, exact, loaded.rope_tables, documents))
    provenance = {
        "model": loaded.name,
        "text": text_path.name,
        "seed": seed,
        "calibration_lengths": list(LENGTHS),
        "validation_lengths": list(VALIDATION_LENGTHS),
        "questions": NUM_FACTS * len(VALIDATION_LENGTHS),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "made": time.strftime("%Y-%m-%d"),
    }
    profile, report = calibrate(
        sets[0].samples, sets[0], fingerprint=fingerprint or loaded.fingerprint, validate=(sets[1].samples, sets[1]),
        provenance=provenance, progress=progress,
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
    parser.add_argument("--text", type=Path, help="default: heldout.txt beside the model")
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
