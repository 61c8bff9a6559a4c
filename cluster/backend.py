"""What the gateway asks of whatever produces tokens. An interface: no Ray, no sockets, no HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from decode.requests import GenerationEvent, GenerationRequest


class Backend(Protocol):
    """The cluster as the gateway sees it; tests put a fake in its place."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        """Events of one request, the last one a FinishedEvent or FailedEvent. Closing the iterator cancels.

        Raises RequestRefused from the first step when the request is not admitted.
        """
        ...

    async def metrics_text(self) -> str:
        """Metrics of the workers in Prometheus text format, to be put behind the gateway's own."""
        ...

    async def health(self) -> dict[str, Any]:
        """{"status": "ok", ...} when requests can be served; another status (and why) when they cannot."""
        ...

    async def receipt(self, request_id: str) -> dict[str, Any] | None:
        """The KV receipt of a recent request, also of one that was cancelled; None if it is not known."""
        ...
