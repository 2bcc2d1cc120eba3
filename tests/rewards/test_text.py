"""How requests and answers are read."""

from __future__ import annotations

import pytest

from align.rewards.text import asked_items, asked_sentences, content_words, items, sentences, words


@pytest.mark.parametrize(
    ("request_", "count"),
    [
        ("Explain it in two sentences.", 2),
        ("Write a three-sentence email to my aunt.", 3),
        ("Tell me in one clear sentence what rain is.", 1),
        ("Reply in two short sentences.", 2),
        ("Say it in a sentence.", 1),
        ("Name three rivers.", None),
    ],
)
def test_asked_sentences(request_: str, count: int | None) -> None:
    assert asked_sentences(request_) == count


@pytest.mark.parametrize(
    ("request_", "count"),
    [
        ("Name three rivers in one sentence.", 3),
        ("What are two drinks for a hot day?", 2),
        ("Give me one sentence that I can say.", None),
        ("Give me one tip.", None),
        ("Explain the three laws of motion.", None),
    ],
)
def test_asked_items(request_: str, count: int | None) -> None:
    assert asked_items(request_) == count


def test_sentences_of_prose_and_lists() -> None:
    assert sentences('Dr. Hill came at 5 p.m. on Monday. He said: "Rest!" Then he left.') == [
        "Dr Hill came at 5 p.m on Monday.",
        'He said: "Rest!',
        "Then he left.",
    ]
    assert sentences("1. Nile\n2. Congo") == ["Nile", "Congo"]
    assert sentences(" \n") == []


def test_sentences_of_a_letter_leave_out_its_frame() -> None:
    letter = "Subject: Tap\n\nDear Mr. Hill,\n\nThe tap drips. Please come.\n\nBest regards,\nAnna Smith"
    assert sentences(letter) == ["The tap drips.", "Please come."]


def test_items() -> None:
    assert items("- apples\n- pears\n- plums") == 3
    assert items("Apples, pears, and plums are fruit. I like them.") == 3
    assert items("Apples, pears, plums.") == 3
    assert items("Saffron, which is quite expensive, is not for everyone, alas.") == 1
    assert items("Apples.") == 1
    assert items("") == 0


def test_words_and_content_words() -> None:
    assert words("Don't over-think it, café!") == ["don't", "over-think", "it", "café"]
    assert content_words("The rivers of Africa's river") == ["river", "afric", "river"]
    assert content_words("Paris, Parisian, glass") == ["pari", "pari", "glass"]
