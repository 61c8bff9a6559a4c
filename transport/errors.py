"""Every error that transport raises. Imports nothing.

TransportError
 ├── MalformedMessage      bytes from a peer that are no message of ours
 │    └── LimitExceeded    ... or one larger than its stated limit
 ├── UnknownTransfer       a call names a transfer that was never opened here, or has ended
 ├── TooMuch               a call would pass a stated limit of ours (chunks, transfers, body size)
 ├── InsecureBind          a bind off loopback without keys
 ├── BindFailed            the address is in use or not ours
 ├── BadTrace              a bandwidth trace that cannot be followed
 ├── TransportClosed       a call after shutdown
 └── StreamError           tokens and control (stream_rpc)
      ├── StreamLost       the peer died or went silent
      ├── StreamOverflow   this consumer read too slowly
      └── StreamRefused    the server refused or failed the request
"""

from __future__ import annotations


class TransportError(Exception):
    """Base of all errors of this package."""


class MalformedMessage(TransportError):
    """What a peer sent is no message of this protocol."""


class LimitExceeded(MalformedMessage):
    """What a peer sent, or announced, passes a stated limit. Raised before memory is taken for it."""


class UnknownTransfer(TransportError):
    """A call names a transfer that was never opened here or that has ended."""


class TooMuch(TransportError):
    """A call would pass a stated limit of this end."""


class InsecureBind(TransportError):
    """A bind to an address other machines can reach, without keys."""


class BindFailed(TransportError):
    """The address cannot be bound."""


class BadTrace(TransportError):
    """A bandwidth trace that cannot be followed."""


class TransportClosed(TransportError):
    """A call came after shutdown."""


class StreamError(TransportError):
    """Base of what ends a stream early."""


class StreamLost(StreamError):
    """The peer died, restarted, or was silent for its lease."""


class StreamOverflow(StreamError):
    """The consumer read more slowly than events came, past the stated limit."""


class StreamRefused(StreamError):
    """The server refused the request, or failed while it served it."""
