"""Words of captions, against the released codes' and NLTK's."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inputs import tokenizer
from inputs.tokenizer import nltk_words, tokenize
from tests.helpers.made import REFERENCE

TOKENIZATION = json.loads((REFERENCE / "tokenization.json").read_text(encoding="utf-8"))

SCAN_WORDS = json.loads((REFERENCE / "scan/tokenization.json").read_text(encoding="utf-8"))

SPECIAL = ["<pad>", "<start>", "<end>", "<unk>"]


@pytest.mark.parametrize("reading", ["text", "released"])
@pytest.mark.parametrize(
    "case", TOKENIZATION, ids=[str(number) for number in range(len(TOKENIZATION))]
)
def test_words_equal_the_recorded_ones(case, reading):
    assert tokenize(case["caption"], reading) == case[reading]


@pytest.mark.parametrize("case", SCAN_WORDS, ids=[str(number) for number in range(len(SCAN_WORDS))])
def test_words_of_scan_s_captions_are_its_own_but_for_capitals_beyond_ascii(case):
    assert tokenize(case["caption"]) == case["text"]
    assert tokenize(case["caption"]) == [word.lower() for word in case["released"]]


@pytest.mark.parametrize("caption", ["<pad>", "a <start> dog <unk>", "<end>"])
@pytest.mark.parametrize("reading", ["text", "released"])
def test_no_caption_can_hold_a_special_word(caption, reading):
    assert not set(tokenize(caption, reading)) & set(SPECIAL)


@pytest.mark.parametrize("reading, words", [("text", []), ("released", ["b", "''"])])
@pytest.mark.parametrize("caption", ["", " \t\r\n"])
def test_an_empty_caption_has_no_words_of_its_own(caption, reading, words):
    assert tokenize(caption, reading) == words


PARTS = [
    "a",
    "dog",
    "1",
    "23",
    ",",
    ".",
    " ",
    " ",
    " , ",
    ", ",
    " .",
    "cannot",
    "gonna",
    "wanna",
    "can",
    "not",
    "gim",
    "me",
    "d'ye",
    "'tis",
    "dr",
    "mr.",
    "u.s.",
    "-",
    "--",
    "\u00e9",
    "?",
]


@given(st.lists(st.sampled_from(PARTS)))
@settings(max_examples=500, deadline=None)
def test_words_are_nltk_s(parts):
    caption = "".join(parts)
    assert tokenize(caption) == nltk_words(caption.strip())


@pytest.mark.parametrize("word", ["cannot", "gimme", "gonna", "gotta", "lemme", "wanna"])
def test_contractions_without_a_mark_are_split_as_nltk_does(word):
    words = tokenize(f"dogs {word} run.")
    assert words == nltk_words(f"dogs {word} run.") and len(words) == 5


def test_plain_captions_do_not_need_nltk(monkeypatch):
    monkeypatch.setattr(tokenizer, "nltk_words", None)
    assert tokenize("A dog, 2 cats , and a bird .") == [
        "a",
        "dog",
        ",",
        "2",
        "cats",
        ",",
        "and",
        "a",
        "bird",
        ".",
    ]


def test_text_is_the_default_reading():
    assert tokenize("It's a dog.") == ["it", "'s", "a", "dog", "."]


@pytest.mark.parametrize("reading", ["text", "released"])
def test_a_lone_surrogate_of_a_json_caption_is_read(reading):
    assert "dog" in tokenize("a \ud800 dog sits", reading)
