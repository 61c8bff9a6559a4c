"""A whole server that is killed under load and started again: what it had on disk, it has."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

LATEST_S = 300.0
PROMPT, ANSWER = 1500, 4


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(300, 4000) for _ in range(length)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def descendants(pid: int) -> list[int]:
    """Of a process, itself first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has ended meanwhile
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for at in found:
        found += children.get(at, [])
    return found


class Server:
    """`kvstream serve` with chunks on disk."""

    def __init__(self, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        file = folder / "serve.yaml"
        file.write_text(
            f"store_path: {folder / 'store'}\nkv_blocks: 1024\nnum_prefill: 1\nnum_decode: 1\n"
            # never: a machine that computes a chunk sooner than it loads one would compute, and show nothing
            "policy: {ttft_ms: 0, levels: [lossless], floor: lossless, ceiling: lossless, recompute: never}\n"
        )
        command = [
            sys.executable,
            "-m",
            "scripts.cli",
            "serve",
            "--config",
            str(file),
            "--port",
            self.url.rpartition(":")[2],
        ]
        self.log = (folder / "serve.log").open("a")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, cwd=Path(__file__).parents[2])
        deadline = time.monotonic() + LATEST_S
        while not self._is_healthy():
            assert self.process.poll() is None, (folder / "serve.log").read_text()
            assert time.monotonic() < deadline, (folder / "serve.log").read_text()
            time.sleep(0.2)

    def _is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, token_ids: list[int]) -> dict[str, Any]:
        body = {
            "prompt": token_ids,
            "max_tokens": ANSWER,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
        answer.raise_for_status()
        return answer.json()  # type: ignore[no-any-return]

    def metric(self, name: str) -> float:
        """Summed over the workers."""
        lines = httpx.get(f"{self.url}/metrics", timeout=5).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"kvstream_{name}{{"))

    def kill(self) -> None:
        """All of its processes, at once."""
        for pid in descendants(self.process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(10)
        self.log.close()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    servers.clear()
    yield tmp_path
    for server in servers:
        if server.process.poll() is None:
            server.kill()


servers: list[Server] = []


def start(folder: Path) -> Server:
    servers.append(Server(folder))
    return servers[-1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_warm_prefix_survives_the_death_of_the_whole_server(folder: Path) -> None:
    tokens = prompt(PROMPT, seed=1)
    server = start(folder)
    first = server.ask(tokens)
    deadline = time.monotonic() + LATEST_S
    while server.metric("store_disk_chunks") < PROMPT // 256:  # what is not yet on disk is nothing that was promised
        assert time.monotonic() < deadline
        time.sleep(0.1)

    def load(seed: int) -> None:
        while True:
            try:
                server.ask(prompt(700 + seed, seed))
            except httpx.HTTPError:
                return
            seed += 10

    clients = [threading.Thread(target=load, args=(seed,), daemon=True) for seed in range(100, 103)]
    for client in clients:
        client.start()
    computed = server.metric("prefill_computed_tokens_total") + server.metric("decode_computed_prompt_tokens_total")
    while (
        server.metric("prefill_computed_tokens_total") + server.metric("decode_computed_prompt_tokens_total")
        <= computed
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    server.kill()

    server = start(folder)
    again = server.ask(tokens)
    assert again["choices"][0]["token_ids"] == first["choices"][0]["token_ids"]
    receipt = again["kv_receipt"]
    assert receipt["levels"] == {"lossless": PROMPT // 256} and not receipt["live_prefill"], receipt
    assert server.metric("prefill_computed_tokens_total") == 0
    assert server.metric("store_disk_damaged_total") == 0
