"""How much memory this machine, container or device can still give. Reads /proc, /sys and CUDA; decides nothing."""

from __future__ import annotations

from pathlib import Path

import torch


def available_bytes(device: str | torch.device = "cpu") -> int:
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_in(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))


def available_in(meminfo: Path, cgroup: Path) -> int:
    """The least of what the machine and the container's limit (cgroup version 2), if any, leave."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    available = int(lines["MemAvailable"].split()[0]) * 1024
    limit = cgroup / "memory.max"
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        available = min(available, int(text) - used + int(stat.get("inactive_file", 0)))  # files' pages can be dropped
    return max(available, 0)
