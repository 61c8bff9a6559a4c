"""Train, export and judge the bundled model (a 12-layer Llama of 8 million parameters) on a CPU.

    python -m scripts.train_model train  --text DIR --run DIR --minutes 80   (again: resumes)
    python -m scripts.train_model export --run DIR --model model
    python -m scripts.train_model eval   --model model --trials 500

Progress goes to RUN/training_log.csv, the state to RUN/checkpoint.pt every few minutes.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.model_data import (
    ANSWER,
    BOS,
    COPY,
    END,
    PAD,
    TEXT,
    TrainingSequence,
    copy_sequence,
    fact_sequence,
    recall_document,
    text_sequence,
)

LENGTHS = [256, 512, 1024, 2048, 4096]


@dataclass(frozen=True)
class Shape:
    """The architecture; the names are LlamaConfig's."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 4096
    rope_theta: float = 10_000_000.0
    rms_norm_eps: float = 1e-5


class Block(nn.Module):
    """One Llama decoder layer. Submodule names follow transformers, so the weights need no renaming."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, h = shape.hidden_size, shape.head_dim
        self.shape = shape
        self.input_layernorm = nn.RMSNorm(d, eps=shape.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(d, eps=shape.rms_norm_eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(d, shape.num_attention_heads * h, bias=False),
                "k_proj": nn.Linear(d, shape.num_key_value_heads * h, bias=False),
                "v_proj": nn.Linear(d, shape.num_key_value_heads * h, bias=False),
                "o_proj": nn.Linear(shape.num_attention_heads * h, d, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(d, shape.intermediate_size, bias=False),
                "up_proj": nn.Linear(d, shape.intermediate_size, bias=False),
                "down_proj": nn.Linear(shape.intermediate_size, d, bias=False),
            }
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, length, hidden] bf16; cos and sin [length, head_dim]. Weights are float32, products bf16."""
        batch, length, _ = x.shape
        h = self.shape.head_dim
        attention, mlp = self.self_attn, self.mlp

        def product(layer: nn.Linear, value: Tensor) -> Tensor:
            return F.linear(value, layer.weight.to(value.dtype))

        def rotate(value: Tensor) -> Tensor:
            first, second = value[..., : h // 2], value[..., h // 2 :]
            return value * cos + torch.cat([-second, first], dim=-1) * sin

        def norm(layer: nn.RMSNorm, value: Tensor) -> Tensor:
            wide = value.float()
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.shape.rms_norm_eps)
            return (wide * layer.weight).to(value.dtype)

        y = norm(self.input_layernorm, x)
        q = product(attention["q_proj"], y).view(batch, length, -1, h).transpose(1, 2)
        k = product(attention["k_proj"], y).view(batch, length, -1, h).transpose(1, 2)
        v = product(attention["v_proj"], y).view(batch, length, -1, h).transpose(1, 2)
        repeat = self.shape.num_attention_heads // self.shape.num_key_value_heads
        k, v = rotate(k).repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        y = F.scaled_dot_product_attention(rotate(q), k, v, is_causal=True)
        x = x + product(attention["o_proj"], y.transpose(1, 2).reshape(batch, length, -1))
        y = norm(self.post_attention_layernorm, x)
        y = F.silu(product(mlp["gate_proj"], y)) * product(mlp["up_proj"], y)
        return x + product(mlp["down_proj"], y)


