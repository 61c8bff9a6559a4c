"""Whether the engine works on a GPU as a server uses it: `load_runtime`, `Engine.forward`, pages, codec, sampling. The
first part of gpu_engine_report.py, before anything is measured. Each check computes the same on the CPU, says in words
what it found, and raises `AssertionError` where that is not as it should be.

With --tiny the second runtime is on the CPU, too: its pool attends by the kernels in Triton's interpreter, and a
"recorded" decode step is the function called again. Everything else is the same code.
"""

from __future__ import annotations

import functools
import os
import random
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from decode.requests import SamplingParams
from decode.sampling import Drawn, sample_batch
from decode.sampling_state import SamplingState
from prefill.block_pool import blocks_for
from prefill.decode_graphs import MAX_ROWS
from prefill.engine import Engine, SequenceSlice, prefill
from prefill.kv_pool import KVPool
from prefill.model import LoadedModel, wrap_model
from prefill.quantized_pool import QuantizedKVPool
from prefill.runtime import BLOCK_TOKENS, ModelRuntime, load_runtime

ROOT = Path(__file__).resolve().parent.parent
CPU_THREADS = min(8, os.cpu_count() or 1)
TOLERANCE = 0.05  # relative, of a row's logits in bf16: what rounding leaves; a wrong mask or page shows as 0.5 or more


@dataclass(frozen=True, slots=True)
class Sizes:
    """prompts: tokens of each sequence. steps: of decoding, after which sequences leave one by one. rows: of the
    largest batch. rounds: of the check with threads."""

    prompts: tuple[int, ...]
    steps: int
    rows: int
    rounds: int
    blocks: int


REAL = Sizes(prompts=(1, 15, 16, 17, 257, 700, 1100), steps=12, rows=MAX_ROWS + 6, rounds=40, blocks=1024)
TINY = Sizes(prompts=(1, 17, 40), steps=3, rows=MAX_ROWS + 1, rounds=3, blocks=80)


@dataclass(frozen=True, slots=True)
class Pair:
    """The CPU's runtime, and the one that is looked at."""

    cpu: ModelRuntime
    gpu: ModelRuntime
    sizes: Sizes


def pair(device: torch.device, *, tiny: bool) -> Pair:
    """The bundled model on both; --tiny: one of random weights."""
    if not tiny:
        load = functools.partial(load_runtime, ROOT / "model", num_blocks=REAL.blocks, threads=CPU_THREADS)
        return Pair(load(device="cpu"), load(device=device.type), REAL)
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(Path(folder))
        cpu = load_runtime(folder, num_blocks=TINY.blocks, device="cpu")
    return Pair(cpu, interpreted(cpu), TINY)


def interpreted(runtime: ModelRuntime) -> ModelRuntime:
    """The same model over pages that the kernels for GPUs read."""
    pool = KVPool(runtime.model.layout, runtime.pool.num_blocks, BLOCK_TOKENS, gpu_kernels=True)
    engine = Engine(runtime.model, pool, row_multiple=1, capture=lambda run: run)
    return replace(runtime, pool=pool, engine=engine)


