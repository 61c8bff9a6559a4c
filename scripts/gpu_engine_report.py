"""The engine on this machine's GPU: are its kernels right, and how near is it to what the machine can do?
`python scripts/gpu_engine_report.py --name h200-202612`, or as a part of `scripts/gpu_report.py`.

In this order, each with the time that is left: the engine as a server uses it, through `load_runtime`, against the
CPU's (gpu_engine_production.py); kernels against the numpy reference; the machine's copy bandwidth and matrix rate; an
8B-shaped Llama with random weights in bf16 (32 layers, 32 query and 8 KV heads of 128): its logits against
transformers' own attention and graphs against eager passes; decode steps at batch 1 and 32 with 8k tokens each;
prefill; int4 against bf16 pages at batch 16 with 32k tokens each; other launch parameters of the kernels.

A decode step is bounded by the bytes that it must read: weights without the embedding table, and KV; over the measured
copy bandwidth (bytes read and written a second). Prefill is bounded by its operations over the measured matrix rate.
Writes docs/benchmarks/gpu-engine-<name>.md and .json, after each step. Exit codes: 0 all checks passed, 1 one failed,
2 no GPU here. Whether bars are met is reported and no failure. --tiny goes through it all on a CPU, small, in Triton's
interpreter (TRITON_INTERPRET=1): its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from prefill.cuda_fusions import fuse  # noqa: E402
from prefill.model import LoadedModel  # noqa: E402
from scripts import gpu_engine_cases as cases  # noqa: E402
from scripts import gpu_engine_measures as measures  # noqa: E402
from scripts import gpu_engine_production as production  # noqa: E402
from scripts.gpu_engine_cases import Shape  # noqa: E402
from scripts.gpu_engine_measures import LLAMA_8B, TINY, Row, Size  # noqa: E402
from scripts.gpu_engine_sweep import sweep  # noqa: E402

BARS = {"decode_share_1": 0.75, "decode_share_32": 0.75, "prefill_share": 0.55, "int4_gain": 2.0}


@dataclass
class Report:
    """What was found, as it goes into the JSON; and how much time is left."""

    name: str
    folder: Path
    limit_s: float
    machine: dict[str, Any]
    bars: dict[str, float] = field(default_factory=lambda: dict(BARS))
    steps: list[dict[str, Any]] = field(default_factory=list)
    decode: list[dict[str, Any]] = field(default_factory=list)
    prefill: list[dict[str, Any]] = field(default_factory=list)
    sweep: list[dict[str, Any]] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    begin: float = field(default_factory=time.perf_counter)

    @property
    def left_s(self) -> float:
        return self.limit_s - (time.perf_counter() - self.begin)

    @property
    def failed(self) -> list[str]:
        return [step["name"] for step in self.steps if not step["passed"]]

    def step(self, name: str, needs_s: float, run: Callable[[], str]) -> bool:
        """Runs one step if there is time for it; an exception is a failure with its last line."""
        begin = time.perf_counter()
        if self.left_s < needs_s:
            print(f"left out, {self.left_s:.0f} s left: {name}", flush=True)
            return False
        try:
            detail, passed = run(), True
        except Exception as error:  # any: the other steps shall still run
            traceback.print_exc()
            detail, passed = f"{type(error).__name__}: {error}".splitlines()[0][:300], False
        seconds = round(time.perf_counter() - begin, 1)
        self.steps.append({"name": name, "passed": passed, "detail": detail, "seconds": seconds})
        print(f"{'ok  ' if passed else 'FAIL'} {name}: {detail} ({seconds} s)", flush=True)
        self.write()
        return passed

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        data = asdict(self)
        for key in ("folder", "begin", "limit_s"):
            del data[key]
        (self.folder / f"gpu-engine-{self.name}.json").write_text(json.dumps(data, indent=1) + "\n")
        (self.folder / f"gpu-engine-{self.name}.md").write_text(markdown(self))


def markdown(report: Report) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in report.machine.items() if key != "gpu")
    lines = [f"# The engine on {report.machine['gpu']}", "", f"Made by `scripts/gpu_engine_report.py`: {machine}.", ""]
    lines += ["| bar | wanted | found |", "|---|---|---|"]
    lines += [f"| {k} | {v} | {report.found.get(k, 'not measured')} |" for k, v in report.bars.items()]
    lines += ["", "## Steps", "", "| step | result | |", "|---|---|---|"]
    lines += [f"| {s['name']} | {'passed' if s['passed'] else '**FAILED**'} | {s['detail']} |" for s in report.steps]
    for title, rows in (("Decode", report.decode), ("Prefill", report.prefill), ("Launch parameters", report.sweep)):
        if rows:
            lines += ["", f"## {title}", "", "| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
            lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def kernel_checks(device: torch.device, *, tiny: bool) -> dict[str, Callable[[], str]]:
    lengths = (1, 0, 97, 40) if tiny else (1, 0, 300, 64, 65, 97, 4097, 40, 2049)
    llama = Shape(kv_heads=2, group=4, head_dim=64 if tiny else 128, lengths=lengths)
    found: dict[str, Callable[[], str]] = {
        "bf16 pages": lambda: cases.check_paged(llama, device),
        "bf16 pages, window": lambda: cases.check_paged(replace(llama, window=70), device),
        "bf16 pages, softcap": lambda: cases.check_paged(replace(llama, softcap=5.0), device),
        "bf16 pages, 7 queries a head, pages of 32": lambda: cases.check_paged(
            replace(llama, group=7, page_tokens=32), device
        ),
        "bf16 pages, company": lambda: cases.check_company(llama, "bf16", device),
        "new rows": lambda: cases.check_write(device),
    }
    for kind in ("int4", "int8", "fp8"):
        found[f"{kind} pages"] = lambda kind=kind: cases.check_quantized(llama, kind, device)  # type: ignore[misc]
        found[f"{kind}, blocks leaving a ring"] = lambda kind=kind: cases.check_settle(kind, device)  # type: ignore[misc]
    found["int4 pages, window"] = lambda: cases.check_quantized(replace(llama, window=70), "int4", device)
    found["int4 pages, softcap"] = lambda: cases.check_quantized(replace(llama, softcap=5.0), "int4", device)
    found["int4 pages, company"] = lambda: cases.check_company(llama, "int4", device)
    return found


def run(report: Report, size: Size, device: torch.device, *, tiny: bool) -> None:
    made_pair: list[production.Pair] = []

    def make_pair() -> str:
        made_pair.append(production.pair(device, tiny=tiny))
        return f"bundled model, {type(made_pair[0].gpu.codec).__name__}" if not tiny else "random weights"

    if report.step("production: load_runtime", 30, make_pair):
        for name, check in production.checks(lambda: made_pair[0], device).items():
            report.step(f"production: {name}", 15, check)
        made_pair.clear()
        measures.release()
    for name, check in kernel_checks(device, tiny=tiny).items():
        report.step(f"kernels: {name}", 10, check)
    rates: list[float] = []

    def ceilings() -> str:
        rates.extend(measures.ceilings(size, device))
        report.found |= {"copy_tb_s": round(rates[0] / 1e12, 3), "matrix_tflop_s": round(rates[1] / 1e12, 1)}
        return f"copy {rates[0] / 1e12:.2f} TB/s, bf16 products {rates[1] / 1e12:.0f} TFLOP/s"

    made: list[LoadedModel] = []

    def make() -> str:
        made.append(measures.build(size, device))
        return f"{sum(p.numel() for p in made[0].model.parameters()) / 1e9:.2f} billion parameters"

    if report.step("ceilings", 10, ceilings) and report.step("model", 20, make):
        run_model(report, made[0], size, rates[0], rates[1], device)


def run_model(
    report: Report, loaded: LoadedModel, size: Size, copy_rate: float, matrix_rate: float, device: torch.device
) -> None:
    tolerance, first = 0.1, size.batches[0]  # a wrong mask or page shows as 0.5 or more

    def logits(is_fused: bool = True) -> str:
        return measures.logits_check(loaded, size, device, tolerance, is_fused=is_fused)

    def decode(kind: str, batch: int, context: int, label: str, key: str | None = None) -> Row:
        row = measures.measure_decode(loaded, size, kind, batch, context, label, copy_rate, device)
        say(report.decode, row)
        if key is not None:
            report.found[key] = row["share"]
        return row

    def prefill() -> str:
        rows = [say(report.prefill, row) for row in measures.measure_prefill(loaded, size, matrix_rate, device)]
        report.found["prefill_share"] = rows[0]["share"]
        return f"{rows[0]['tflop_s']} TFLOP/s, {rows[0]['share']:.0%} of the matrix rate"

    def gain() -> str:
        rows = [decode(kind, size.long_batch, size.long_context, "fused") for kind in ("bf16", "int4")]
        report.found["int4_gain"] = round(rows[1]["tokens_s"] / rows[0]["tokens_s"], 3)
        return f"{report.found['int4_gain']} times the tokens; {in_words(rows[1])}"

    def swept(kind: str, batch: int, context: int) -> str:
        rows = [say(report.sweep, row) for row in sweep(loaded, kind, batch, context, device, lambda: report.left_s)]
        best = max(rows, key=lambda row: float(row["tb_s"]))
        return f"best {best['tb_s']} TB/s with {best['changed']}"

    report.step("logits", 20, lambda: logits(is_fused=False))
    report.step(f"decode, batch {first}, transformers' modules", 25, lambda: in_words(
        decode("bf16", first, size.context, "transformers' modules")))  # fmt: skip
    report.step("fused kernels", 15, lambda: str(fuse(loaded.model)))
    report.step("logits, fused kernels", 20, logits)
    for batch in size.batches:
        report.step(f"decode, batch {batch}", 30, lambda batch=batch: in_words(  # type: ignore[misc]
            decode("bf16", batch, size.context, "fused", f"decode_share_{batch}")))  # fmt: skip
    report.step("prefill", 20, prefill)
    report.step("int4 against bf16 pages", 60, gain)
    report.step("launch parameters, int4", 30, lambda: swept("int4", size.long_batch, size.long_context))
    report.step("launch parameters, bf16", 30, lambda: swept("bf16", size.batches[-1], size.context))


def say(rows: list[Row], row: Row) -> Row:
    rows.append(row)
    print(json.dumps(row), flush=True)
    return row


def in_words(row: Row) -> str:
    return f"{row['step_ms']} ms a step, {row['share']:.0%} of the bound, {row['tokens_s']} tokens/s"


def machine_of(device: torch.device) -> dict[str, Any]:
    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "-"

    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU: the interpreter",
        "python": platform.python_version(), "torch": torch.__version__,
        "triton": version("triton"), "transformers": version("transformers"),
    }  # fmt: skip


def measure_all(folder: Path, name: str, limit_s: float, *, tiny: bool = False) -> Report:
    device = torch.device("cpu" if tiny else "cuda")
    report = Report(name=name, folder=folder, limit_s=limit_s, machine=machine_of(device))
    print(json.dumps(report.machine), flush=True)
    run(report, TINY if tiny else LLAMA_8B, device, tiny=tiny)
    report.write()
    print(f"{len(report.steps)} steps, {len(report.failed)} failed: {', '.join(report.failed)}")
    print({key: f"{report.found.get(key, 'not measured')}, wanted {bar}" for key, bar in BARS.items()}, flush=True)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="report", help="of the files, as h200-202612")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--seconds", type=float, default=450.0, help="no step begins that would not end within them")
    parser.add_argument("--tiny", action="store_true", help="small, on the CPU: needs TRITON_INTERPRET=1")
    args = parser.parse_args(argv)
    if not args.tiny and not torch.cuda.is_available():
        print("no CUDA device here: nothing was checked or measured", file=sys.stderr)
        return 2
    return 1 if measure_all(args.out, args.name, args.seconds, tiny=args.tiny).failed else 0


if __name__ == "__main__":
    sys.exit(main())