class Network(nn.Module):
    """The Llama model with tied embeddings, without what training does not need."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        half = torch.arange(0, shape.head_dim, 2) / shape.head_dim
        angle = torch.arange(shape.max_position_embeddings)[:, None] / shape.rope_theta**half
        self.register_buffer("cos", angle.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angle.sin().repeat(1, 2), persistent=False)

    def forward(self, ids: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Token ids [batch, length] to normalised hidden states [batch, length, hidden]."""
        length = ids.shape[1]
        cos, sin = self.cos[:length].to(dtype), self.sin[:length].to(dtype)
        x = self.embed_tokens(ids).to(dtype)
        for layer in self.layers:
            # Compiled (compile_blocks) only to train: judging comes in other shapes, not worth compiling for.
            x = layer(x, cos, sin) if torch.is_grad_enabled() else layer.forward(x, cos, sin)
        return self.norm(x.float()).to(dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., hidden] to logits [..., vocab]."""
        return F.linear(hidden, self.embed_tokens.weight.to(hidden.dtype))


def initialise(network: Network, generator: torch.Generator) -> None:
    """Start where copying is near: heads that look back one to three tokens, then heads that match what they found.

    Recall is two steps, "write into each position what came before it" and "find the position whose
    predecessor equals the present token". Left to chance both take most of the training. So:
    - all embeddings share one direction, which every normalised state therefore holds as a constant;
    - the first layer's queries and keys read only that constant, turned by the rotary angle of an offset,
      so its four heads attend 1, 2, 2 and 3 tokens back;
    - in the next two layers the keys read what such a head wrote and the queries the same thing one token
      earlier, in the slow rotary pairs only (these hold at any distance): an induction head, a head that
      matches the token before the present one, and one that matches the token before that;
    - above, the keys of a group are the mean of its queries (same content attracts);
    - output projections are the transposed value projections (what is attended is named).
    Everything is trained from there.
    """
    shape = network.shape
    d, h = shape.hidden_size, shape.head_dim
    kv_heads = shape.num_key_value_heads
    per_group = shape.num_attention_heads // kv_heads

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    constant = F.normalize(normal(d), dim=0)
    embedding = normal(shape.vocab_size, d)
    embedding = embedding - (embedding @ constant)[:, None] * constant  # the shared direction holds nothing else
    network.embed_tokens.weight.data = 0.5 * (embedding + 0.6 * math.sqrt(d) * constant)
    network.norm.weight.data.fill_(0.1)  # the embeddings are also the output layer: start with small logits
    reading = 0.6 * math.sqrt(d) / math.sqrt(1 + 0.36)  # (normalised embedding) . constant
    inverse = 1.0 / shape.rope_theta ** (torch.arange(0, h, 2) / h)
    slow = (inverse < 0.002).float().repeat(2)[:, None]  # [head_dim, 1]

    first = network.layers[0].self_attn
    fast = 6.0 * (inverse > 0.01)  # only the fast pairs tell neighbours apart
    offsets = (1, 2, 2, 3)
    key = torch.cat([fast, torch.zeros_like(fast)]).repeat(kv_heads)
    query = torch.cat([torch.cat([fast * (o * inverse).cos(), -fast * (o * inverse).sin()]) for o in offsets])
    seen = torch.linalg.qr(normal(d, kv_heads * h)).Q.T.contiguous()  # orthonormal rows: what the heads read
    written = torch.linalg.qr(normal(d, d)).Q  # a subspace of its own for each head: where it writes
    first["k_proj"].weight.data = torch.outer(key, constant) / reading + 0.01 * normal(kv_heads * h, d)
    first["q_proj"].weight.data = torch.outer(query, constant) / reading + 0.01 * normal(d, d)
    first["v_proj"].weight.data = seen
    first["o_proj"].weight.data = 0.7 * written
    reads = [written[:, i * h : (i + 1) * h].T for i in range(len(offsets))]

    # (layer, group): (key reads, query reads); both sides were read with the same half of ``seen``.
    matching = {
        (1, 0): (reads[0], seen[:h]),
        (1, 1): (reads[3], reads[2]),
        (2, 0): (reads[1], reads[0]),
    }
    for index, layer in enumerate(network.layers):
        attention, mlp = layer.self_attn, layer.mlp
        mlp["gate_proj"].weight.data = normal(shape.intermediate_size, d) / math.sqrt(d)
        mlp["up_proj"].weight.data = normal(shape.intermediate_size, d) / math.sqrt(d)
        mlp["down_proj"].weight.data = torch.zeros(d, shape.intermediate_size)
        if index == 0:
            continue
        value = torch.linalg.qr(normal(d, kv_heads * h)).Q.T.reshape(kv_heads, h, d)
        attention["v_proj"].weight.data = value.reshape(-1, d).contiguous()
        queries, keys, outputs = [], [], []
        for group in range(kv_heads):
            if (index, group) in matching:
                key, query = (2.0 * slow * m + 0.01 * normal(h, d) for m in matching[index, group])
                both = [query, query + 0.01 * normal(h, d)]
                strength = 1.0
            else:
                shared = normal(h, d)
                both = [0.05 * (0.8 * shared + 0.6 * normal(h, d)) for _ in range(per_group)]
                both = [q - (q @ constant)[:, None] * constant for q in both]  # the constant must not attract
                key = torch.stack(both).mean(0)
                strength = 0.1
            keys.append(key)
            queries += both
            outputs += [strength * value[group].T / per_group] * per_group
        attention["q_proj"].weight.data = torch.cat(queries)
        attention["k_proj"].weight.data = torch.cat(keys)
        attention["o_proj"].weight.data = torch.cat(outputs, dim=1).contiguous()


class Curriculum:
    """What length and kind of document comes next; longer ones only when the longest so far is mastered."""

    def __init__(self, advance_at: float = 0.9) -> None:
        self.level = 0
        self.advance_at = advance_at
        self.accuracy = dict.fromkeys(LENGTHS, 0.0)  # running share of recalled values, training documents
        self.steps_at_level = 0

    def draw_length(self, rng: random.Random) -> int:
        """Mostly the longest length reached, some shorter, a little of the next."""
        weights = [0.0] * len(LENGTHS)
        for index in range(self.level + 1):
            weights[index] = 0.6 * 0.4 ** (self.level - index)
        if self.level + 1 < len(LENGTHS) and self.level > 0:
            weights[self.level + 1] = 0.05
        if LENGTHS[self.level] == 4096:  # all mastered: the text is what is left to learn, and short is cheaper
            weights = [0.13, 0.2, 0.2, 0.35, 0.12]
        return rng.choices(LENGTHS, weights)[0]

    def draw_kind(self, rng: random.Random) -> str:
        """Copying first; text gets its share once short recall works."""
        if self.level == 0:
            weights = [0.35, 0.5, 0.15]
        elif self.level < len(LENGTHS) - 1:
            weights = [0.06, 0.7, 0.24]
        else:
            weights = [0.05, 0.65, 0.3]
        return rng.choices(["copy", "facts", "text"], weights)[0]

    def dense_share(self) -> float:
        """Share of the fact documents that are packed with facts: all of the first ones, few of the last."""
        return (1.0, 0.3, 0.3, 0.3, 0.1)[self.level]

    def loss_weights(self) -> tuple[float, float]:
        """(asked values, copied segments) against 1 for text.

        Equal while recall forms. Once the longest length is reached the few answer tokens would mostly add
        noise to the gradient, which Muon passes on at full size, and the text would hardly be learnt.
        """
        return (0.2, 0.05) if self.level == len(LENGTHS) - 1 else (1.0, 0.5)

    def observe(self, length: int, recalled: float, count: int) -> None:
        """Account for one batch in which ``count`` values were asked and a share ``recalled`` came back."""
        if count:
            keep = 0.9 if count >= 20 else 0.95
            self.accuracy[length] += (1 - keep) * (recalled - self.accuracy[length])
        self.steps_at_level += 1
        if self.accuracy[LENGTHS[self.level]] >= self.advance_at and self.level + 1 < len(LENGTHS):
            self.level += 1
            self.steps_at_level = 0


def make_batch(
    rng: random.Random, tokenizer, stream: np.ndarray, vocab_size: int, length: int, rows: int, curriculum: Curriculum
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, kinds, groups), each [rows, length + 1] int64."""
    sequences: list[TrainingSequence] = []
    for _ in range(rows):
        kind = curriculum.draw_kind(rng)
        if kind == "copy":
            sequences.append(copy_sequence(rng, tokenizer, vocab_size, length))
        elif kind == "facts":
            sequences.append(
                fact_sequence(rng, tokenizer, stream, length, dense=rng.random() < curriculum.dense_share())
            )
        else:
            sequences.append(text_sequence(rng, tokenizer, stream, length))
    return tuple(torch.tensor([getattr(s, name) for s in sequences]) for name in ("ids", "kinds", "groups"))


