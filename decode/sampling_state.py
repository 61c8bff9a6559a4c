"""What sampling keeps of one request from token to token: penalty counts, the seed, the position. No torch.

Draws are counter-based: the random bits of an output token are a function of (seed, position) alone, never of what
was drawn before or of who shares the batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from decode.requests import SamplingParams

GREEDY_BELOW = 1e-5  # temperatures; as vLLM
_MASK_64 = (1 << 64) - 1
_SYSTEM = random.SystemRandom()

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


class SeenTokens:
    """Distinct tokens and how often each was generated (prompt tokens: 0 times), kept up to date token by token."""

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        first = list(dict.fromkeys(prompt))
        self._slots = {token: slot for slot, token in enumerate(first)}
        self._ids = np.array([*first, *[0] * 64], dtype=np.int64)
        self._counts = np.zeros(len(self._ids), dtype=np.float32)

    @property
    def ids(self) -> IntArray:
        """[N], in the order of their first appearance."""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> FloatArray:
        """[N], of `ids`."""
        return self._counts[: len(self._slots)]

    def add(self, token: int) -> None:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        self._counts[slot] += 1


class SamplingState:
    """One request's sampling. `prompt`: its token ids; `eos_token_ids`: the model's, held back until `min_tokens`.
    Without a seed in `params` one is drawn from `rng` (default: the system's), so both kinds of request draw alike.

    `num_output` tokens have been drawn; `num_prompt_scored`: prompt tokens that have their logprobs (or, the first
    one, never will).
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int] = (),
        *,
        eos_token_ids: Iterable[int] = (),
        rng: random.Random | None = None,
    ) -> None:
        self.params = params
        self.num_output = 0
        self.num_prompt_scored = 1
        self._num_prompt = len(prompt)
        self._seed = (rng or _SYSTEM).getrandbits(64) if params.seed is None else params.seed & _MASK_64
        self.is_greedy = params.temperature < GREEDY_BELOW
        self._ends = _ids({*params.stop_token_ids, *eos_token_ids})
        self.allowed = None if params.allowed_token_ids is None else _ids(params.allowed_token_ids)
        bias = dict(params.logit_bias)
        self.bias_ids = np.array(list(bias), dtype=np.int64)
        self.bias = np.array(list(bias.values()), dtype=np.float32)
        self._longest_word = max(map(len, params.bad_words), default=0)
        self._tail: list[int] = []  # the last tokens, as many as a bad word can need
        repeats = params.repetition_penalty != 1
        is_penalized = repeats or params.presence_penalty != 0 or params.frequency_penalty != 0
        self.seen = SeenTokens(prompt if repeats else ()) if is_penalized else None

    @property
    def edits_logits(self) -> bool:
        """Whether the next token's logits are changed before it is chosen from them."""
        params = self.params
        is_edited = self.allowed is not None or bool(params.bad_words) or bool(params.logit_bias)
        return is_edited or self.num_output < params.min_tokens or (self.seen is not None and len(self.seen.ids) > 0)

    @property
    def scores_prompt(self) -> bool:
        """Whether prompt tokens still wait for their logprobs."""
        return self.params.prompt_logprobs is not None and self.num_prompt_scored < self._num_prompt

    def forbidden(self) -> IntArray:
        """Token ids that must not come next: ends before `min_tokens`, and what would complete a bad word."""
        found = list(self._ends) if self.num_output < self.params.min_tokens else []
        for word in self.params.bad_words:
            *begin, last = word
            if len(begin) <= len(self._tail) and self._tail[len(self._tail) - len(begin) :] == begin:
                found.append(last)
        return np.array(found, dtype=np.int64)

    def draw_bits(self) -> int:
        """64 random bits for the next token: SplitMix64 of the seed, mixed with the position and hashed again."""
        return split_mix(split_mix(self._seed) ^ self.num_output)

    def record(self, token: int) -> None:
        """This token comes next."""
        self.num_output += 1
        if self.seen is not None:
            self.seen.add(token)
        if self._longest_word > 1:
            self._tail = [*self._tail, token][1 - self._longest_word :]


def split_mix(x: int) -> int:
    """SplitMix64 (Steele, Lea and Flood 2014): one 64-bit integer well mixed into another."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)


def _ids(tokens: Iterable[int]) -> IntArray:
    return np.array(sorted(set(tokens)), dtype=np.int64)
