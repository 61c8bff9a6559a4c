"""prefill/model.py, prefill/rotation.py: every family that docs/models.md calls tested, against plain transformers in
float32; and what the codec does with its keys.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from model_families import FAMILIES, random_ids, tiny_model

from codec.chunk import decode_chunk, encode_chunk
from codec.profile import default_profile
from codec.rope import RopeTable, unrotate
from prefill.block_pool import BlockPool
from prefill.engine import Engine, SequenceSlice, SliceInvalid, generate_greedy
from prefill.kv_pool import KVPool
from prefill.model import ModelRefused, wrap_model
from scripts.calibrate_model import check_can_be_calibrated

# Of float32 logits up to 7. Sums in another order cost up to 7e-6; a wrong window, scale or rotation 0.1 and more.
ATOL = 5e-5
NUM_BLOCKS = 64
FAMILY = pytest.mark.parametrize("family", FAMILIES)


def engine_of(family: str, num_blocks: int = NUM_BLOCKS) -> Engine:
    model = wrap_model(tiny_model(family), None, name=family, fingerprint=family)
    return Engine(model, KVPool(model.layout, num_blocks), row_multiple=4)


@FAMILY
def test_what_the_probe_finds(family: str) -> None:
    model, spec = engine_of(family).model, FAMILIES[family]
    assert (model.layout.windows, model.max_context) == (spec.windows, spec.max_context)
    cos, sin, layers = model.rope_tables(40, 60)
    assert cos.shape == sin.shape == (20, spec.rotary_dims) and cos.dtype == torch.float32
    assert layers is None if all(spec.rotated) else layers == spec.rotated
    whole = model.rope_tables(0, 60)
    assert torch.equal(whole[0][40:], cos) and torch.equal(whole[1][40:], sin)


@FAMILY
def test_chunks_and_decode_rows_together_give_the_logits_of_transformers(family: str) -> None:
    engine, reference = engine_of(family), tiny_model(family)
    prompts = [random_ids(n, seed=n) for n in (131, 90, 58)]
    tables = [list(range(20, 30)), [5, 3, 9, 1, 7, 0], [40, 12, 13, 41]]
    with torch.inference_mode():
        expected = [reference(torch.tensor([ids])).logits[0] for ids in prompts]
    # Each forward pass: (sequence, tokens) in the order of the batch. Uneven chunks, decode rows between them.
    schedule = [
        [(0, 37)],
        [(1, 16), (0, 50)],
        [(0, 1), (2, 40), (1, 45)],
        [(2, 1), (0, 1), (1, 1)],
        [(1, 27), (2, 1), (0, 41)],
        [(2, 1), (1, 1), (0, 1)],
        [(2, 15)],
    ]
    done = [0, 0, 0]
    for batch in schedule:
        slices = [
            SequenceSlice(
                token_ids=prompts[s][done[s] : done[s] + count],
                start=done[s],
                block_table=tables[s],
                need_logits=True,
            )
            for s, count in batch
        ]
        logits = engine.forward(slices)
        for row, (s, count) in zip(logits, batch, strict=True):
            done[s] += count
            torch.testing.assert_close(row, expected[s][done[s] - 1], atol=ATOL, rtol=0)
    assert done == [131, 90, 58]


@FAMILY
def test_bf16_does_not_depend_on_the_schedule(family: str) -> None:
    """Bit for bit. With experts: test_engine_experts.py, too."""
    model = wrap_model(tiny_model(family).bfloat16(), None, name=family, fingerprint=family)
    engine = Engine(model, KVPool(model.layout, NUM_BLOCKS))  # measures by how many rows to pad
    ids, other, table = random_ids(131, seed=3), random_ids(60, seed=4), list(range(20, 30))
    results = []
    for cuts, is_shared in (([131], False), ([37, 50, 43, 1], False), ([1, 1, 1, 127, 1], True)):
        done = 0
        for number, count in enumerate(cuts):
            piece = SequenceSlice(token_ids=ids[done : done + count], start=done, block_table=table, need_logits=True)
            start = 7 * number
            neighbour = SequenceSlice(token_ids=other[start : start + 7], start=start, block_table=[0, 1, 2, 3])
            logits = engine.forward([neighbour, piece] if is_shared else [piece])[-1]
            done += count
        results.append((logits, *engine.pool.read(table, 0, 131)))
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@FAMILY
def test_greedy_tokens_are_those_of_generate(family: str) -> None:
    engine, reference = engine_of(family), tiny_model(family)
    for num_tokens, chunk_tokens in ((3, 256), (75, 29)):
        prompt = random_ids(num_tokens, seed=100 + num_tokens)
        expected = reference.generate(
            torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, num_tokens:]
        tokens = generate_greedy(engine, BlockPool(NUM_BLOCKS), prompt, 10, chunk_tokens=chunk_tokens)
        assert tokens == expected.tolist()


def keys_before_rotation(engine: Engine, run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list:
    """What the family's own functions were given to rotate [T, H, D], call by call."""
    module = sys.modules[type(engine.model.model).__module__]
    seen: list[torch.Tensor] = []
    for name in ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave", "apply_rotary_emb"):
        if hasattr(module, name):
            original = getattr(module, name)

            def record(q, k, *args, original=original, **kwargs):
                seen.append(k[0].transpose(0, 1).clone())
                return original(q, k, *args, **kwargs)

            monkeypatch.setattr(module, name, record)
    run()
    return seen