def losses(
    network: Network, ids: Tensor, kinds: Tensor, groups: Tensor, answers: float = 1.0, copies: float = 0.5
) -> tuple[Tensor, dict[str, float]]:
    """The training loss and its parts. Arguments [rows, length + 1].

    Text, asked values and copied segments are averaged apart and weighted 1, ``answers`` and ``copies``: at
    1.0 the few tokens of the values weigh as much as all of the text around them.
    """
    targets, kinds, groups = ids[:, 1:], kinds[:, 1:], groups[:, 1:]
    hidden = network(ids[:, :-1])
    used = kinds != 0
    logits = network.logits(hidden[used])
    each = F.cross_entropy(logits.float(), targets[used], reduction="none")
    kind = kinds[used]
    total = torch.zeros(())
    report: dict[str, float] = {}
    for name, number, weight in (("text", TEXT, 1.0), ("answer", ANSWER, answers), ("copy", COPY, copies)):
        chosen = each[kind == number]
        if len(chosen):
            mean = chosen.mean()
            total = total + weight * mean
            report[name] = mean.item()
    with torch.no_grad():
        row = torch.arange(len(ids))[:, None].expand_as(kinds)[used]
        asked = kind == ANSWER
        right = logits[asked].argmax(-1) == targets[used][asked]
        key = (row[asked] * 1000 + groups[used][asked]).tolist()
        whole: dict[int, bool] = defaultdict(lambda: True)
        for value, good in zip(key, right.tolist(), strict=True):
            whole[value] &= good
        report["asked"] = len(whole)
        report["recalled"] = sum(whole.values()) / max(1, len(whole))
    return total, report


