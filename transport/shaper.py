"""A slow link for tests, benchmarks and the demo: a TCP proxy in a process of its own, and the class that runs it.

    python -m transport.shaper --listen 127.0.0.1:0 --target 127.0.0.1:9000 --rate-mbps 20 [--delay-ms 5] [--control 0]

prints {"listen": "HOST:PORT", "control": PORT} when it is ready. The control port takes one JSON object a line,
{"rate_mbps": 5} and/or {"delay_ms": 10}, and answers with the settings and the bytes carried; 0 or "inf" is no limit.
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
from pathlib import Path
from typing import Any

from transport.errors import TransportError
from transport.shaper_proxy import BUFFER_BYTES, Proxy, parse_rate, serve_control

START_S = 15.0


class Shaper:
    """A slow link to `target` ("HOST:PORT" or "tcp://HOST:PORT"); connect to `endpoint` instead. A context manager."""

    def __init__(self, target: str, *, rate_mbps: float, delay_ms: float = 0.0, listen: str = "127.0.0.1:0") -> None:
        command = [
            *(sys.executable, "-m", "transport.shaper", "--until-stdin-closes"),
            *("--listen", listen, "--target", target.removeprefix("tcp://")),
            *("--rate-mbps", str(rate_mbps), "--delay-ms", str(delay_ms)),
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

    def set_rate(self, rate_mbps: float) -> None:
        """From now on, for bytes not yet read; 0 or inf is no limit."""
        self._ask({"rate_mbps": str(rate_mbps)})

    def stats(self) -> dict[str, Any]:
        """rate_mbps, delay_ms, up_bytes, down_bytes."""
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
    proxy = Proxy(_address(options.target), parse_rate(options.rate_mbps), options.delay_ms / 1000)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)  # accepted sockets inherit it
    listener.bind(_address(options.listen))
    listener.listen(64)
    listener.setblocking(False)
    control = await asyncio.start_server(
        lambda reader, writer: serve_control(proxy, reader, writer), "127.0.0.1", options.control, limit=4096
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
    parser.add_argument("--control", type=int, default=0, metavar="PORT", help="0: any free port")
    parser.add_argument("--until-stdin-closes", action="store_true", help="exit with the process that started it")
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        asyncio.run(_main(parser.parse_args()))


if __name__ == "__main__":
    main()