@FAMILY
def test_rope_tables_undo_the_models_rotation(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, spec = engine_of(family), FAMILIES[family]
    count, table = 90, list(range(6))
    piece = SequenceSlice(token_ids=random_ids(count, seed=5), start=0, block_table=table)
    seen = keys_before_rotation(engine, lambda: engine.forward([piece]), monkeypatch)
    # A layer without rotation does not call; there are no others.
    callers = range(4) if len(seen) == 4 else [i for i in range(4) if spec.rotated[i]]
    raw = dict(zip(callers, seen, strict=True))
    keys = engine.pool.read(table, 0, count)[0]
    rope = RopeTable(*engine.model.rope_tables(0, count))
    assert rope.turned(0, 4).tolist() == [flag and spec.rotary_dims > 0 for flag in spec.rotated]
    for layer in range(4):
        if not rope.turned(layer, layer + 1)[0]:
            continue
        for head in range(keys.shape[2]):
            back = torch.from_numpy(unrotate(keys[layer, :, head].numpy(), *rope.inverse()))
            dims = spec.rotary_dims
            before = raw[layer][:count, head].clone()  # behind it stand the rows of padding
            ratio = (back[:, :dims].norm() / before[:, :dims].norm()).item()
            before[:, :dims] *= ratio  # yarn and longrope scale what they rotate, which stays in the keys
            torch.testing.assert_close(back, before, atol=1e-4, rtol=1e-4)
            assert ratio == pytest.approx(1.0, abs=1e-5) or family in ("llama-yarn", "phi3-longrope")


@FAMILY
def test_chunks_go_through_the_codec(family: str) -> None:
    engine = engine_of(family)
    count, start, table = 70, 13, list(range(6))
    engine.forward([SequenceSlice(token_ids=random_ids(start + count, seed=6), start=0, block_table=table)])
    k, v = engine.pool.read(table, start, start + count)
    profile = default_profile(engine.model.layout)
    rope = RopeTable(*engine.model.rope_tables(start, start + count))
    exact = decode_chunk(encode_chunk(k, v, level="lossless", profile=profile, rope=rope), profile=profile, rope=rope)
    assert torch.equal(exact[0], k) and torch.equal(exact[1], v)
    level = profile.level_names[2]
    blob = encode_chunk(k, v, level=level, profile=profile, rope=rope)
    assert blob == encode_chunk(k, v, level=level, profile=profile, rope=rope, backend="reference")
    got = decode_chunk(blob, profile=profile, rope=rope)
    slow = decode_chunk(blob, profile=profile, rope=rope, backend="reference")
    for x, y, z in zip(got, slow, (k, v), strict=True):
        assert torch.equal(x, y)
        assert (x - z).norm() < 0.1 * z.norm()
    part = decode_chunk(blob, profile=profile, rope=rope, layers=(1, 4))
    assert torch.equal(part[0], got[0][1:]) and torch.equal(part[1], got[1][1:])


@pytest.mark.parametrize("family", ["llama-dynamic", "phi3-longrope"])
def test_capped_rope_does_not_depend_on_the_batch(family: str) -> None:
    """Neighbours at the last position of the capped context change nothing; past it they would, and are refused."""
    engine = engine_of(family)
    cap = engine.model.max_context
    short = SequenceSlice(token_ids=random_ids(40, seed=1), start=0, block_table=[0, 1, 2], need_logits=True)
    last = SequenceSlice(token_ids=[9, 8], start=cap - 2, block_table=list(range(8, 8 + cap // 16)))
    alone = engine.forward([short])[0]
    assert torch.allclose(engine.forward([short, last])[0], alone, atol=1e-5)
    tables = engine.model.rope_tables(0, cap)
    beyond = SequenceSlice(token_ids=[9, 8], start=cap - 1, block_table=list(range(8, 9 + cap // 16)))
    with pytest.raises(SliceInvalid, match=f"context of {cap}"):
        engine.forward([short, beyond])
    # What the cap keeps out: transformers itself switches there.
    rotary = engine.model.rotation.rotary
    assert rotary is not None
    scale = 4 if family == "llama-dynamic" else 1  # where HF counts from max_position_embeddings
    rotary(torch.zeros(1), torch.tensor([[0, 1, scale * cap + 8]]))
    now = engine.model.rope_tables(0, cap)
    switched = rotary(torch.zeros(1), torch.tensor([[5, scale * cap + 8]]))[0][0, 0]
    rotary(torch.zeros(1), torch.tensor([[0]]))
    assert torch.equal(now[0], tables[0])
    assert not torch.allclose(switched / getattr(rotary, "attention_scaling", 1.0), tables[0][5], atol=1e-4)


def test_of_two_tables_the_one_of_layers_without_a_window_is_taken() -> None:
    """They hold most of what a long context keeps."""
    assert engine_of("gemma3").model.rotation.layer_type == "full_attention"


@FAMILY
def test_calibration_refuses_what_it_would_read_wrongly(family: str) -> None:
    model, spec = engine_of(family).model, FAMILIES[family]
    cache = tiny_model(family)(torch.tensor([random_ids(70, seed=1)]), use_cache=True).past_key_values
    shapes = [(layer.keys.shape[1:], layer.values.shape[-1]) for layer in cache.layers]
    layout = model.layout
    wanted = [((layout.num_kv_heads, 70, layout.head_dim_k), layout.head_dim_v)] * 4
    if shapes == wanted:
        check_can_be_calibrated(model)
    else:
        with pytest.raises(ModelRefused, match="cannot be calibrated yet"):
            check_can_be_calibrated(model)
        assert any(spec.windows) or family.startswith("deepseek")
