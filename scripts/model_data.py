"""Synthetic long-range recall documents: the data that the bundled model is trained on and judged by.

Pure functions: everything random comes from the ``random.Random`` that is handed in, all text comes from
the filler tokens that are handed in, so the same seed gives the same document everywhere (training,
tests, codec calibration and demo).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Names of the things the facts are about. One token each in the bundled tokenizer, which saw them often.
NAMES = """Marigold Falcon Juniper Obsidian Thistle Walnut Copper Saffron Heron Lantern Magpie Granite Willow Ember
Harbour Quartz Raven Clover Bramble Cobalt Sparrow Amber Cedar Dahlia Elm Fern Ginger Hazel Indigo Jasper Kestrel
Lavender Maple Nettle Opal Poppy Quill Rowan Sable Tulip Umber Violet Wren Yarrow Zephyr Acorn Badger Cactus Dolphin
Eagle Finch Gazelle Hornet Ibis Jackal Koala Lynx Marten Newt Otter Panther Quail Rabbit Salmon Tiger Urchin Viper
Walrus Yak Zebra Anchor Beacon Canyon Delta Eclipse Fjord Glacier Horizon Island Jungle Lagoon Meadow Nebula Oasis
Prairie Quarry Ridge Summit Tundra Valley Volcano Waterfall Arrow Banjo Compass Drum Easel Fiddle Goblet Hammer Ivory
Jigsaw Kettle Ladder Mirror Needle Organ Pendulum Quiver Rocket Saddle Telescope Umbrella Velvet Whistle Xylophone Yacht
Zipper Almond Basil Cinnamon Dill Endive Fennel Garlic Honey Iris Jasmine Kiwi Lemon Mango Nutmeg Olive Pepper Quince
Raisin Sage Thyme Vanilla Wasabi Apricot Barley Cherry Damson Elder Fig Grape Hickory Ivy Jade Kelp Lilac Mint Nectar
Onyx Pearl Rhubarb Sapphire Topaz Turquoise Ruby Emerald Crimson Scarlet Azure Bronze Silver Golden Charcoal Diamond
Garnet Agate Beryl Coral Flint Marble Slate Basalt Pumice Cobbler Miller Tanner Weaver Mason Fletcher Sailor Ranger
Pilot Hunter Archer Baker Carter Draper Farrier Gardener Herald Joiner Keeper Locksmith Mariner Novice Oracle Pilgrim
Rider Scholar Trader Usher Warden Yeoman Comet Meteor Saturn Jupiter Neptune Pluto Orion Vega Sirius Castor Pollux
Andromeda Cygnus Lyra Perseus Phoenix Draco Hydra Pegasus""".split()

# Names that the bundled model never saw, several tokens each: questions about them are hard, so that answers are
# uncertain and an error in the KV shows.
UNSEEN_NAMES = """Zanzibar Abernathy Okonkwo Thornbury Valdemar Kowalski Brisbane Quetzal Nakamura Fitzgerald Lumumba
Schreiber Andalusia Montevideo Birmingham Szymanski Kilimanjaro Guadalupe Petersen Vercingetorix Winnipeg Rasmussen
Caledonia Bonaventure Tchaikovsky Oberhausen Mahalia Kensington Dubrovnik Llewellyn Anatolia Bartholomew Casablanca
Dragomir Esterhazy Faulkner Gilgamesh Hellespont Islington Jaipur Kathmandu Lombardy Mozambique Nottingham Ouagadougou
Pondicherry Reykjavik Samarkand Timbuktu Uppsala""".split()

# Two-word names are one of these and one of NAMES: " Quiet Falcon".
ADJECTIVES = """Quiet Bright Hidden Northern Southern Eastern Western Ancient Broken Distant Gentle Hollow Little Lonely
Narrow Open Royal Silent Stormy Winter""".split()

# The words of a two-word value: common words, one token each.
VALUE_WORDS = """river garden window silver morning winter paper stone candle bridge forest island mirror shadow summer
thunder velvet village water yellow apple arrow autumn basket bottle branch butter button carpet castle chapel cherry
circle clock cloud coffee corner cottage cotton cousin crown curtain desert dinner doctor dragon evening feather
fellow finger flower friend glass grass green ground hammer harbor hollow honey horse hunter iron journey kitchen
ladder lantern leather letter lion little marble market meadow medal metal middle minute mountain music nature needle
ocean office orange palace parlor pearl pepper picture pillow pirate planet pocket prince queen rabbit ribbon rose
sailor salt season secret signal sister soldier spring square stable street sugar table temple tiger timber tower
travel tunnel uncle valley violin walnut wagon whisper white wind wolf wonder yard""".split()

NUMBER_ATTRIBUTES = [
    "access code",
    "locker number",
    "badge number",
    "room code",
    "account number",
    "ticket number",
    "key number",
]
WORD_ATTRIBUTES = ["password", "secret phrase", "code name", "watchword", "signal"]

# (the subject, the question). The name stands right before " is" and the value in all of them, so that
# finding the value is matching the name, not parsing a sentence.
TEMPLATES = [
    ("The {attribute} of {name}", "What is the {attribute} of {name}?"),
    ("The {attribute} for {name}", "What is the {attribute} for {name}?"),
    ("The {attribute} given to {name}", "What is the {attribute} given to {name}?"),
    ("Remember that the {attribute} of {name}", "What is the {attribute} of {name}?"),
]

BOS, END, SYSTEM, USER, ASSISTANT, PAD = "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>"
SPECIAL_TOKENS = [PAD, BOS, END, SYSTEM, USER, ASSISTANT]

# What the target at a position is, for the training loss.
IGNORE, TEXT, ANSWER, COPY = 0, 1, 2, 3


@dataclass(frozen=True)
class Fact:
    """One stated fact: ``subject`` is "The access code of Marigold", ``value`` is "4821"."""

    name: str
    subject: str
    value: str
    question: str

    @property
    def sentence(self) -> str:
        """The statement without a leading space."""
        return f"{self.subject} is {self.value}."

    @property
    def answer_sentence(self) -> str:
        """What the assistant answers in chat."""
        subject = self.subject.removeprefix("Remember that ")
        return f"{subject[0].upper()}{subject[1:]} is {self.value}."


@dataclass(frozen=True)
class RecallQuestion:
    """A question to append to the context. Greedy continuation must equal ``answer_ids``."""

    fact: Fact
    question_ids: list[int]
    answer_ids: list[int]
    fact_position: int  # index in context_ids of the first token of the stated fact


@dataclass(frozen=True)
class RecallDocument:
    """A context holding several facts of one wording, and a question for every one of them.

    ``context_ids + questions[i].question_ids`` is a whole prompt; the questions are independent of each
    other (ask one per prompt) and come in random order.
    """

    context_ids: list[int]
    questions: list[RecallQuestion]
    chat: bool


def make_facts(
    rng: random.Random, count: int, value_kind: str | None = None, pool: Sequence[str] = NAMES
) -> list[Fact]:
    """``count`` facts with one wording and distinct names of ``pool``; ``value_kind`` is "number", "words" or None."""
    kind = value_kind or rng.choice(["number", "words"])
    if kind not in ("number", "words"):
        raise ValueError(f"value_kind must be 'number' or 'words', not {kind!r}")
    attribute = rng.choice(NUMBER_ATTRIBUTES if kind == "number" else WORD_ATTRIBUTES)
    subject, question = rng.choice(TEMPLATES)
    style = rng.random()
    names: dict[str, None] = {}
    while len(names) < count:
        name = rng.choice(pool)
        # A fifth of the documents mixes in two-word names, so that one word of a name can be ambiguous.
        if style < 0.2 and rng.random() < 0.7:
            name = f"{rng.choice(ADJECTIVES)} {name}"
        names[name] = None
    facts = []
    for name in names:
        if kind == "number":
            value = f"{rng.randrange(1000, 10000)}"
        else:
            value = " ".join(rng.sample(VALUE_WORDS, 2))
        words = {"attribute": attribute, "name": name}
        facts.append(Fact(name, subject.format(**words), value, question.format(**words)))
    return facts


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of ``text`` without the start token (a transformers or a plain tokenizers tokenizer)."""
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return encoded if isinstance(encoded, list) else encoded.ids


