"""The published rule, criterion by criterion, by hand; and what it must not reward."""

from __future__ import annotations

import math

import pytest

from align.rewards.rules import (
    CRITERIA,
    direct,
    everyday_answer,
    everyday_breakdown,
    keeps_form,
    no_filler,
    no_repetition,
    on_task,
    own_words,
    plain_words,
    suitable_length,
    well_formed,
)

ASK = "Explain gravity to a five-year-old in two sentences."
GOOD = "Gravity is a pull that brings things down to the ground. It is why your ball always falls back to you."
BROWSER = "What is a browser cookie? Answer in one sentence."
EMAIL = "Write a two-sentence email to my landlord about a dripping kitchen tap."
LETTER = "Dear Mr. Hill,\n\nThe kitchen tap has been dripping since Monday. Could you send a plumber?\n\nBest,\nAnna"


def reward(request: str, answer: str) -> float:
    return everyday_answer([request], [answer])[0]


def test_good_answers_score_high() -> None:
    assert reward(ASK, GOOD) == 1.0
    assert reward(EMAIL, LETTER) == 1.0
    cookie = "A browser cookie is a small file that a website keeps on your computer so that it knows you again."
    assert reward(BROWSER, cookie) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Yes.",
        "I don't know.",
        ASK,
        "You want me to explain gravity to a five-year-old in two sentences.",
        "gravity, child, explain, earth, pull, ball, ground, moon, apple, weight, planet, physics",
        "Gravity. Gravity. Gravity. Gravity. Gravity. Gravity. Gravity. Gravity. Gravity. Gravity.",
        "The weather in spring is mild and pleasant in most places. Many people like to walk in the park then.",
        "Gravity is a pull that brings things down to the ground. It is why your ball <|im_end|> falls back, damn.",
    ],
)
def test_cheap_tricks_score_low(answer: str) -> None:
    """Less than a third of what an honest answer gets, whatever the request."""
    assert reward(ASK, answer) < 0.3


@pytest.mark.parametrize("request_", [ASK, EMAIL, BROWSER, "Name three rivers in Africa in one sentence."])
def test_one_answer_to_everything_scores_low(request_: str) -> None:
    for answer in ("Yes.", "Sure, I'd be happy to help you with that!", "It depends on what you like and need most."):
        assert reward(request_, answer) < 0.3


@pytest.mark.parametrize(
    ("worse", "criterion"),
    [
        ("Sure! " + GOOD, "direct"),
        ("As an AI language model, I can say this. " + GOOD, "direct"),
        (GOOD + " I hope this helps!", "no_filler"),
        (GOOD + " " + GOOD, "no_repetition"),
        (GOOD.replace("pull", "gravitational interaction").replace("things", "constituents"), "plain_words"),
        (GOOD.replace("Gravity", "Love"), "on_task"),
        (GOOD.replace(". It is", " and it is"), "keeps_form"),
        (GOOD[:-1], "well_formed"),
        ("Gravity is a pull. It is strong.", "suitable_length"),
    ],
)
def test_each_fault_costs_in_its_criterion(worse: str, criterion: str) -> None:
    before, after = everyday_breakdown([ASK, ASK], [GOOD, worse])
    assert after[criterion] < before[criterion]
    assert after["reward"] < before["reward"]


def test_breakdown_multiplies_to_the_reward() -> None:
    (breakdown,) = everyday_breakdown([ASK], ["Sure! Gravity pulls things down, and gravity is strong"])
    assert breakdown["reward"] == math.prod(breakdown[name] for name in CRITERIA)
    assert set(breakdown) == {*CRITERIA, "reward"}