class BatchedMuon(torch.optim.Muon):
    """torch's Muon with all matrices of one size orthogonalised together.

    The same update, in a few large products in place of more than a thousand small ones: on cores that
    others use too, every small parallel product waits for the slower thread.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of all matrices that have a gradient."""
        for group in self.param_groups:
            by_size: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_size[parameter.shape].append(parameter)
            for (rows, columns), parameters in by_size.items():
                updates = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                    buffer = state["momentum_buffer"]
                    buffer.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(buffer, group["momentum"]))  # Nesterov
                update = orthogonalise(torch.stack(updates), group["ns_coefficients"], group["ns_steps"])
                rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
                for parameter, change in zip(parameters, update.unbind(), strict=True):
                    parameter.add_(change.to(parameter.dtype), alpha=-rate)


def orthogonalise(matrices: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Newton-Schulz: the nearest orthogonal matrices, roughly, of ``matrices`` [count, rows, columns]."""
    a, b, c = coefficients
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class ThreadChooser:
    """One thread or all of them, whichever is faster just now.

    On cores that others use, two threads that wait for each other after every product can be slower than
    one. So two steps of every sixteen are run the other way, and the better speed of late decides.
    """

    def __init__(self, most: int) -> None:
        self.choices = sorted({1, most})
        self.speed = dict.fromkeys(self.choices, 0.0)
        self.now = most

    def start_step(self, step: int) -> None:
        """Set the thread count of the coming step."""
        best = max(self.choices, key=lambda count: self.speed[count])
        others = [count for count in self.choices if count != best]
        self.now = others[0] if others and step % 16 in (0, 1) else best
        torch.set_num_threads(self.now)

    def end_step(self, tokens: int, seconds: float) -> None:
        """Account for a step that is done."""
        speed, known = tokens / max(seconds, 1e-3), self.speed[self.now]
        self.speed[self.now] = 0.7 * known + 0.3 * speed if known else speed


class Trainer:
    """Everything that a checkpoint holds."""

    def __init__(self, shape: Shape, args: argparse.Namespace, tokenizer, stream: np.ndarray) -> None:
        self.shape, self.args, self.tokenizer, self.stream = shape, args, tokenizer, stream
        self.network = Network(shape)
        initialise(self.network, torch.Generator().manual_seed(args.seed))
        hidden = [p for p in self.network.layers.parameters() if p.ndim == 2]
        other = [p for p in self.network.parameters() if p.ndim == 1]
        self.optimizers = [
            BatchedMuon(hidden, lr=args.muon_lr, weight_decay=0.0, momentum=0.95),
            torch.optim.AdamW(
                [
                    {"params": [self.network.embed_tokens.weight], "lr": args.embedding_lr},
                    {"params": other, "lr": args.norm_lr},
                ],
                betas=(0.9, 0.98),
                weight_decay=0.0,
                fused=True,
            ),
        ]
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.rng = random.Random(args.seed)
        self.curriculum = Curriculum()
        self.step, self.tokens, self.seconds = 0, 0, 0.0

    def state(self) -> dict:
        return {
            "network": self.network.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "rng": self.rng.getstate(),
            "torch_rng": torch.get_rng_state(),
            "curriculum": vars(self.curriculum),
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "shape": asdict(self.shape),
        }

    def load(self, state: dict) -> None:
        self.network.load_state_dict(state["network"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.rng.setstate(state["rng"])
        torch.set_rng_state(state["torch_rng"])
        vars(self.curriculum).update(state["curriculum"])
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]

    def save(self) -> None:
        path = Path(self.args.run) / "checkpoint.pt"
        torch.save(self.state(), path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def rate(self) -> float:
        """Learning-rate factor: warm-up by steps, constant, linear to zero over the last part of the time."""
        left = 1.0 - self.seconds / (self.args.minutes * 60)
        return max(0.0, min(1.0, (self.step + 1) / 40, left / self.args.decay_share))

    def one_step(self) -> dict[str, float]:
        length = self.curriculum.draw_length(self.rng)
        rows = max(1, self.args.step_tokens // length)
        batch = make_batch(self.rng, self.tokenizer, self.stream, self.shape.vocab_size, length, rows, self.curriculum)
        loss, report = losses(self.network, *batch, *self.curriculum.loss_weights())
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        rate = self.rate()
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += rows * length
        self.curriculum.observe(length, report["recalled"], report["asked"])
        return report | {"length": length, "rate": rate}


def prepare(args: argparse.Namespace):
    """The tokenizer, the token stream of the training books and of the held-out ones; made once per run folder."""
    from tokenizers import Tokenizer

    from scripts.model_tokenizer import held_out_sample, load_books, save_tokenizer, train_tokenizer

    run = Path(args.run)
    folder = run / "tokenizer"
    if not (run / "train.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        books, held = load_books(Path(args.text))
        tokenizer = train_tokenizer(books, Shape().vocab_size)
        save_tokenizer(tokenizer, folder, Shape().max_position_embeddings)
        (run / "heldout.txt").write_text(held_out_sample(held), encoding="utf-8")
        names = sorted(books)
        random.Random(args.seed).shuffle(names)
        for target, texts in (
            ("heldout.npy", [held[name] for name in sorted(held)]),
            ("train.npy", [books[n] for n in names]),
        ):
            # Pieces of 50 kB: the library works on them in parallel.
            pieces = [text[i : i + 50_000] for text in texts for i in range(0, len(text), 50_000)]
            encoded = tokenizer.encode_batch(pieces, add_special_tokens=False)
            np.save(run / target, np.concatenate([np.array(e.ids, dtype=np.uint16) for e in encoded]))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tokenizer, np.load(run / "train.npy"), np.load(run / "heldout.npy")


def recall_rate(
    hidden_states: Callable[[Tensor], Tensor],
    logits: Callable[[Tensor], Tensor],
    tokenizer,
    filler: np.ndarray,
    length: int,
    trials: int,
    num_facts: int = 10,
    seed: int = 1234,
    chat: bool = False,
) -> float:
    """Share of trials whose whole answer is the greedy continuation; one document, one question each.

    ``hidden_states`` maps ids [rows, length] to [rows, length, hidden], ``logits`` [n, hidden] to [n, vocab].
    The answer is fed and compared with the argmax before each of its tokens: that is right for all of
    them exactly if greedy decoding would write it. Prompt and answer together take ``length`` tokens at most.
    """
    rng = random.Random(seed + length)
    right = 0
    rows = max(1, 16384 // length)
    with torch.no_grad():
        for start in range(0, trials, rows):
            pairs = []
            for _ in range(min(rows, trials - start)):
                document = recall_document(rng, tokenizer, filler, length - 24, num_facts, chat=chat)
                question = document.questions[0]
                pairs.append((document.context_ids + question.question_ids, question.answer_ids))
            padded = torch.zeros(len(pairs), length, dtype=torch.long)  # what follows does not change what precedes
            for row, (prompt, answer) in enumerate(pairs):
                padded[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            hidden = hidden_states(padded)
            for row, (prompt, answer) in enumerate(pairs):
                at = torch.arange(len(prompt) - 1, len(prompt) - 1 + len(answer))
                right += logits(hidden[row, at]).argmax(-1).tolist() == answer
    return right / trials


def compile_blocks(network: Network) -> None:
    """Fuse the element-wise work of the layers; they share one compiled function per shape."""
    torch._dynamo.config.cache_size_limit = 64
    torch._inductor.config.cpp.dynamic_threads = True  # for ThreadChooser
    for layer in network.layers:
        layer.compile(dynamic=False)


def train(args: argparse.Namespace) -> None:
    """Train until the minutes are used up; resumes from RUN/checkpoint.pt."""
    torch.set_num_threads(args.threads)
    run = Path(args.run)
    run.mkdir(parents=True, exist_ok=True)
    tokenizer, stream, held = prepare(args)
    trainer = Trainer(Shape(), args, tokenizer, stream)
    threads = ThreadChooser(args.threads)
    if (run / "checkpoint.pt").exists():
        trainer.load(torch.load(run / "checkpoint.pt", weights_only=False))
    if not args.no_compile:
        compile_blocks(trainer.network)
    network = trainer.network
    log_path = run / "training_log.csv"
    fields = [
        "seconds",
        "step",
        "tokens",
        "level",
        "length",
        "rate",
        "text",
        "answer",
        "copy",
        "recalled",
        *[f"train_{n}" for n in LENGTHS],
        *[f"heldout_{n}" for n in LENGTHS],
    ]
    fresh = not log_path.exists()
    with log_path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="")
        if fresh:
            writer.writeheader()
        sums: dict[str, list[float]] = defaultdict(list)
        last = time.monotonic()
        saved = judged = trainer.seconds
        while trainer.seconds < args.minutes * 60:
            level = trainer.curriculum.level
            threads.start_step(trainer.step)
            before = trainer.tokens
            report = trainer.one_step()
            now = time.monotonic()
            threads.end_step(trainer.tokens - before, now - last)
            trainer.seconds += now - last
            last = now
            for name, value in report.items():
                sums[name].append(value)
            due = trainer.seconds - judged > args.judge_minutes * 60
            if trainer.step % args.log_every == 0 or due or trainer.curriculum.level != level:
                row = {
                    name: f"{np.mean(sums[name]):.4f}"
                    for name in ("text", "answer", "copy", "recalled", "rate")
                    if sums[name]
                }
                row |= {
                    "seconds": f"{trainer.seconds:.0f}",
                    "step": trainer.step,
                    "tokens": trainer.tokens,
                    "level": trainer.curriculum.level,
                    "length": report["length"],
                }
                row |= {f"train_{n}": f"{a:.3f}" for n, a in trainer.curriculum.accuracy.items()}
                if due:
                    for n in LENGTHS[1 : min(4, trainer.curriculum.level + 2)]:
                        row[f"heldout_{n}"] = (
                            f"{recall_rate(network, network.logits, tokenizer, held, n, args.judge_trials):.3f}"
                        )
                    judged = trainer.seconds
                writer.writerow(row)
                file.flush()
                print(json.dumps(row | {"tokens_per_s": {n: round(v) for n, v in threads.speed.items()}}), flush=True)
                sums.clear()
            if trainer.seconds - saved > args.save_minutes * 60:
                trainer.save()
                saved = trainer.seconds
        trainer.save()


def export(args: argparse.Namespace) -> None:
    """Write RUN's weights, tokenizer, held-out text, log and curve as the folder MODEL that transformers loads."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    run, target = Path(args.run), Path(args.model)
    state = torch.load(run / "checkpoint.pt", weights_only=False)
    shape = dict(state["shape"])
    theta = shape.pop("rope_theta")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(run / "tokenizer" / "tokenizer.json"))
    ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in (("bos_token_id", BOS), ("eos_token_id", END), ("pad_token_id", PAD))
    }
    config = LlamaConfig(
        **shape,
        **ids,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        hidden_act="silu",
    )
    model = LlamaForCausalLM(config)
    weights = {f"model.{name}": value for name, value in state["network"].items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True)
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(**ids, do_sample=False)
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    for source in [*(run / "tokenizer").iterdir(), run / "heldout.txt", run / "training_log.csv"]:
        shutil.copy(source, temporary / source.name)
    draw_curve(run / "training_log.csv", temporary / "training_curve.png")
    target.mkdir(exist_ok=True)
    for path in temporary.iterdir():  # file by file, each at once: others may be reading the folder
        path.chmod(0o644)
        os.replace(path, target / path.name)
    temporary.rmdir()
    print(f"{target}: step {state['step']}, {state['tokens']} tokens, {state['seconds'] / 60:.1f} minutes")