def special_id(tokenizer, token: str) -> int:
    """The id of one of SPECIAL_TOKENS, in either kind of tokenizer."""
    lookup = getattr(tokenizer, "token_to_id", None) or tokenizer.convert_tokens_to_ids
    return lookup(token)


def _sentence_end_ids(tokenizer) -> np.ndarray:
    """Ids of the tokens after which a sentence may start with a space."""
    ids = {encode(tokenizer, text)[-1] for text in [".", "!", "?", ' ."', '."', '?"', '!"', ";"]}
    return np.array(sorted(ids))


def _insert_points(rng: random.Random, tokenizer, filler: np.ndarray, count: int) -> list[int]:
    """``count`` sorted offsets into ``filler``, uniform in depth and moved to the next sentence end if one is near."""
    ends = np.nonzero(np.isin(filler, _sentence_end_ids(tokenizer)))[0] + 1
    points = []
    for _ in range(count):
        point = rng.randint(0, len(filler))
        place = int(np.searchsorted(ends, point))
        if place < len(ends) and ends[place] - point < 64:
            point = int(ends[place])
        points.append(point)
    return sorted(points)


def take_filler(rng: random.Random, filler_tokens: Sequence[int], count: int) -> np.ndarray:
    """A random run of ``count`` consecutive filler tokens."""
    if count < 0 or count > len(filler_tokens):
        raise ValueError(f"need {count} filler tokens of {len(filler_tokens)}")
    start = rng.randint(0, len(filler_tokens) - count)
    return np.asarray(filler_tokens[start : start + count], dtype=np.int64)


