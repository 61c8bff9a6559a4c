"""What `scripts/bench_engine.py` compares, each in a process of its own: reads one request a line from its input, runs
it, and answers with one line. Imports nothing of kvstream but for its own engine: `vllm` has another Python.

    python engine_contestants.py KIND MODEL THREADS
    -> {"versions": {...}}
    <- {"prompts": [[id, ...], ...], "outputs": [tokens to generate, ...]}
    -> {"seconds": .., "tokens": [[id, ...], ...]}

Greedy, and no end-of-sequence: every request generates exactly the tokens it is asked for.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[[list[list[int]], list[int]], list[list[int]]]
PROMPT_TOKENS_A_STEP = 2048


def kvstream(model_path: str, threads: int) -> tuple[Run, dict[str, str]]:
    """Continuous batching over `Engine`: every step takes a row of each running request and up to PROMPT_TOKENS_A_STEP
    tokens of prompts, first come, first served. As decode/scheduler.py does, without its arrivals and deadlines."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import torch

    from prefill.block_pool import blocks_for
    from prefill.engine import Engine, SequenceSlice
    from prefill.kv_pool import KVPool
    from prefill.model import load_model

    torch.set_num_threads(threads)
    model = load_model(model_path)
    pool = KVPool(model.layout, 32 * model.max_context // 16)
    engine = Engine(model, pool)

    def run(prompts: list[list[int]], outputs: list[int]) -> list[list[int]]:
        tables, used = [], 0
        for prompt, num_tokens in zip(prompts, outputs, strict=True):
            count = blocks_for(len(prompt) + num_tokens, pool.block_tokens)
            tables.append(range(used, used + count))
            used += count
        done = [0] * len(prompts)
        tokens: list[list[int]] = [[] for _ in prompts]
        while any(len(made) < wanted for made, wanted in zip(tokens, outputs, strict=True)):
            slices, owners, budget = [], [], PROMPT_TOKENS_A_STEP
            for i, prompt in enumerate(prompts):
                if done[i] < len(prompt):
                    part = prompt[done[i] : done[i] + budget]
                elif len(tokens[i]) < outputs[i]:
                    part = tokens[i][-1:]
                else:
                    continue
                if not part:
                    continue
                budget -= len(part) if done[i] < len(prompt) else 0
                last = done[i] + len(part) >= len(prompt)
                slices.append(SequenceSlice(token_ids=part, start=done[i], block_table=tables[i], need_logits=last))
                done[i] += len(part)
                if last:
                    owners.append(i)
            for i, token in zip(owners, engine.forward(slices).argmax(-1).tolist(), strict=True):
                tokens[i].append(token)
        return tokens

    return run, {"torch": torch.__version__, "rows padded to": str(engine.row_multiple)}


def _transformers(model_path: str, threads: int) -> Any:
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).eval()
    return torch, model, {"torch": torch.__version__, "transformers": transformers.__version__}


def generate(model_path: str, threads: int) -> tuple[Run, dict[str, str]]:
    """transformers, one request after the other, SDPA."""
    torch, model, versions = _transformers(model_path, threads)

    def run(prompts: list[list[int]], outputs: list[int]) -> list[list[int]]:
        tokens = []
        for prompt, num_tokens in zip(prompts, outputs, strict=True):
            made = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=num_tokens,
                eos_token_id=None,
                do_sample=False,
                pad_token_id=0,
            )
            tokens.append(made[0, len(prompt) :].tolist())
        return tokens

    return run, versions | {"attention": model.config._attn_implementation}


def generate_batch(model_path: str, threads: int) -> tuple[Run, dict[str, str]]:
    """transformers' own continuous batching."""
    _, model, versions = _transformers(model_path, threads)
    from transformers import ContinuousBatchingConfig, GenerationConfig

    def run(prompts: list[list[int]], outputs: list[int]) -> list[list[int]]:
        config = GenerationConfig(max_new_tokens=max(outputs), do_sample=False, eos_token_id=-1, pad_token_id=0)
        batching = ContinuousBatchingConfig(
            num_blocks=sum(-(-(len(p) + n) // 256) + 1 for p, n in zip(prompts, outputs, strict=True)),
            max_batch_tokens=PROMPT_TOKENS_A_STEP,
            allow_block_sharing=False,
        )
        with model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=batching, block=True, timeout=5
        ) as manager:
            names = [
                manager.add_request(prompt, max_new_tokens=num_tokens, eos_token_id=-1)
                for prompt, num_tokens in zip(prompts, outputs, strict=True)
            ]
            found: dict[str, list[int]] = {}
            while len(found) < len(names):
                result = manager.get_result(timeout=1)
                if result is not None:
                    if result.error:
                        raise RuntimeError(result.error)
                    found[result.request_id] = result.generated_tokens
                elif not manager.is_running():
                    raise RuntimeError("transformers' batching stopped before it was done")
        return [found[name] for name in names]

    return run, versions


def vllm(model_path: str, threads: int) -> tuple[Run, dict[str, str]]:
    """vLLM's CPU backend as it comes, with its compiled graphs; prefixes are not shared."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}" if threads > 1 else "0"
    import torch
    import vllm as package

    model = package.LLM(
        model=model_path, dtype="bfloat16", max_model_len=4096, max_num_seqs=32, enable_prefix_caching=False
    )

    def run(prompts: list[list[int]], outputs: list[int]) -> list[list[int]]:
        sampling = [
            package.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            for count in outputs
        ]
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = model.generate(asked, sampling, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    return run, {"torch": torch.__version__, "vllm": package.__version__}


KINDS = {"kvstream": kvstream, "generate": generate, "generate_batch": generate_batch, "vllm": vllm}


def main() -> None:
    kind, model_path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    # Libraries print what they like to where answers go: keep that line to ourselves.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")

    try:
        run, versions = KINDS[kind](model_path, threads)
        answer(versions=versions)
        for line in sys.stdin:
            asked = json.loads(line)
            begin = time.perf_counter()
            tokens = run(asked["prompts"], asked["outputs"])
            answer(seconds=time.perf_counter() - begin, tokens=tokens)
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    main()
