"""Token streams over real sockets: many at once, cancellation, slow consumers, a killed server, keys."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import zmq

from transport.curve import CurveKeys
from transport.errors import InsecureBind
from transport.limits import Timing
from transport.stream_rpc import StreamClient, StreamLost, StreamOverflow, StreamRefused, StreamServer

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 20.0


class Counter:
    """Serves {"count": n} with n events; {"count": -1} counts until it is cancelled."""

    def __init__(self, **options: Any) -> None:
        self.cancelled: list[str] = []
        self.server = StreamServer(
            "tcp://127.0.0.1:0", on_submit=self.on_submit, on_cancel=self.cancelled.append, **options
        )

    def on_submit(self, stream_id: str, body: dict[str, Any]) -> None:
        if "count" not in body:
            raise ValueError("no count")
        threading.Thread(target=self.serve, args=(stream_id, body["count"]), daemon=True).start()

    def serve(self, stream_id: str, count: int) -> None:
        number = 0
        while self.server.send(stream_id, {"token": number}, last=number == count - 1):
            number += 1
            if number == count:
                return
            if count < 0 and number > 10:
                threading.Event().wait(0.002)


@pytest.fixture
def counter() -> Iterator[Counter]:
    counter = Counter()
    yield counter
    assert counter.server.num_streams == 0
    counter.server.shutdown()


@asynccontextmanager
async def connected(endpoint: str, **options: Any) -> AsyncIterator[StreamClient]:
    client = StreamClient(endpoint, **options)
    try:
        yield client
    finally:
        await client.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(test(), timeout=3 * WAIT_S)

    asyncio.run(limited())


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_many_streams_over_one_connection(counter: Counter) -> None:
    async def test() -> None:
        async with connected(counter.server.endpoint) as client:

            async def one(count: int) -> None:
                tokens = [body["token"] async for body in client.submit({"count": count})]
                assert tokens == list(range(count))

            await asyncio.gather(*(one(1 + number % 40) for number in range(200)))
            assert await client.call({"count": 1}) == {"token": 0}
            assert client.num_streams == 0
        assert counter.cancelled == []

    run(test)


def test_leaving_early_cancels(counter: Counter) -> None:
    async def test() -> None:
        async with connected(counter.server.endpoint) as client:
            async for _ in client.submit({"count": -1}):
                break
            await eventually(lambda: len(counter.cancelled) == 1)

            async def consume() -> None:
                async for _ in client.submit({"count": -1}):
                    pass

            task = asyncio.create_task(consume())
            await eventually(lambda: counter.server.num_streams == 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            del task
            await eventually(lambda: len(counter.cancelled) == 2)

            async with client.submit({"count": -1}) as stream:
                assert await anext(stream) == {"token": 0}
            await eventually(lambda: len(counter.cancelled) == 3)
            assert counter.server.num_streams == 0 and client.num_streams == 0

    run(test)


def test_a_refusal_and_a_slow_consumer(counter: Counter) -> None:
    async def test() -> None:
        async with connected(counter.server.endpoint, max_queued_events=50) as client:
            with pytest.raises(StreamRefused, match="no count"):
                await client.call({})
            slow = client.submit({"count": 5000})
            await eventually(lambda: client.num_streams == 0)
            with pytest.raises(StreamOverflow, match="50"):
                async for _ in slow:
                    pass
            assert await client.call({"count": 1}) == {"token": 0}

    run(test)


def test_a_client_that_goes_away_cancels_its_streams(counter: Counter) -> None:
    async def test() -> None:
        async with connected(counter.server.endpoint) as client:
            stream = client.submit({"count": -1})
            assert await anext(stream) == {"token": 0}
        with pytest.raises(StreamLost, match="closed"):
            async for _ in stream:
                pass
        await eventually(lambda: len(counter.cancelled) == 1)

    run(test)


def test_a_killed_server_is_noticed_and_a_new_one_used() -> None:
    process = subprocess.Popen(
        [sys.executable, __file__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    endpoint = process.stdout.readline().strip()

    async def test() -> None:
        async with connected(endpoint) as client:
            streams = [client.submit({"count": -1}) for _ in range(3)]
            for stream in streams:
                assert await anext(stream) == {"token": 0}
            os.kill(process.pid, signal.SIGKILL)
            async with asyncio.timeout(5):
                for stream in streams:
                    with pytest.raises(StreamLost):
                        async for _ in stream:
                            pass
            process.communicate()
            again = StreamServer(endpoint, on_submit=lambda *_: None, on_cancel=lambda _: None)
            waiting = client.submit({"count": 1})
            await eventually(lambda: again.num_streams == 1)
            again.shutdown()
            with pytest.raises((StreamRefused, StreamLost)):
                await anext(waiting)

    try:
        run(test)
    finally:
        process.kill()
        process.communicate()


def test_nobody_listens() -> None:
    async def test() -> None:
        timing = Timing(heartbeat_s=0.05, lease_s=0.5)
        async with connected("tcp://127.0.0.1:1", timing=timing) as client:
            with pytest.raises(StreamLost, match="no answer"):
                await client.call({"count": 1})

    run(test)


def test_the_server_survives_garbage(counter: Counter) -> None:
    random = Random(5)
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(counter.server.endpoint)
    for _ in range(500):
        socket.send_multipart([random.randbytes(random.randrange(100)) for _ in range(random.randrange(1, 4))])
    socket.close(linger=1000)
    context.term()

    async def test() -> None:
        async with connected(counter.server.endpoint) as client:
            assert await client.call({"count": 1}) == {"token": 0}

    run(test)


def test_curve() -> None:
    client_keys = CurveKeys.generate()
    server_keys = CurveKeys.generate(allowed_client_keys=(client_keys.public,))
    counter = Counter(curve=server_keys)

    async def test() -> None:
        async with connected(
            counter.server.endpoint, curve=replace(client_keys, server_public=server_keys.public)
        ) as client:
            assert await client.call({"count": 1}) == {"token": 0}
        stranger = CurveKeys.generate(server_public=server_keys.public)
        async with connected(counter.server.endpoint, curve=stranger) as client:
            with pytest.raises(StreamLost, match="refused our key"):
                await client.call({"count": 1})
        async with connected(counter.server.endpoint) as client:
            with pytest.raises(StreamLost):
                await client.call({"count": 1})

    run(test)
    counter.server.shutdown()
    with pytest.raises(InsecureBind):
        StreamServer("tcp://0.0.0.0:0", on_submit=lambda *_: None, on_cancel=lambda _: None)


if __name__ == "__main__":  # a server in a process of its own, for the test that kills it
    running = Counter()
    print(running.server.endpoint, flush=True)
    sys.stdin.read()


class ConnectsWhileItReads:
    """A socket that learns of its connection in the midst of a read that finds nothing: the descriptor says no more."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.is_connected = False

    def send(self, frame: bytes, flags: int) -> None:
        if not self.is_connected:
            raise zmq.Again
        self.sent.append(frame)

    def recv_multipart(self, flags: int) -> list[bytes]:
        self.is_connected = True
        raise zmq.Again

    def getsockopt(self, option: int) -> int:
        assert option == zmq.EVENTS
        return int(zmq.POLLOUT) if self.is_connected else 0


def test_a_connection_that_a_read_takes_notice_of_is_sent_on_at_once() -> None:
    """It was sent on at the next heartbeat: a first token in some fifty came a quarter of a second late."""
    client = StreamClient("tcp://127.0.0.1:1")
    socket: Any = ConnectsWhileItReads()
    client._socket = socket
    client._post(b"asked")
    assert socket.sent == [b"asked"]