def _weave(filler: np.ndarray, points: list[int], pieces: list[list[int]]) -> tuple[list[int], list[int]]:
    """Insert ``pieces[i]`` before ``filler[points[i]]``; returns the ids and where each piece starts."""
    ids: list[int] = []
    starts: list[int] = []
    previous = 0
    for point, piece in zip(points, pieces, strict=True):
        ids.extend(filler[previous:point].tolist())
        starts.append(len(ids))
        ids.extend(piece)
        previous = point
    ids.extend(filler[previous:].tolist())
    return ids, starts


def recall_document(
    rng: random.Random,
    tokenizer,
    filler_tokens: Sequence[int],
    length_tokens: int,
    num_facts: int = 10,
    *,
    chat: bool = False,
    value_kind: str | None = None,
    names: Sequence[str] = NAMES,
) -> RecallDocument:
    """A document of book text with ``num_facts`` facts at random depth, and a question for each fact.

    The longest prompt, context plus question, is exactly ``length_tokens`` long (the others a few tokens
    shorter). Without ``chat`` the question is the start of the fact's sentence and the answer is its
    value; with ``chat`` the document is a user turn, the question ends it, and the answer is the
    assistant's whole sentence with the end token.
    """
    facts = make_facts(rng, num_facts, value_kind, names)
    statements = [encode(tokenizer, " " + fact.sentence) for fact in facts]
    head, tail = [special_id(tokenizer, BOS)], []
    if chat:
        head += [special_id(tokenizer, USER)] + encode(tokenizer, "\n")
        tail = encode(tokenizer, "\n\n")
    asks: list[list[int]] = []
    answers: list[list[int]] = []
    for fact in facts:
        if chat:
            asks.append(encode(tokenizer, f"{fact.question}{END}\n{ASSISTANT}\n"))
            answers.append(encode(tokenizer, fact.answer_sentence) + [special_id(tokenizer, END)])
        else:
            asks.append(encode(tokenizer, f" {fact.subject} is"))
            answers.append(encode(tokenizer, f" {fact.value}"))
    overhead = len(head) + len(tail) + sum(map(len, statements)) + max(map(len, asks))
    if overhead > length_tokens:
        raise ValueError(f"{num_facts} facts and a question take {overhead} tokens, more than {length_tokens}")
    filler = take_filler(rng, filler_tokens, length_tokens - overhead)
    body, starts = _weave(filler, _insert_points(rng, tokenizer, filler, num_facts), statements)
    questions = [
        RecallQuestion(fact, ask, answer, len(head) + start)
        for fact, ask, answer, start in zip(facts, asks, answers, starts, strict=True)
    ]
    rng.shuffle(questions)
    return RecallDocument(head + body + tail, questions, chat)


