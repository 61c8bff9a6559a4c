"""The bundled model's tokenizer and its training text: cleaning, the held-out split, and the byte-level BPE."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from scripts.model_data import (
    ADJECTIVES,
    ASSISTANT,
    BOS,
    END,
    NAMES,
    PAD,
    SPECIAL_TOKENS,
    SYSTEM,
    USER,
    VALUE_WORDS,
    make_facts,
)

# Never trained on: judged by them, and pieces of the last three are bundled as model/heldout.txt.
HELD_OUT = (
    "henry_david_thoreau",
    "joseph_conrad/heart_of_darkness",
    "jane_austen/persuasion",
    "jack_london/the_call_of_the_wild",
)
HELD_OUT_SAMPLE = ("jane_austen/persuasion", "jack_london/the_call_of_the_wild", "henry_david_thoreau/walden")

# A number is cut into digits and a space belongs to what follows it, so " 4821" is " 4", "8", "2", "1".
SPLIT = r"'(?:s|d|m|t|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n+|\s"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def clean(markdown: str) -> str:
    """Plain paragraphs of a markdown book: no title block, headings, rules, emphasis marks or double spaces."""
    body = markdown.split("-------", 1)[-1]
    kept = []
    for line in body.splitlines():
        line = line.strip()
        if (
            line.startswith("#")
            or re.fullmatch(r"[-*_ .]*", line)
            or re.search(r"gutenberg|\[illustration", line, re.I)
        ):
            continue
        line = re.sub(r"[*_]{1,3}(\S[^*_]*)[*_]{1,3}", r"\1", line).replace("’", "'").replace("‘", "'")
        line = line.replace("“", '"').replace("”", '"').replace("—", "--")
        kept.append(re.sub(r"\s+", " ", line))
    return "\n\n".join(kept)


def load_books(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(training books, held-out books) by name "author/title"."""
    train: dict[str, str] = {}
    held: dict[str, str] = {}
    for path in sorted(folder.glob("*/*.md")):
        name = f"{path.parent.name}/{path.stem}"
        (held if name.startswith(HELD_OUT) else train)[name] = clean(path.read_text(encoding="utf-8"))
    if not train or not held:
        raise FileNotFoundError(f"no books (author/title.md) in {folder}")
    return train, held


def held_out_sample(held: dict[str, str], size: int = 400_000) -> str:
    """About ``size`` characters of held-out text in equal parts, cut at paragraphs."""
    parts = []
    for name in HELD_OUT_SAMPLE:
        cut = held[name][: size // len(HELD_OUT_SAMPLE)]
        parts.append(cut[: cut.rfind("\n\n")])
    return "\n\n".join(parts) + "\n"


def train_tokenizer(books: dict[str, str], vocab_size: int, characters: int = 24_000_000, seed: int = 0) -> Tokenizer:
    """Byte-level BPE of ``vocab_size`` trained on a sample of the books and on the words of the recall documents.

    The recall words are shown often enough to become single tokens: a name of one token is one thing to
    match, and the small model need not first learn to join pieces.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(seed)

    def corpus():
        chunk = 20_000
        names = sorted(books)
        for _ in range(characters // chunk):
            text = books[rng.choice(names)]
            start = rng.randrange(max(1, len(text) - chunk))
            yield text[start : start + chunk]
        words = "".join(f" {word}" for word in NAMES + ADJECTIVES + VALUE_WORDS)
        for _ in range(4000):
            yield words
            yield "".join(f" {fact.sentence}" for fact in make_facts(rng, 4))

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    start = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, start)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja as AutoTokenizer expects them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {"system_token": SYSTEM, "user_token": USER, "assistant_token": ASSISTANT},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
