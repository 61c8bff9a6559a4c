"""Tokens and control between gateway and decode worker: the names to import. See stream_server.py, stream_client.py."""

from __future__ import annotations

from transport.errors import StreamError, StreamLost, StreamOverflow, StreamRefused
from transport.stream_client import Stream, StreamClient
from transport.stream_server import StreamServer

__all__ = [
    "Stream",
    "StreamClient",
    "StreamError",
    "StreamLost",
    "StreamOverflow",
    "StreamRefused",
    "StreamServer",
]