def draw_curve(log: Path, picture: Path) -> None:
    """Losses and recall over the tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(9, 7), sharex=True)

    def series(column: str) -> tuple[list[float], list[float]]:
        points = [(float(r["tokens"]) / 1e6, float(r[column])) for r in rows if r[column]]
        return [x for x, _ in points], [y for _, y in points]

    for column, label in (("text", "book text"), ("answer", "asked values"), ("copy", "repeated random segments")):
        upper.plot(*series(column), label=label, linewidth=1)
    upper.set_ylabel("training loss (nats a token)")
    for index, length in enumerate(LENGTHS):
        lower.plot(*series(f"train_{length}"), color=f"C{index}", linewidth=1, alpha=0.5)
        lower.plot(*series(f"heldout_{length}"), "o-", color=f"C{index}", label=f"{length} tokens, held-out text")
    lower.set_ylabel("share of values recalled")
    lower.set_xlabel("million tokens (thin lines: running share in training documents)")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=100)


def evaluate(args: argparse.Namespace) -> None:
    """Print, as JSON, the recall at each length and the held-out loss by position of an exported model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    text = Path(args.heldout or Path(args.model) / "heldout.txt").read_text(encoding="utf-8")
    filler = np.array(tokenizer.encode(text, add_special_tokens=False))

    def hidden_states(ids: Tensor) -> Tensor:
        return model.model(input_ids=ids, use_cache=False).last_hidden_state

    result: dict = {
        "trials": args.trials,
        "documents": -(-args.trials // args.questions),
        "facts": args.facts,
        "recall": {},
        "recall_chat": {},
    }
    for name, lengths in (("recall", args.lengths), ("recall_chat", args.chat_lengths)):
        for length in lengths:
            result[name][length] = cached_recall(
                model, tokenizer, filler, length, args.trials, args.questions, args.facts, chat=name == "recall_chat"
            )
            print(json.dumps(result), file=sys.stderr, flush=True)
    result["heldout_loss"] = loss_by_position(
        hidden_states, model.lm_head, filler, model.config.bos_token_id, args.loss_rows
    )
    print(json.dumps(result, indent=2))


def cached_recall(
    model,
    tokenizer,
    filler: np.ndarray,
    length: int,
    trials: int,
    questions: int,
    num_facts: int,
    seed: int = 4321,
    chat: bool = False,
) -> float:
    """Share of ``trials`` answered right by a transformers model, each a question after a document's own KV cache.

    A document's cache is computed once and ``questions`` different questions are asked of copies of it, so
    none sees another. Right means: every answer token is the argmax before it, as greedy decoding needs.
    """
    rng = random.Random(seed + length)
    right = done = 0
    with torch.no_grad():
        while done < trials:
            document = recall_document(rng, tokenizer, filler, length - 24, num_facts, chat=chat)
            asked = document.questions[: min(questions, trials - done)]
            context = torch.tensor([document.context_ids])
            cache = model.model(input_ids=context, use_cache=True).past_key_values
            cache.batch_repeat_interleave(len(asked))
            width = max(len(q.question_ids) + len(q.answer_ids) for q in asked)
            ids = torch.zeros(len(asked), width, dtype=torch.long)
            for row, question in enumerate(asked):
                both = question.question_ids + question.answer_ids
                ids[row, : len(both)] = torch.tensor(both)
            best = model(input_ids=ids, past_key_values=cache).logits.argmax(-1)
            for row, question in enumerate(asked):
                start = len(question.question_ids) - 1
                right += best[row, start : start + len(question.answer_ids)].tolist() == question.answer_ids
            done += len(asked)
    return right / done


def loss_by_position(
    hidden_states: Callable[[Tensor], Tensor],
    logits: Callable[[Tensor], Tensor],
    filler: np.ndarray,
    bos: int,
    rows: int,
) -> dict[str, float]:
    """Mean loss (nats a token) of held-out text in ranges of positions, over ``rows`` windows of 4,096 tokens."""
    edges = [0, 64, 256, 512, 1024, 2048, 3072, 4096]
    length = edges[-1]
    starts = np.linspace(0, len(filler) - length - 1, rows).astype(int)
    total = torch.zeros(length)
    with torch.no_grad():
        for start in starts:
            targets = torch.tensor(filler[start : start + length])
            ids = torch.cat([torch.tensor([bos]), targets[:-1]])[None]
            total += F.cross_entropy(logits(hidden_states(ids)[0]).float(), targets, reduction="none")
    mean = total / len(starts)
    result = {f"{low}-{high}": round(mean[low:high].mean().item(), 4) for low, high in pairwise(edges)}
    return result | {"all": round(mean.mean().item(), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("train", help="train or resume")
    sub.add_argument("--text", required=True, help="folder of books, author/title.md")
    sub.add_argument("--run", required=True, help="folder for checkpoint and log")
    sub.add_argument("--minutes", type=float, default=80)
    sub.add_argument("--threads", type=int, default=2)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--step-tokens", type=int, default=4096)
    sub.add_argument("--muon-lr", type=float, default=0.02)
    sub.add_argument("--embedding-lr", type=float, default=0.015)
    sub.add_argument("--norm-lr", type=float, default=0.004)
    sub.add_argument("--decay-share", type=float, default=0.6)
    sub.add_argument("--save-minutes", type=float, default=3)
    sub.add_argument("--judge-minutes", type=float, default=12)
    sub.add_argument("--judge-trials", type=int, default=32)
    sub.add_argument("--log-every", type=int, default=10)
    sub.add_argument("--no-compile", action="store_true")
    sub.set_defaults(call=train)
    sub = commands.add_parser("export", help="write the model folder from the checkpoint")
    sub.add_argument("--run", required=True)
    sub.add_argument("--model", required=True)
    sub.set_defaults(call=export)
    sub = commands.add_parser("eval", help="recall and held-out loss of a model folder, as JSON")
    sub.add_argument("--model", required=True)
    sub.add_argument("--heldout", help="text file used as filler and for the loss (default MODEL/heldout.txt)")
    sub.add_argument("--lengths", type=int, nargs="*", default=[512, 1024, 2048, 4096])
    sub.add_argument("--chat-lengths", type=int, nargs="*", default=[512, 2048])
    sub.add_argument("--trials", type=int, default=500)
    sub.add_argument("--facts", type=int, default=10)
    sub.add_argument("--questions", type=int, default=4, help="questions asked of each document, apart from each other")
    sub.add_argument("--loss-rows", type=int, default=24)
    sub.add_argument("--threads", type=int, default=2)
    sub.set_defaults(call=evaluate)
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
