"""A slow link for tests, benchmarks and the demo: a TCP proxy in a process of its own, and the class that runs it.

    python -m transport.shaper --listen 127.0.0.1:0 --target 127.0.0.1:9000 --rate-mbps 20 [--trace FILE] [--delay-ms 5]
        [--jitter-ms 2] [--corrupt-per-mb 0.1] [--seed 1] [--control 0]

prints {"listen": "HOST:PORT", "control": PORT} when it is ready. A trace file has lines `until_s Mbit/s` and repeats.
The control port takes one JSON object a line and answers with the settings and what was carried:

    {"rate_mbps": 5}                  a constant rate; 0 or "inf" is no limit
    {"trace": [[5, 20], [8, 0]]}      20 Mbit/s for five seconds, none for three, and again
    {"delay_ms": 10, "jitter_ms": 5}  one way; jitter is up to so much more, in order as TCP delivers
    {"corrupt_per_mb": 0.5}           flipped bits a megabyte, on average; which ones, the seed decides
    {"stall_s": 2}                    nothing goes on for so long, connections stay
    {"cut_s": 2}                      connections are reset, and new ones for so long
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from transport.errors import TransportError
from transport.limits import MB
from transport.rate_trace import RateTrace
from transport.shaper_link import Pace
from transport.shaper_proxy import BUFFER_BYTES, Proxy, apply_wish, serve_control

START_S = 15.0
CONTROL_BYTES = 16 * MB  # a line with a long trace


class Shaper:
    """A slow link to `target` ("HOST:PORT" or "tcp://HOST:PORT"); connect to `endpoint` instead. A context manager."""

    def __init__(
        self,
        target: str,
        *,
        rate_mbps: float = 0,
        trace: RateTrace | None = None,
        delay_ms: float = 0.0,
        jitter_ms: float = 0.0,
        seed: int = 0,
        listen: str = "127.0.0.1:0",
    ) -> None:
        command = [
            *(sys.executable, "-m", "transport.shaper", "--until-stdin-closes", "--seed", str(seed)),
            *("--listen", listen, "--target", target.removeprefix("tcp://")),
            *("--rate-mbps", str(rate_mbps), "--delay-ms", str(delay_ms), "--jitter-ms", str(jitter_ms)),
        ]
        root = Path(__file__).resolve().parent.parent
        self._process = subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], START_S)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            self._process.kill()
            _, errors = self._process.communicate()
            raise TransportError(f"the shaper for {target} did not start: {errors.decode()[-500:]}")
        ports = json.loads(line)
        self.pid = self._process.pid
        self.endpoint = f"tcp://{ports['listen']}"
        self._control = socket.create_connection(("127.0.0.1", ports["control"]), timeout=5)
        self._answers = self._control.makefile("rb")
        if trace is not None:
            self.set_trace(trace)

    def set_rate(self, rate_mbps: float) -> None:
        """From now on, for bytes not yet read; 0 or inf is no limit."""
        self._ask({"rate_mbps": str(rate_mbps)})

    def set_trace(self, trace: RateTrace) -> None:
        """Follow it from its beginning, now, in both directions, until the next set_rate or set_trace."""
        steps = zip(trace.until_s, trace.bytes_per_s, strict=True)
        self._ask({"trace": [(until_s, rate * 8 / 1e6) for until_s, rate in steps]})

    def set_delay(self, delay_ms: float, jitter_ms: float = 0.0) -> None:
        self._ask({"delay_ms": delay_ms, "jitter_ms": jitter_ms})

    def corrupt(self, per_mb: float) -> None:
        """Flip so many bits a megabyte, on average, in each direction; 0: no more."""
        self._ask({"corrupt_per_mb": per_mb})

    def stall(self, for_s: float) -> None:
        """Nothing goes on for so long; connections stay. 0 ends it."""
        self._ask({"stall_s": for_s})

    def cut(self, for_s: float = 0.0) -> None:
        """Reset all connections at both ends, and new ones for so long; 0 also ends that."""
        self._ask({"cut_s": for_s})

    def stats(self) -> dict[str, Any]:
        """rate_mbps (now), delay_ms, jitter_ms, up_bytes, down_bytes, flipped_bits, connections_cut."""
        return self._ask({})

    def _ask(self, wish: dict[str, Any]) -> dict[str, Any]:
        self._control.sendall(json.dumps(wish).encode() + b"\n")
        answer = json.loads(self._answers.readline() or b'{"ok": false, "error": "the shaper has ended"}')
        if not answer.pop("ok"):
            raise TransportError(answer["error"])
        return answer

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        self._process.communicate()
        self._answers.close()
        self._control.close()

    def __enter__(self) -> Shaper:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host or "127.0.0.1", int(port)


async def _main(options: argparse.Namespace) -> None:
    proxy = Proxy(_address(options.target), options.seed)
    wish = {"delay_ms": options.delay_ms, "jitter_ms": options.jitter_ms, "corrupt_per_mb": options.corrupt_per_mb}
    apply_wish(proxy, {**wish, "rate_mbps": options.rate_mbps})
    if options.trace is not None:
        proxy.set_pace(Pace(RateTrace.parse(options.trace.read_text()), time.monotonic()))
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)  # accepted sockets inherit it
    listener.bind(_address(options.listen))
    listener.listen(64)
    listener.setblocking(False)
    control = await asyncio.start_server(
        lambda reader, writer: serve_control(proxy, reader, writer), "127.0.0.1", options.control, limit=CONTROL_BYTES
    )
    host, port = listener.getsockname()[:2]
    ports = {"listen": f"{host}:{port}", "control": control.sockets[0].getsockname()[1]}
    print(json.dumps(ports), flush=True)
    serving = asyncio.create_task(proxy.serve(listener))
    if options.until_stdin_closes:
        # Our parent holds the other end: when it dies, however it dies, so do we.
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)
        serving.cancel()
    else:
        await serving


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m transport.shaper", description="a slow link, as a TCP proxy")
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT")
    parser.add_argument("--target", required=True, metavar="HOST:PORT")
    parser.add_argument("--rate-mbps", default="0", help='Mbit/s in each direction; 0 or "inf": no limit')
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one way")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="lines `until_s Mbit/s`, repeated; before --rate-mbps"
    )
    parser.add_argument("--jitter-ms", type=float, default=0.0, help="up to so much more delay, in order")
    parser.add_argument("--corrupt-per-mb", type=float, default=0.0, help="flipped bits a megabyte, on average")
    parser.add_argument("--seed", type=int, default=0, help="of jitter and flipped bits")
    parser.add_argument("--control", type=int, default=0, metavar="PORT", help="0: any free port")
    parser.add_argument("--until-stdin-closes", action="store_true", help="exit with the process that started it")
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        asyncio.run(_main(parser.parse_args()))


if __name__ == "__main__":
    main()
