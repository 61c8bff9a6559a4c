"""The demo's HTML report: the numbers as a table and two plots, in one file without outside references."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; color: #1a1a1a }
table { border-collapse: collapse; width: 100% } td, th { padding: .25rem .6rem; text-align: right }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left } tr.first td { border-top: 1px solid #999 }
img { max-width: 100% } pre { background: #f4f4f4; padding: 1rem; overflow: auto; font-size: 12px }
"""


def write_report(result: dict[str, Any], folder: Path) -> Path:
    """Write `index.html` into `folder` (made if missing); the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "index.html"
    drop = result["drop"]
    file.write_text(
        "<!doctype html><meta charset=utf-8><title>kvstream demo</title>"
        f"<style>{STYLE}</style><h1>kvstream demo</h1>"
        f"<p>Stored documents of {min(result['document_tokens'])} tokens and more, "
        f"{result['machine']['cores']} cores. Times are medians over {len(result['document_tokens'])} documents.</p>"
        f"<h2>Time to first token by link speed</h2>{_image(_ttft_plot(result['rows']))}{_table(result['rows'])}"
        f"<h2>A link that drops tenfold in mid-transfer</h2><p>First token after {drop['ttft_ms']:.0f} ms, "
        f"target {drop['target_ms']} ms.</p>{_image(_chunk_plot(drop['receipt']))}"
        f"<pre>{html.escape(_reasons(drop['receipt']))}</pre>"
        f"<h2>New documents beside other requests</h2>{_live(result['live'])}"
        f"<h2>All numbers</h2><pre>{html.escape(json.dumps(result, indent=1))}</pre>"
    )
    return file


def _ttft_plot(rows: list[dict[str, Any]]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(8, 4))
    speeds = list(dict.fromkeys(row["link_mbps"] for row in rows))
    labels = ["loopback" if speed is None else f"{speed:g}" for speed in speeds]
    for way in dict.fromkeys(row["way"] for row in rows):
        times = [row["ttft_ms"] for row in rows if row["way"] == way]
        axes.plot(range(len(speeds)), times, marker="o", label=way)
    axes.set_xticks(range(len(speeds)), labels)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("link, Mbit/s")
    axes.set_ylabel("time to first token, ms")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def _chunk_plot(receipt: dict[str, Any]) -> plt.Figure:
    """Each chunk as a bar: from when it was asked for or begun to be computed until it stood in its pages."""
    figure, axes = plt.subplots(figsize=(8, 3.2))
    colors: dict[str, Any] = {}
    for chunk in receipt["chunks"]:
        is_text = chunk["level"] == "text"
        start = chunk["compute_ms"] if is_text else chunk["asked_ms"]
        label = None if chunk["level"] in colors else chunk["level"]
        color = colors.setdefault(chunk["level"], f"C{len(colors)}")
        axes.barh(chunk["index"], chunk["filled_ms"] - start, left=start, color=color, label=label)
    axes.set_xlabel("ms since the request arrived")
    axes.set_ylabel("chunk")
    axes.legend()
    return figure


def _image(figure: plt.Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    return f'<img alt="plot" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["<table><tr><th>link<th>way<th>TTFT ms<th>MB<th>levels<th>recomputed<th>tokens equal</tr>"]
    last = ""
    for row in rows:
        speed = "loopback" if row["link_mbps"] is None else f"{row['link_mbps']:g} Mbit/s"
        levels = " ".join(f"{level}:{count}" for level, count in row["levels"].items())
        target = "" if row["target_ms"] is None else f" (target {row['target_ms']:.0f} ms)"
        lines.append(
            f"<tr{' class=first' if speed != last else ''}><td>{speed}<td>{html.escape(row['way'])}{target}"
            f"<td>{row['ttft_ms']:.0f}<td>{row['megabytes']:.2f}<td>{levels}<td>{row['recomputed_share']:.0%}"
            f"<td>{row['equal_tokens']}/{row['num_tokens']}</tr>"
        )
        last = speed
    return "".join(lines) + "</table>"


def _live(rows: list[dict[str, Any]]) -> str:
    lines = ["<table><tr><th>computed by<th>TTFT ms<th>others' ITL p50 ms<th>p99 ms<th>max ms</tr>"]
    for row in rows:
        numbers = "".join(f"<td>{row[key]:.1f}" for key in ("ttft_ms", "itl_p50_ms", "itl_p99_ms", "itl_max_ms"))
        lines.append(f"<tr><td>{html.escape(row['computed_by'])}{numbers}</tr>")
    return "".join(lines) + "</table>"


def _reasons(receipt: dict[str, Any]) -> str:
    return "\n".join(f"{reason['at_ms']:8.1f} ms  {reason['what']}" for reason in receipt["reasons"])