@dataclass
class TrainingSequence:
    """``length + 1`` tokens; ``kinds[i]`` (IGNORE, TEXT, ...) and ``groups[i]`` describe token i as a target.

    ``groups`` numbers the asked values (0, 1, ...; -1 elsewhere): a value is recalled if all its tokens are.
    """

    ids: list[int]
    kinds: list[int]
    groups: list[int]

    def add(self, ids: Sequence[int], kind: int, group: int = -1) -> None:
        """Append tokens that all have the same role."""
        self.ids.extend(ids)
        self.kinds.extend([kind] * len(ids))
        self.groups.extend([group] * len(ids))

    def cut(self, count: int) -> TrainingSequence:
        """The first ``count`` tokens."""
        return TrainingSequence(self.ids[:count], self.kinds[:count], self.groups[:count])


def text_sequence(rng: random.Random, tokenizer, filler_tokens: Sequence[int], length: int) -> TrainingSequence:
    """Plain book text after the start token."""
    sequence = TrainingSequence([], [], [])
    sequence.add([special_id(tokenizer, BOS)], IGNORE)
    sequence.add(take_filler(rng, filler_tokens, length).tolist(), TEXT)
    return sequence


def copy_sequence(rng: random.Random, tokenizer, vocab_size: int, length: int) -> TrainingSequence:
    """Segments of random tokens that come again later: grows the heads that copy, before any fact is learnt.

    Only tokens that can be predicted count: those of a repeated segment after its first two.
    """
    sequence = TrainingSequence([], [], [])
    sequence.add([special_id(tokenizer, BOS)], IGNORE)
    low, high = (4, 10) if rng.random() < 0.5 else (8, max(9, length // 4))
    first = len(SPECIAL_TOKENS)
    seen: list[list[int]] = []
    while len(sequence.ids) <= length:
        if seen and rng.random() < 0.55:
            segment = rng.choice(seen)
            sequence.add(segment[:2], IGNORE)
            sequence.add(segment[2:], COPY)
        else:
            segment = [rng.randrange(first, vocab_size) for _ in range(rng.randint(low, high))]
            seen.append(segment)
            sequence.add(segment, IGNORE)
    return sequence.cut(length + 1)


def _add_statement(sequence: TrainingSequence, tokenizer, fact: Fact, kind: int, group: int) -> None:
    """The fact's sentence; its value gets ``kind`` and ``group``."""
    asked = kind == ANSWER
    sequence.add(encode(tokenizer, f" {fact.subject} is"), IGNORE if asked else TEXT)
    sequence.add(encode(tokenizer, f" {fact.value}"), kind, group)
    sequence.add(encode(tokenizer, "."), TEXT)


def fact_sequence(
    rng: random.Random, tokenizer, filler_tokens: Sequence[int], length: int, *, dense: bool = False
) -> TrainingSequence:
    """A document whose every fact is asked for later, in one of three shapes.

    ``facts .. all questions at the end``, the same as a chat of many turns, or statements and questions
    scattered over the text. A first statement cannot be predicted, so its value does not count.
    ``dense`` packs as many facts as fit.
    """
    shape = rng.choices(["end", "chat", "scattered"], [0.45, 0.3, 0.25])[0]
    # A fact and its question take about 25 tokens as completion and 45 in chat.
    cost = 45 if shape == "chat" else 26
    most = max(2, min(48, int(length * 0.75) // cost))
    count = most if dense else rng.randint(max(2, most // 8), max(2, most // 2))
    facts = make_facts(rng, count)
    sequence = TrainingSequence([], [], [])
    sequence.add([special_id(tokenizer, BOS)], IGNORE)
    if shape == "scattered":
        _scattered(rng, tokenizer, filler_tokens, length, facts, sequence)
        return sequence.cut(length + 1)

    questions = TrainingSequence([], [], [])
    order = list(range(count))
    rng.shuffle(order)
    for group, index in enumerate(order):
        if shape == "end":
            _add_statement(questions, tokenizer, facts[index], ANSWER, group)
        else:
            _add_turn(questions, tokenizer, facts[index], group, opens_turn=group > 0)
    statements = [encode(tokenizer, " " + fact.sentence) for fact in facts]
    if shape == "chat":
        sequence.add([special_id(tokenizer, USER)] + encode(tokenizer, "\n"), IGNORE)
    room = length + 1 - len(sequence.ids) - len(questions.ids) - sum(map(len, statements))
    filler = take_filler(rng, filler_tokens, max(0, room - (1 if shape == "chat" else 0)))
    body, starts = _weave(filler, _insert_points(rng, tokenizer, filler, count), statements)
    kinds = [TEXT] * len(body)
    for fact, start, statement in zip(facts, starts, statements, strict=True):
        value_start = start + len(encode(tokenizer, f" {fact.subject} is"))
        kinds[value_start : start + len(statement) - 1] = [IGNORE] * (start + len(statement) - 1 - value_start)
    sequence.ids += body
    sequence.kinds += kinds
    sequence.groups += [-1] * len(body)
    if shape == "chat":
        sequence.add(encode(tokenizer, "\n\n"), TEXT)
    sequence.add(questions.ids, TEXT)
    sequence.kinds[-len(questions.ids) :] = questions.kinds
    sequence.groups[-len(questions.ids) :] = questions.groups
    return sequence.cut(length + 1)


def _add_turn(sequence: TrainingSequence, tokenizer, fact: Fact, group: int, *, opens_turn: bool) -> None:
    """A question of the user and the assistant's answer."""
    if opens_turn:
        sequence.add(encode(tokenizer, f"\n{USER}\n"), IGNORE)
    sequence.add(encode(tokenizer, f"{fact.question}{END}\n{ASSISTANT}\n"), IGNORE)
    before, after = fact.answer_sentence.rsplit(f" {fact.value}", 1)
    sequence.add(encode(tokenizer, before), TEXT)
    sequence.add(encode(tokenizer, f" {fact.value}"), ANSWER, group)
    sequence.add(encode(tokenizer, after) + [special_id(tokenizer, END)], TEXT)


def _scattered(
    rng: random.Random,
    tokenizer,
    filler_tokens: Sequence[int],
    length: int,
    facts: list[Fact],
    sequence: TrainingSequence,
) -> None:
    """Append statements and, each somewhere after its statement, repetitions to ``sequence``, text between them."""
    events = sorted(
        (rng.random() * (0.6 if asked else 0.5) + (0.4 if asked else 0.0), asked, index)
        for index in range(len(facts))
        for asked in (False, True)
    )
    room = length + 1 - len(sequence.ids) - sum(2 * len(encode(tokenizer, " " + fact.sentence)) for fact in facts)
    filler = take_filler(rng, filler_tokens, max(0, room))
    points = _insert_points(rng, tokenizer, filler, len(events))
    stated: set[int] = set()
    previous = 0
    for point, (_, _, index) in zip(points, events, strict=True):
        sequence.add(filler[previous:point].tolist(), TEXT)
        previous = point
        again = index in stated  # the draws may put the "question" first: then it is the statement
        _add_statement(sequence, tokenizer, facts[index], ANSWER if again else IGNORE, index if again else -1)
        stated.add(index)
    sequence.add(filler[previous:].tolist(), TEXT)
