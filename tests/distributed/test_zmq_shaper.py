"""The shaper holds its rate, follows a change and a trace, delays, stalls, cuts, corrupts, and ends with its parent."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from transport.errors import TransportError
from transport.rate_trace import RateTrace
from transport.shaper import Shaper
from transport.shaper_link import BitFlips, Bucket, Pace, parse_rate

ROOT = Path(__file__).resolve().parents[2]


class Counting:
    """A TCP server that counts what it gets, and sends back what `echo` says."""

    def __init__(self) -> None:
        self.received_bytes = 0
        self.echo = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                end, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._read, args=(end,), daemon=True).start()

    def _read(self, end: socket.socket) -> None:
        try:
            while data := end.recv(1 << 18):
                self.received_bytes += len(data)
                if self.echo:
                    end.sendall(data)
        except ConnectionError:
            pass  # cut
        end.close()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def target() -> Iterator[Counting]:
    target = Counting()
    yield target
    target.close()


def connect(endpoint: str) -> socket.socket:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def measure(end: socket.socket, received_bytes: Callable[[], int], seconds: float, warm_s: float = 0.5) -> float:
    """Mbit/s that arrive while we send all that the socket takes."""
    stop = threading.Event()

    def push() -> None:
        data = bytes(1 << 16)
        try:
            while not stop.is_set():
                end.send(data)
        except OSError:
            pass

    thread = threading.Thread(target=push, daemon=True)
    thread.start()
    time.sleep(warm_s)
    before, start = received_bytes(), time.monotonic()
    time.sleep(seconds)
    rate = (received_bytes() - before) * 8 / (time.monotonic() - start) / 1e6
    stop.set()
    thread.join(timeout=5)
    return rate


def settles_at(expected_mbps: float, attempt: Callable[[], float]) -> None:
    """A busy machine can starve the shaper for longer than it makes up for: one good measurement of three counts.
    More than the rate is wrong at once."""
    measured: list[float] = []
    for _ in range(3):
        measured.append(attempt())
        assert measured[-1] <= 1.15 * expected_mbps, measured
        if measured[-1] >= 0.85 * expected_mbps:
            return
    raise AssertionError(f"{measured} Mbit/s, expected {expected_mbps}")


def test_rate_is_held_and_can_be_changed(target: Counting) -> None:
    with Shaper(target.address, rate_mbps=50) as link:
        with connect(link.endpoint) as end:
            settles_at(50, lambda: measure(end, lambda: target.received_bytes, 1.5))
            link.set_rate(5)
            settles_at(5, lambda: measure(end, lambda: target.received_bytes, 1.5))
            link.set_rate(math.inf)
            assert max(measure(end, lambda: target.received_bytes, 0.3) for _ in range(2)) > 200
        assert link.stats()["rate_mbps"] == 0
        with pytest.raises(TransportError):
            link.set_rate(-1)


def test_one_bucket_for_all_connections(target: Counting) -> None:
    with Shaper(target.address, rate_mbps=40) as link:
        ends = [connect(link.endpoint) for _ in range(3)]
        others = [threading.Thread(target=measure, args=(end, lambda: 0, 6.0)) for end in ends[1:]]
        for thread in others:
            thread.start()
        settles_at(40, lambda: measure(ends[0], lambda: target.received_bytes, 1.2))
        for end in ends:
            end.close()
        for thread in others:
            thread.join()


def test_delay_both_ways_in_order(target: Counting) -> None:
    target.echo = True
    with Shaper(target.address, rate_mbps=0, delay_ms=40) as link, connect(link.endpoint) as end:
        sent = bytes(range(256)) * 2000
        start = time.monotonic()
        threading.Thread(target=end.sendall, args=(sent,), daemon=True).start()
        first = end.recv(1 << 16)
        assert 0.08 <= time.monotonic() - start < 1.0
        got = bytearray(first)
        while len(got) < len(sent):
            got += end.recv(1 << 16)
        assert bytes(got) == sent


def received_by(target: Counting, at: float) -> int:
    time.sleep(max(0.0, at - time.monotonic()))
    return target.received_bytes


def test_a_trace_is_followed_and_repeats(target: Counting) -> None:
    trace = RateTrace.from_mbps([(0.4, 40), (0.9, 0), (1.0, 8)])
    seen: list[list[int]] = []
    with Shaper(target.address, rate_mbps=1) as link, connect(link.endpoint) as end:
        threading.Thread(target=push_for, args=(end, 20.0), daemon=True).start()
        for _ in range(3):  # one good look of three: a busy machine can starve the shaper, or us
            time.sleep(0.2)
            link.set_trace(trace)
            start, before = time.monotonic(), target.received_bytes
            seen.append([received_by(target, start + at) - before for at in (0.5, 0.8, 1.5, 1.8)])
            # 2 MB before the outage, nothing in it, 0.1 MB behind it, and the same again; never more.
            assert seen[-1][1] <= 1.15 * 2e6 and seen[-1][3] <= 1.1 * 4.1e6, seen
            still = seen[-1][1] - seen[-1][0] <= 0.02e6 and seen[-1][3] - seen[-1][2] <= 0.02e6
            if still and seen[-1][1] >= 0.8 * 2e6 and seen[-1][3] >= 0.8 * 4.1e6:
                break
            link.set_rate(1)
        else:
            raise AssertionError(seen)
        # A change is felt in mid-outage.
        link.set_trace(RateTrace.from_mbps([(0.01, 1), (1000, 0)]))
        time.sleep(0.1)
        assert link.stats()["rate_mbps"] == 0
        link.set_rate(40)
        before = target.received_bytes
        eventually(lambda: target.received_bytes > before + 500_000)


def push_for(end: socket.socket, seconds: float) -> None:
    stop_at = time.monotonic() + seconds
    try:
        while time.monotonic() < stop_at:
            end.send(bytes(1 << 16))
    except OSError:
        pass  # cut, or the test is over


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not become true"
        time.sleep(0.01)


def test_a_trace_file(target: Counting, tmp_path: Path) -> None:
    file = tmp_path / "tram.txt"
    file.write_text("# a tunnel\n1000 12\n1010 0\n")
    command = [sys.executable, "-m", "transport.shaper", "--target", target.address, "--until-stdin-closes"]
    process = subprocess.Popen(
        [*command, "--trace", str(file)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    control = json.loads(process.stdout.readline())["control"]
    with socket.create_connection(("127.0.0.1", control), timeout=5) as asking, asking.makefile("rb") as answers:
        asking.sendall(b"{}\n")
        assert json.loads(answers.readline())["rate_mbps"] == 12
        for wrong in (
            '{"trace": [[0, 1]]}',
            '{"trace": 7}',
            '{"speed": 1}',
            "[1]",
            '{"cut_s": -1}',
            '{"delay_ms": "x"}',
        ):
            asking.sendall(wrong.encode() + b"\n")
            assert json.loads(answers.readline())["ok"] is False, wrong
        asking.sendall(b"{}\n")
        assert json.loads(answers.readline())["rate_mbps"] == 12
    process.communicate(timeout=10)
    file.write_text("0 12\n")
    failed = subprocess.run([*command, "--trace", str(file)], cwd=ROOT, input="", capture_output=True, text=True)
    assert failed.returncode != 0 and "must rise" in failed.stderr


def test_a_stall_holds_everything_and_a_cut_resets(target: Counting) -> None:
    target.echo = True
    with Shaper(target.address) as link:
        with connect(link.endpoint) as end:
            end.sendall(b"a")
            assert end.recv(1) == b"a"
            link.stall(0.5)
            start = time.monotonic()
            end.sendall(b"b")
            assert end.recv(1) == b"b" and time.monotonic() - start >= 0.45
            link.cut(for_s=60)
            with pytest.raises(ConnectionResetError):
                end.recv(1)
        # The reset may be there before the client's connect returns, or after it.
        with pytest.raises(ConnectionError), connect(link.endpoint) as end:
            assert end.recv(1) != b"", "refused, not ended"
        assert link.stats()["connections_cut"] == 1
        link.cut(for_s=0)  # there is nothing to cut, and it is over
        with connect(link.endpoint) as end:
            end.sendall(b"c")
            assert end.recv(1) == b"c"


def test_flipped_bits_and_jitter_are_seeded(target: Counting) -> None:
    target.echo = True
    sent = bytes(1 << 20)

    def came_back(seed: int) -> bytes:
        with Shaper(target.address, jitter_ms=3, seed=seed) as link, connect(link.endpoint) as end:
            link.corrupt(4)
            threading.Thread(target=end.sendall, args=(sent,), daemon=True).start()
            got = bytearray()
            while len(got) < len(sent):
                got += end.recv(1 << 18)
            assert link.stats()["flipped_bits"] == sum(byte.bit_count() for byte in got)
            return bytes(got)

    first, again, other = came_back(5), came_back(5), came_back(6)
    assert first == again != other
    assert 0 < sum(byte != 0 for byte in first) < 40


def test_where_bits_flip_does_not_depend_on_the_reads() -> None:
    def damaged(seed: int, pieces: int) -> bytes:
        flips, random = BitFlips(Random(seed)), Random(pieces)
        flips.set_rate(40)
        data = memoryview(bytearray(4 << 20))
        ends = sorted(random.randrange(len(data)) for _ in range(pieces))
        for start, stop in zip([0, *ends], [*ends, len(data)], strict=True):
            flips.apply(data[start:stop])
        assert flips.num_flipped == sum(byte.bit_count() for byte in data.tobytes() if byte)
        return data.tobytes()

    assert damaged(1, 0) == damaged(1, 100) != damaged(2, 0)
    counts = [sum(map(bool, damaged(seed, 10))) for seed in range(5)]
    assert 100 < sum(counts) / len(counts) < 220  # 160 expected
    flips = BitFlips(Random(1))
    flips.apply(untouched := memoryview(bytearray(1 << 20)))
    assert not any(untouched)


def test_it_ends_with_the_target_and_with_its_parent(target: Counting) -> None:
    with Shaper("127.0.0.1:1", rate_mbps=10) as link, connect(link.endpoint) as end:
        assert end.recv(1) == b""  # nobody there: closed, not held
    code = (
        "import sys, os\n"
        "from transport.shaper import Shaper\n"
        f"link = Shaper({target.address!r}, rate_mbps=10)\n"
        "print(link.pid, flush=True)\n"
        "os._exit(1)\n"  # no clean-up at all
    )
    pid = int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the shaper outlived its parent"
        time.sleep(0.02)


def test_bad_settings() -> None:
    assert parse_rate("inf") == parse_rate(0) == math.inf and parse_rate(20) == 20e6
    for wrong in (-1, "nan", "fast"):
        with pytest.raises(ValueError):
            parse_rate(wrong)
    with pytest.raises(TransportError, match="did not start"):
        Shaper("127.0.0.1:1", rate_mbps=10, listen="256.0.0.1:0")


def test_bucket_arithmetic() -> None:
    bucket = Bucket()
    waits = [bucket.reserve(10_000, Pace(80e6), now=100.0) for _ in range(10)]  # 10 MB/s: 1 ms each, 2 ms burst
    assert waits == pytest.approx([0.0, 0.0, *(0.001 * n for n in range(1, 9))], abs=1e-6)
    # Late by 40 ms with data waiting: caught up. Idle for as long: only the burst.
    assert bucket.reserve(10_000, Pace(80e6), now=100.04, waiting=True) == 0
    assert bucket.free_at == pytest.approx(100.009)
    assert bucket.reserve(10_000, Pace(80e6), now=100.05) == 0
    assert bucket.free_at == pytest.approx(100.049)
    assert bucket.reserve(10_000, Pace(math.inf), now=100.0) == 0
