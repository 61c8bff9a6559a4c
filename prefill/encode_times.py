"""How long it takes here to make a chunk of each level ready, as measured. Pure: the caller has the clock."""

from __future__ import annotations

NEWEST_SHARE = 0.2  # of a new measurement; the older ones fade by 0.8 each time


class EncodeTimes:
    """Exponentially weighted means, in seconds a token, so that chunks of all sizes are counted together."""

    def __init__(self) -> None:
        self._token_s: dict[str, float] = {}

    def note(self, level: str, seconds: float, *, num_tokens: int) -> None:
        assert seconds >= 0 and num_tokens > 0
        token_s = seconds / num_tokens
        old = self._token_s.get(level, token_s)
        self._token_s[level] = old + NEWEST_SHARE * (token_s - old)

    def of_chunk(self, num_tokens: int) -> dict[str, float]:
        """Seconds for a chunk of that many tokens, of the levels that were measured."""
        return {level: token_s * num_tokens for level, token_s in self._token_s.items()}
