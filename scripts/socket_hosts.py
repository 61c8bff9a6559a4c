"""A host for sources behind a link that the kernel shapes, and worker processes on it and on this one. Root, iproute2.

    this host            veth pair                    network namespace
    decode worker  <---- tc tbf, at a rate ----  prefill-0, prefill-1

Both sources share the link towards the decode worker; the other way is not shaped. All is undone on every way out: the
namespace by its name, which holds our process id, the workers by the end of their stdin.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefill.runtime import limit_threads
from transport.curve import CurveKeys

ROOT = Path(__file__).resolve().parent.parent
# Of a link's rate this is left for what a process sends: a full TCP segment of 1,448 bytes is a frame of 1,514.
PAYLOAD_SHARE = 1448 / 1514
BURST_BYTES = 16_384  # what the bucket lets pass at once: little, so that the first bytes are as slow as the rest
QUEUE_BYTES = 4 << 20  # more than kvstream ever has in flight: nothing is dropped


class NoNamespaces(RuntimeError):
    """This machine or this user cannot make them."""


@dataclass(slots=True, kw_only=True)
class Link:
    """Towards this host, from the namespace."""

    namespace: str
    here: str  # addresses
    there: str

    def shape(self, bytes_per_s: float | None) -> None:
        """So many bytes a second for what processes send; None: as fast as it goes."""
        device = ("tc", "-n", self.namespace, "qdisc")
        subprocess.run([*device, "del", "dev", "far", "root"], check=False, capture_output=True)
        if bytes_per_s is not None:
            rate = f"{round(8 * bytes_per_s / PAYLOAD_SHARE)}bit"
            limits = ("rate", rate, "burst", str(BURST_BYTES), "limit", str(QUEUE_BYTES))
            run([*device, "add", "dev", "far", "root", "tbf", *limits])


def run(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise NoNamespaces(f"`{' '.join(command)}`: {done.stderr.strip()} (root and iproute2 are needed)")


@contextlib.contextmanager
def shaped_link() -> Iterator[Link]:
    if os.geteuid() != 0:
        raise NoNamespaces("network namespaces need root")
    name, near = f"kvs{os.getpid()}", f"kvs{os.getpid()}n"
    subnet = f"10.77.{os.getpid() % 250 + 1}"
    link = Link(namespace=name, here=f"{subnet}.1", there=f"{subnet}.2")
    try:
        run(["ip", "netns", "add", name])
        run(["ip", "link", "add", near, "type", "veth", "peer", "name", "far", "netns", name])
        run(["ip", "addr", "add", f"{link.here}/30", "dev", near])
        run(["ip", "link", "set", near, "up"])
        run(["ip", "-n", name, "addr", "add", f"{link.there}/30", "dev", "far"])
        run(["ip", "-n", name, "link", "set", "lo", "up"])
        run(["ip", "-n", name, "link", "set", "far", "up"])
        yield link
    finally:  # the namespace takes its end of the pair with it, and that one the other
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", near], check=False, capture_output=True)


@dataclass(slots=True, kw_only=True)
class Workers:
    """Their processes and where they serve. `client_keys`: of who asks the decode worker."""

    client_keys: CurveKeys
    public: str
    decode: str = ""
    sources: list[dict[str, Any]] = field(default_factory=list)  # as a request's body names them
    pids: list[int] = field(default_factory=list)


@contextlib.contextmanager
def running_workers(
    link: Link, *, model: Path, policy: dict[str, Any], num_prefill: int, store_bytes: int
) -> Iterator[Workers]:
    """Prefill workers in the namespace, one decode worker here; encrypted, as they are off loopback."""
    worker_keys = CurveKeys.generate()
    client = CurveKeys.generate(server_public=worker_keys.public)
    keys = asdict(worker_keys) | {"allowed_client_keys": [worker_keys.public, client.public]}
    common = {"model": str(model), "keys": keys, "num_blocks": 4096, "store_bytes": store_bytes, "policy": policy}
    workers = Workers(client_keys=client, public=worker_keys.public)
    with contextlib.ExitStack() as stack:
        started = []
        for number in range(num_prefill):
            prefix = ["ip", "netns", "exec", link.namespace]
            orders = {"role": "prefill", "worker_id": f"prefill-{number}", "bind": f"tcp://{link.there}:0"}
            started.append(stack.enter_context(_process(prefix, orders | common)))
        orders = {"role": "decode", "worker_id": "decode-0", "bind": "tcp://127.0.0.1:0"}
        started.append(stack.enter_context(_process([], orders | common)))
        answers = [_answer(process) for process in started]
        workers.sources = [
            {"id": f"prefill-{number}", "endpoint": answer["endpoint"], "public_key": worker_keys.public}
            for number, answer in enumerate(answers[:-1])
        ]
        workers.decode, workers.pids = answers[-1]["endpoint"], [answer["pid"] for answer in answers]
        yield workers


@contextlib.contextmanager
def _process(prefix: list[str], orders: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    command = [*prefix, sys.executable, "-m", "scripts.socket_worker"]
    environment = {**os.environ, **limit_threads(1), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(orders) + "\n")
        process.stdin.flush()
        yield process
    finally:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a worker ended before it served; see its log above")
    return dict(json.loads(line))
