"""KV fetched from a peer, without sockets."""

from __future__ import annotations

import threading
from typing import Any

from prefill.peer_chunks import Fetch
from transport.errors import UnknownTransfer


def test_a_peer_that_is_lost_before_it_is_known_gives_nothing_and_fails_nothing() -> None:
    """Between the end of a transfer and the event that tells of it, asking for a chunk raises."""

    class Client:
        def request(self, *_: Any, **__: Any) -> None:
            raise UnknownTransfer("it was lost")

    client: Any = Client()
    fetch = Fetch(client, threading.Condition(), "t", [0, 1])
    fetch.stored = [{}, {}]
    assert fetch.take(0, timeout_s=10.0) is None
    assert fetch.is_over