def save_tiny(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**_SHAPE, head_dim=64)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    words = {f"w{i}": i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def checks(made: Callable[[], Pair], device: torch.device) -> dict[str, Callable[[], str]]:
    return {
        "logits, batches of all kinds": lambda: check_schedule(made()),
        "steps beyond a graph": lambda: check_large_batch(made()),
        "KV through the codec": lambda: check_codec(made()),
        "pages written by another thread": lambda: check_threads(made()),
        "sampling": lambda: check_sampling(made()),
        "windows and soft caps": lambda: check_model(_gemma(), "gemma2", device, made().sizes),
        "experts": lambda: check_model(_experts(), "qwen3-moe", device, made().sizes),
        "int4 pages": lambda: check_quantized(made(), device),
    }


# Batches


def check_schedule(both: Pair) -> str:
    errors = run_schedule(both.cpu.engine, both.gpu.engine, both.sizes)
    worst = max(errors)
    assert worst <= TOLERANCE, errors
    replayed = both.gpu.engine.num_replayed
    assert replayed >= both.sizes.steps, f"{replayed} steps were replayed: decode steps do not reach the graphs"
    return f"{len(errors)} rows, at worst {worst:.1e}; {replayed} steps replayed"


def run_schedule(cpu: Engine, gpu: Engine, sizes: Sizes, seed: int = 0) -> list[float]:
    """Prompts in uneven chunks, with decode rows of others between them, then decoding while sequences leave: each
    row's relative error. Both follow the CPU's tokens. Block tables lie all over the pool."""
    draw = random.Random(seed)
    vocab, order = cpu.model.vocab_size, list(range(sizes.blocks))
    draw.shuffle(order)
    tokens = [[draw.randrange(vocab) for _ in range(count)] for count in sizes.prompts]
    tables = []
    for prompt in tokens:
        count = blocks_for(len(prompt) + 4 * sizes.steps + 32, BLOCK_TOKENS)
        tables.append([order.pop() for _ in range(count)])
    done, left = [0] * len(tokens), [sizes.steps + 2 * i for i in range(len(tokens))]
    limits, errors = list(map(len, tokens)), []
    while any(left):
        slices, owners = [], []
        for i in draw.sample(range(len(tokens)), len(tokens)):
            missing = len(tokens[i]) - done[i]
            if not left[i] or draw.random() < 0.15:
                continue
            count = min(missing, draw.choice([1, 7, 16, 33, 256]))
            slices.append(slice_of(tokens[i], done[i], count, tables[i]))
            owners.append(i)
            done[i] += count
        if not slices:
            continue
        want, got = cpu.forward(slices), gpu.forward(slices)
        assert want.shape == got.shape and got.dtype == torch.float32
        errors += relative(got, want)
        for row, i in zip(want, [i for i, item in zip(owners, slices, strict=True) if item.need_logits], strict=True):
            tokens[i].append(int(row.argmax()))
            left[i] -= 1
    assert all(len(t) > n for t, n in zip(tokens, limits, strict=True))
    return errors


def slice_of(tokens: Sequence[int], start: int, count: int, table: list[int]) -> SequenceSlice:
    """With logits if they are the last tokens."""
    stop = start + count
    return SequenceSlice(
        token_ids=tokens[start:stop], start=start, block_table=table[: blocks_for(stop, BLOCK_TOKENS)],
        need_logits=stop == len(tokens),
    )  # fmt: skip


def relative(got: Tensor, want: Tensor) -> list[float]:
    """Of each row; infinite where there is a NaN."""
    got, want = got.double().cpu(), want.double().cpu()
    found = ((got - want).norm(dim=-1) / want.norm(dim=-1)).tolist()
    return [error if error == error else float("inf") for error in found]


def check_large_batch(both: Pair) -> str:
    """More rows than the largest graph has, and a row alone: the one is computed eagerly, the other by a graph."""
    rows = [
        SequenceSlice(token_ids=[1 + 7 * i % 100], start=0, block_table=[i], need_logits=True)
        for i in range(both.sizes.rows)
    ]
    errors = []
    for batch in (rows, rows[:1], rows[: max(1, len(rows) // 2)]):
        errors += relative(both.gpu.engine.forward(batch), both.cpu.engine.forward(batch))
    assert max(errors) <= TOLERANCE, errors
    return f"{len(rows)}, 1 and {max(1, len(rows) // 2)} rows, at worst {max(errors):.1e}"


def check_model(model: PreTrainedModel, name: str, device: torch.device, sizes: Sizes) -> str:
    """A family of which the bundled model is no member, with random weights. Of experts, a router that hesitates may
    choose another: there half of the rows count."""
    cpu = wrap_model(model, None, name=name, fingerprint=name)
    reference = Engine(cpu, KVPool(cpu.layout, sizes.blocks, BLOCK_TOKENS), is_fused=False)
    engine = _engine_on(device, model, cpu, name, sizes)
    errors = sorted(run_schedule(reference, engine, sizes, seed=1))
    worst = errors[len(errors) // 2] if name == "qwen3-moe" else errors[-1]
    assert worst <= TOLERANCE, errors
    return f"{len(errors)} rows, {worst:.1e}; {engine.num_replayed} steps replayed"


def _engine_on(device: torch.device, model: PreTrainedModel, cpu: LoadedModel, name: str, sizes: Sizes) -> Engine:
    if device.type == "cpu":
        pool = KVPool(cpu.layout, sizes.blocks, BLOCK_TOKENS, gpu_kernels=True)
        return Engine(cpu, pool, row_multiple=1, capture=lambda run: run, is_fused=False)
    copy = type(model)._from_config(model.config).to(model.dtype)
    copy.load_state_dict(model.state_dict())
    loaded = wrap_model(copy.to(device), None, name=name, fingerprint=name)
    return Engine(loaded, KVPool(loaded.layout, sizes.blocks, BLOCK_TOKENS, device))


def check_quantized(both: Pair, device: torch.device) -> str:
    """int4 pages with the kernels against int4 pages with torch's products, both on the CPU's tokens."""
    layout, steps = both.cpu.model.layout, both.sizes.steps
    on_gpu = device.type == "cuda"
    kernels = QuantizedKVPool(layout, both.sizes.blocks, "int4", 4, device, gpu_kernels=True)
    plain = QuantizedKVPool(layout, both.sizes.blocks, "int4", 4)
    if kernels.decode_pages is None:
        return "not built for this model's head dims"
    engine = Engine(both.gpu.model, kernels, row_multiple=1, capture=None if on_gpu else lambda run: run)
    reference = Engine(both.cpu.model, plain)
    rings = [(engine_pool.rings.allocate(), engine_pool.rings.allocate()) for engine_pool in (plain, kernels)]
    tokens, tables, errors = [[3, 5, 7] * 30, [11] * 41], [list(range(12)), list(range(20, 32))], []
    starts = [0, 0]
    for _ in range(steps + 1):
        batches = [
            [
                SequenceSlice(token_ids=t[s:], start=s, block_table=b, ring=r, need_logits=True)
                for t, s, b, r in zip(tokens, starts, tables, own, strict=True)
            ]
            for own in rings
        ]
        want, got = reference.forward(batches[0]), engine.forward(batches[1])
        errors += relative(got, want)
        starts = list(map(len, tokens))
        for row, t in zip(want, tokens, strict=True):
            t.append(int(row.argmax()))
    assert max(errors) <= 2 * TOLERANCE, errors
    return f"{len(errors)} rows, at worst {max(errors):.1e}; {engine.num_replayed} steps replayed"


# Codec, threads, sampling


def check_codec(both: Pair) -> str:
    """A prompt's KV at every level from either runtime into pages of the other, where they are neighbours and where
    they are not, and the next token's logits from there."""
    cpu, gpu = both.cpu, both.gpu
    prompt = [(13 * i + 5) % cpu.model.vocab_size for i in range(max(both.sizes.prompts))]
    blocks = blocks_for(len(prompt) + 1, BLOCK_TOKENS)
    near, far = list(range(blocks)), list(range(blocks, 2 * blocks))[::-1]
    row = SequenceSlice(token_ids=[9], start=len(prompt), block_table=near, need_logits=True)
    errors = []
    for source, target in ((gpu, cpu), (cpu, gpu)):
        prefill(source.engine, prompt, near)
        k, v = source.pool.read(near, 0, len(prompt))
        for level in source.profile.levels:
            blob = source.encode(k, v, start=0, level=level.name)
            own = source.decode(blob, start=0, stop=len(prompt))
            source.pool.write(far, 0, *own)
            want = source.engine.forward([replace(row, block_table=far)])
            for table in (near, far):
                target.decode_into_pages(blob, table, start=0, stop=len(prompt))
                errors += relative(target.engine.forward([replace(row, block_table=table)]), want)
    assert max(errors) <= TOLERANCE, errors
    codec = type(gpu.codec).__name__
    return f"{len(gpu.profile.levels)} levels both ways by {codec}, at worst {max(errors):.1e}"


def check_threads(both: Pair) -> str:
    """Another thread decodes blobs into pages while the engine steps: what is told to be written is there, bit for bit,
    and what the engine computes meanwhile does not notice."""
    gpu = both.gpu
    length = min(256, max(both.sizes.prompts))
    blocks = blocks_for(length + 1, BLOCK_TOKENS)
    prompts = [[(i * step + 3) % gpu.model.vocab_size for i in range(length)] for step in (7, 11)]
    own, tables = list(range(blocks)), [list(range(n * blocks, (n + 1) * blocks)) for n in (1, 2)]
    tables[1].reverse()
    blobs, expected = [], []
    level = next(level.name for level in gpu.profile.levels if level.name == "lossless")
    for prompt in prompts:
        prefill(gpu.engine, prompt, own)
        blobs.append(gpu.encode(*gpu.pool.read(own, 0, length), start=0, level=level))
        expected.append(gpu.engine.forward([_next(own, length)]))
    quiet = gpu.engine.forward([_next(own, length)])
    for turn in range(both.sizes.rounds):
        table, which = tables[turn % 2], turn % 3 % 2
        written, problems = threading.Event(), []

        def write(table: list[int] = table, which: int = which) -> None:
            try:
                gpu.decode_into_pages(blobs[which], table, start=0, stop=length)
            except Exception as error:  # told to the main thread
                problems.append(error)  # noqa: B023
            written.set()  # noqa: B023

        thread = threading.Thread(target=write)
        thread.start()
        while not written.is_set():
            assert torch.equal(gpu.engine.forward([_next(own, length)]), quiet), "the engine saw another thread's pages"
        got = gpu.engine.forward([_next(table, length)])
        thread.join()
        assert not problems, problems
        assert torch.equal(got, expected[which]), f"turn {turn}: pages were read before they were written"
    return f"{both.sizes.rounds} chunks"


def _next(table: list[int], length: int) -> SequenceSlice:
    return SequenceSlice(token_ids=[9], start=length, block_table=table, need_logits=True)


def check_sampling(both: Pair) -> str:
    """Of the same logits: greedy tokens are the CPU's; of seeded ones, a few may fall beside an edge, since the
    exponential function is another."""
    engine = both.gpu.engine
    rows = engine.forward([
        SequenceSlice(token_ids=[1 + i], start=0, block_table=[i], need_logits=True)
        for i in range(both.sizes.steps * 5)
    ])  # fmt: skip
    same = []
    for params in (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.8, seed=1, top_p=0.9, top_k=40),
        SamplingParams(temperature=1.0, seed=2, repetition_penalty=1.2, logprobs=3),
    ):
        drawn = [
            sample_batch(logits, [SamplingState(params, [1, 2, 3]) for _ in range(len(rows))])
            for logits in (rows, rows.cpu())
        ]
        assert all(isinstance(item, Drawn) for items in drawn for item in items), drawn
        pairs: list[tuple[Any, Any]] = list(zip(*drawn, strict=True))
        same.append(sum(a.token_id == b.token_id for a, b in pairs) / len(pairs))
    assert same[0] == 1.0 and min(same) >= 0.9, same
    return f"greedy {same[0]:.0%}, seeded {same[1]:.0%} and {same[2]:.0%} the CPU's"


# Models


_SHAPE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.15, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _random(model_class: Any, config: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    model: PreTrainedModel = model_class(config).bfloat16().eval()
    return model


def _gemma() -> PreTrainedModel:
    config = Gemma2Config(
        **_SHAPE, head_dim=32, sliding_window=40, layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=24, attn_logit_softcapping=5.0, final_logit_softcapping=10.0,
    )  # fmt: skip
    return _random(Gemma2ForCausalLM, config)


def _experts() -> PreTrainedModel:
    config = Qwen3MoeConfig(**_SHAPE, head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)
    return _random(Qwen3MoeForCausalLM, config)
