"""The recall documents: right length, answerable, reproducible, and the training targets match what is asked."""

import random
from pathlib import Path

import pytest

from scripts.model_data import (
    ANSWER,
    COPY,
    IGNORE,
    NAMES,
    SPECIAL_TOKENS,
    VALUE_WORDS,
    copy_sequence,
    encode,
    fact_sequence,
    make_facts,
    recall_document,
    text_sequence,
)

MODEL = Path(__file__).parents[2] / "model"
pytestmark = pytest.mark.skipif(not (MODEL / "tokenizer.json").exists(), reason="the model folder holds no tokenizer")


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def filler(tokenizer):
    text = (MODEL / "heldout.txt").read_text(encoding="utf-8")[:60_000]
    return encode(tokenizer, text)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind", ["number", "words"])
@pytest.mark.parametrize("length", [400, 2048])
def test_recall_document_is_as_long_as_asked_and_holds_its_answers(tokenizer, filler, chat, kind, length):
    document = recall_document(random.Random(3), tokenizer, filler, length, 8, chat=chat, value_kind=kind)
    assert len(document.questions) == 8
    assert max(len(document.context_ids) + len(q.question_ids) for q in document.questions) == length
    text = tokenizer.decode(document.context_ids, skip_special_tokens=False)
    for question in document.questions:
        assert text.count(question.fact.sentence) == 1
        statement = encode(tokenizer, " " + question.fact.sentence)
        assert document.context_ids[question.fact_position :][: len(statement)] == statement
        assert question.fact.value in tokenizer.decode(question.answer_ids)
    assert len({q.fact.subject.replace(q.fact.name, "") for q in document.questions}) == 1, "one wording"


def test_a_chat_prompt_is_what_the_chat_template_makes(tokenizer, filler):
    from transformers import AutoTokenizer

    chat = AutoTokenizer.from_pretrained(MODEL)
    document = recall_document(random.Random(3), chat, filler, 400, 8, chat=True)
    prompt = chat.decode(document.context_ids + document.questions[0].question_ids)
    content = prompt.removeprefix("<|bos|><|user|>\n").removesuffix("<|end|>\n<|assistant|>\n")
    assert len(content) == len(prompt) - len("<|bos|><|user|>\n<|end|>\n<|assistant|>\n")
    messages = [{"role": "user", "content": content}]
    assert chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt
    assert document == recall_document(random.Random(3), tokenizer, filler, 400, 8, chat=True), "either tokenizer"


def test_the_same_seed_gives_the_same_document(tokenizer, filler):
    first, second, third = (recall_document(random.Random(s), tokenizer, filler, 600, 8) for s in (7, 7, 8))
    assert first == second
    assert first != third


def test_too_many_facts_are_refused(tokenizer, filler):
    with pytest.raises(ValueError, match="tokens"):
        recall_document(random.Random(0), tokenizer, filler, 100, 20)


def test_facts_have_distinct_names_and_values_of_the_kind_asked():
    facts = make_facts(random.Random(1), 40, "number")
    assert len({f.name for f in facts}) == 40
    assert all(f.value.isdigit() and len(f.value) == 4 for f in facts)
    assert all(len(f.value.split()) == 2 for f in make_facts(random.Random(1), 5, "words"))
    with pytest.raises(ValueError, match="value_kind"):
        make_facts(random.Random(1), 5, "colour")


def test_word_lists_have_no_duplicates_and_are_single_tokens(tokenizer):
    for words in (NAMES, VALUE_WORDS):
        assert len(set(words)) == len(words)
        assert [w for w in words if len(encode(tokenizer, " " + w)) != 1] == []
    assert [len(encode(tokenizer, text)) for text in ("4821", " 4821")] == [4, 4]


@pytest.mark.parametrize("length", [256, 1024])
def test_training_targets_are_the_values_asked(tokenizer, filler, length):
    rng = random.Random(11)
    for _ in range(40):
        sequence = fact_sequence(rng, tokenizer, filler, length, dense=rng.random() < 0.5)
        assert len(sequence.ids) == len(sequence.kinds) == len(sequence.groups) == length + 1
        groups = sorted({g for g in sequence.groups if g >= 0})
        assert groups
        whole = tokenizer.decode(sequence.ids, skip_special_tokens=False)
        for group in groups:
            at = [i for i, g in enumerate(sequence.groups) if g == group]
            assert at == list(range(at[0], at[-1] + 1))
            assert {sequence.kinds[i] for i in at} == {ANSWER}
            if at[-1] < length:  # not cut off at the end
                value = tokenizer.decode([sequence.ids[i] for i in at])
                assert whole.count(value.strip()) >= 2, "stated before it is asked"


def test_copy_targets_occurred_before_and_text_has_no_hole(tokenizer, filler):
    sequence = copy_sequence(random.Random(5), tokenizer, 4096, 512)
    assert len(sequence.ids) == 513 and COPY in sequence.kinds
    for i, kind in enumerate(sequence.kinds):
        if kind == COPY:
            assert tuple(sequence.ids[i - 1 : i + 1]) in set(zip(sequence.ids, sequence.ids[1:i], strict=False))
    assert all(i >= len(SPECIAL_TOKENS) for i in sequence.ids[1:])
    assert text_sequence(random.Random(5), tokenizer, filler, 100).kinds.count(IGNORE) == 1