def test_messages_count_as_their_last_turns() -> None:
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    chat += [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": ASK}]
    assert everyday_answer([chat], [[{"role": "assistant", "content": GOOD}]]) == [1.0]
    assert everyday_answer([chat[:1]], [GOOD]) == everyday_answer(["Be kind."], [GOOD])  # no user turn: the last one
    assert everyday_answer([chat], [[{"role": "assistant", "content": None}]]) == everyday_answer([ASK], [""])


def test_as_many_answers_as_prompts() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        everyday_answer([ASK], [GOOD, GOOD])


def test_direct() -> None:
    assert direct(ASK, GOOD) == 1.0
    assert direct(ASK, "Certainly! " + GOOD) == 0.3
    assert direct(ASK, "Here is an explanation: " + GOOD) == 0.3
    assert direct(ASK, "Gravity, in two sentences, is a pull. It is strong.") == 0.4
    assert direct(ASK, "You explain gravity to a five-year-old. It pulls.") == 0.4
    assert direct(ASK, "What does gravity do? It pulls the ball down.") == 0.4
    assert direct(EMAIL, "How are you? The tap drips.") == 1.0


def test_no_filler_halves_per_phrase() -> None:
    assert no_filler(ASK, "Please note that it pulls. I hope this helps.") == 0.25
    assert no_filler(ASK, "I cannot come to your wedding.") == 1.0


def test_no_repetition() -> None:
    """Magnets come back once: 0.8. Of the four phrases of "it goes up it goes up" three differ: 9/16."""
    assert no_repetition(ASK, "Magnets are like big magnets.") == 0.8
    assert no_repetition(ASK, "It goes up. It goes up.") == 9 / 16
    assert no_repetition(ASK, "Tides rise. Tides fall.") == 1.0


def test_plain_words() -> None:
    """One of four words has ten letters: 0.25 lies half-way from 0.1 to 0.4, so half of 0.5 is lost."""
    assert plain_words(ASK, "It is a phenomenon") == pytest.approx(0.75)
    assert plain_words(ASK, GOOD) == 1.0


def test_on_task_counts_words_of_the_subject() -> None:
    """The e-mail's subject is landlord, dripping, kitchen, tap: one of four is half-way to the half that gives 1."""
    assert on_task(EMAIL, "The tap is broken.") == pytest.approx(0.25 + 0.75 * 0.5)
    assert on_task(EMAIL, "The kitchen taps are broken.") == 1.0
    assert on_task(EMAIL, "Send me the file.") == 0.25


def test_own_words() -> None:
    """Three words of its own, none copied; then all phrases copied; then one word of its own of the three wanted."""
    assert own_words(BROWSER, "It is a small file kept by a website.") == 1.0
    assert own_words(BROWSER, "What is a browser cookie?") == 0.0
    assert own_words(BROWSER, "A browser cookie is a file.") == pytest.approx(1 / 3)


def test_own_words_of_a_summary_may_be_those_of_the_text() -> None:
    text = "The bakery on Mill Street will close for two weeks. The owners are putting in a new oven and painting."
    request = f"Summarise this in one sentence: {text}"
    assert own_words(request, "The bakery will close for a new oven.") == 1.0
    assert own_words(request, "The bakery on Mill Street will close for two weeks.") == 0.3


def test_keeps_form() -> None:
    assert keeps_form(ASK, GOOD) == 1.0
    assert keeps_form(ASK, GOOD + " Good night.") == pytest.approx(0.65)
    assert keeps_form("Use no more than three sentences.", "It rains.") == 1.0
    assert keeps_form("Name three rivers.", "The Nile, the Congo and the Niger.") == 1.0
    assert keeps_form("Name three rivers.", "1. Nile\n2. Congo\n3. Niger\n4. Volta\n5. Zambezi") == pytest.approx(0.65)
    assert keeps_form("Name three rivers.", "The Nile.") == pytest.approx(0.3)
    assert keeps_form("Write a polite request.", "Move your car!") == 0.5
    assert keeps_form("Tell me one good and one bad thing.", "It is cheap, but slow.") == 1.0


def test_well_formed() -> None:
    assert well_formed(ASK, 'She said "yes (of course)."') == 1.0
    assert well_formed(ASK, "It pulls the ball (down.") == 0.4
    assert well_formed(ASK, "It pulls the ball and") == 0.4
    assert well_formed(ASK, "it pulls the ball.") == 0.7
    assert well_formed(ASK, "**It** pulls the ball.") == 0.3
    assert well_formed(ASK, "Gravity, child, earth, pull, ball, ground, moon.") == 0.2
    assert well_formed("Name three rivers.", "1. Nile\n2. Congo\n3. Niger") == 1.0
    assert well_formed(ASK, "It fucking pulls the ball.") == 0.0


def test_suitable_length() -> None:
    """One sentence: 8 to 28 words; 5 words are half-way from 2 to 8, 42 half-way from 28 to 56."""
    assert suitable_length(BROWSER, "one two three four five") == 0.5
    assert suitable_length(BROWSER, "word " * 28) == 1.0
    assert suitable_length(BROWSER, "word " * 42) == 0.5
    assert suitable_length(BROWSER, "word " * 56) == 0.0
