"""Rewards that can be read: ``everyday_answer`` says how well a short everyday request was answered.

Nine criteria, each a small function of the request and the answer with a value in [0, 1]; the reward is their
product, so that no strength hides a fault. Plain Python, English only, no model. It judges manner and fit, not truth:
a fluent mistake passes, and a right answer that shares no word with the request is under-rated.

``informative`` and ``brief`` are two simple rewards that pull against each other, to see how a combination settles it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from .encoding import Content, plain
from .text import (
    FUNCTION_WORDS,
    asked_items,
    asked_sentences,
    asks_for_letter,
    asks_for_summary,
    content_words,
    items,
    lines,
    ngrams,
    sentences,
    stem,
    words,
)

Criterion = Callable[[str, str], float]

OPENER = re.compile(
    r"\W*(?:sure\b|certainly|of course|absolutely|definitely|great question|good question|ok(?:ay)?\b|alright|well,"
    r"|(?:here(?:'s|’s| is| are| it)|these are|this is|below (?:is|are))\b"
    r"|as an? (?:\w+ ){0,3}(?:ai|assistant|model)\b"
    r"|i(?:'m| am|'d| would) (?:happy|glad|pleased|thrilled|be happy|be glad|love) to"
    r"|thank you for (?:your|the) question|to answer|let me|(?:the )?answer:"
    r"|you (?:can|could|might) (?:say|use|tell|explain|start (?:with|by))\b)",
    re.I,
)
FILLER = re.compile(
    r"\b(?:as an ai\b|ai (?:assistant|capabilities)|language model|smollm|hugging face"
    r"|i(?:'m| am) here to (?:help|assist)|how can i (?:help|assist)|i don't have (?:personal|real)"
    r"|i hope this|hope this helps|feel free to ask|your (?:question|prompt)"
    r"|it(?:'s| is) (?:important to (?:note|remember|understand)|worth noting)|please note|note that"
    r"|in conclusion|in summary|to sum up|needless to say|at the end of the day|remember,|overall,|basically,"
    r"|a testament to|a wide range of|a variety of"
    r"|i(?:'m| am) (?:not able|unable) to (?:help|assist|provide|answer|respond)"
    r"|i (?:cannot|can't|can not) (?:help|assist|provide|answer|respond)"
    r"|i'm sorry for any (?:misunderstanding|confusion))",
    re.I,
)
UNCLEAN = re.compile(r"<\||\|>|```|https?:|www\.|[#*_{}\\|~^]|[^\x00-\x7f‘’“”–—…éèêëàâäçñöüïîôÉ°€£½¼]", re.I)
INDECENT = re.compile(
    r"\b(?:fuck\w*|shit\w*|bitch\w*|bastards?|assholes?|damn|sex\w*|nude|naked|topless|porn\w*|rap(?:e|ed|ist)|"
    r"suicid\w*|nazis?)\b",
    re.I,
)

# What some requests ask of the answer, as (words in the request, words of which an answer needs one).
ASKED_MANNER = (
    (
        r"\b(?:polite|politely|kindly|friendly)\b",
        r"\b(?:please|could|would|may|might|mind|thank|sorry|kindly|excuse|appreciate)\b",
    ),
    (
        r"\b(?:disadvantage|con|bad|downside)\b",
        r"\b(?:but|however|while|although|yet|whereas|other hand|bad|(?:disadvantage|con|downside|drawback)s?)\b",
    ),
    (r"\b(?:email|message|note) to\b", r"\b(?:i|i'm|i'd|i've|we|we're|dear|hi|hello|hey)\b"),
)

# Words of a request that say what form the answer takes, and not what it is about.
FORM_STEMS = frozenset(
    stem(word)
    for word in words(
        "sentence answer reply explain define tell give name list suggest write draft email message note short "
        "brief simple quick clear please use two three four five help want need know idea dish cook make planning "
        "best advice tip piece good bad thing advantage disadvantage upside downside describe summarise sum gist "
        "main point polite way ask kindly friendly say someone child small year old six understand enough adult "
        "pack only kind mean what's i'm let using two-sentence three-sentence"
    )
)


def everyday_answer(prompts: Sequence[Content], completions: Sequence[Content]) -> list[float]:
    """How good each answer is, in [0, 1]: the product of the nine criteria of ``CRITERIA``.

    Args:
        prompts: requests, as strings or chat messages (the last user turn counts).
        completions: one answer per request, as strings or chat messages (the last assistant turn counts).

    Raises:
        ValueError: the two differ in number, or messages have no such turn.
    """
    return [breakdown["reward"] for breakdown in everyday_breakdown(prompts, completions)]


def everyday_breakdown(prompts: Sequence[Content], completions: Sequence[Content]) -> list[dict[str, float]]:
    """Per answer, the value of each criterion by name, and their product as ``reward``."""
    found = []
    for request, answer in _turns(prompts, completions):
        values = {name: criterion(request, answer) for name, criterion in CRITERIA.items()}
        found.append({**values, "reward": math.prod(values.values())})
    return found


def informative(prompts: Sequence[Content], completions: Sequence[Content]) -> list[float]:
    """How much each answer brings: different words with a meaning of their own that the request has not, up to 40.

    It is easily had by writing more, and so conflicts with ``brief``.
    """
    return [
        float(min(40, len(set(content_words(answer)) - set(content_words(request)))))
        for request, answer in _turns(prompts, completions)
    ]


def brief(prompts: Sequence[Content], completions: Sequence[Content]) -> list[float]:
    """Minus the number of words of each answer; an answer that says nothing has the most, 0."""
    return [-float(len(words(answer))) for _, answer in _turns(prompts, completions)]


def direct(request: str, answer: str) -> float:
    """The answer begins at once.

    0.3 if it opens with a phrase such as "Sure!", "Here are", "As an AI", "You can say"; otherwise 0.4 if it speaks of
    its own form ("in one sentence") or, letters and summaries apart, asks back or only says the request again first.
    """
    if OPENER.match(answer):
        return 0.3
    if re.search(r"\bsentences?\b|\b(?:this|the) (?:message|email) is\b", answer, re.I):
        return 0.4
    if asks_for_letter(request) or asks_for_summary(request):
        return 1.0
    first, *rest = sentences(answer) or [""]
    restates = set(content_words(first)) <= set(content_words(request))
    return 0.4 if restates or (rest and re.search(r"^[^\"“]*\?$", first)) else 1.0


def no_filler(request: str, answer: str) -> float:
    """No stock phrase and no talk about itself: each one halves the value."""
    return 0.5 ** len(FILLER.findall(answer))


def no_repetition(request: str, answer: str) -> float:
    """Words and phrases are not repeated.

    A content word that comes back in its sentence costs a fifth of the value each time; the share of different
    three-word phrases in the whole answer counts squared.
    """
    repeats = 0
    for sentence in sentences(answer):
        content = content_words(sentence)
        repeats += len(content) - len(set(content))
    phrases = ngrams(words(answer), 3)
    variety = len(set(phrases)) / len(phrases) if phrases else 1.0
    return float(0.8**repeats * variety**2)


def plain_words(request: str, answer: str) -> float:
    """Everyday words: 1 while at most one word in ten has ten letters or more, 0.5 from two in five on."""
    found = words(answer)
    long = sum(len(word) >= 10 for word in found) / max(1, len(found))
    return 1.0 - 0.5 * ramp(long, 0.1, 0.4)


def on_task(request: str, answer: str) -> float:
    """It is about what was asked: words of the subject come back, half of them or more for 1, none for 0.25."""
    subject = set(content_words(request)) - FORM_STEMS
    if not subject:
        return 1.0
    shared = len(subject & set(content_words(answer))) / len(subject)
    return 0.25 + 0.75 * ramp(shared, 0.0, 0.5)


def own_words(request: str, answer: str) -> float:
    """It adds something.

    The share of four-word phrases copied from the request lowers it, from two in five on; a summary keeps 0.3 at
    least. Other answers should hold three content words that the request does not.
    """
    phrases, given = ngrams(words(answer), 4), set(ngrams(words(request), 4))
    copied = sum(phrase in given for phrase in phrases) / len(phrases) if phrases else 0.0
    value = 1.0 - ramp(copied, 0.4, 1.0)
    if asks_for_summary(request):
        return max(0.3, value)
    return value * ramp(len(set(content_words(answer)) - set(content_words(request))), 0, 3)


def keeps_form(request: str, answer: str) -> float:
    """It has the number of sentences or items asked for (each one off costs 0.35), and the manner, or half of that.

    Manner: a polite word for a polite request, both sides for pros and cons, a writer or a greeting in an e-mail.
    """
    value = 1.0
    if (asked := asked_sentences(request)) is not None:
        count = len(sentences(answer))
        at_most = re.search(r"\b(?:at most|no more than|up to)\b", request, re.I)
        off = max(0, count - asked) if at_most else abs(count - asked)
        value *= max(0.1, 1.0 - 0.35 * off)
    if (asked := asked_items(request)) is not None:
        count = items(answer)
        value *= max(0.1, 1.0 - 0.35 * max(0, asked - count, count - asked - 1))
    for wanted, shown in ASKED_MANNER:
        if re.search(wanted, request, re.I) and not re.search(shown, answer, re.I):
            value *= 0.5
    return value


def well_formed(request: str, answer: str) -> float:
    """It is clean text with an end.

    0 for indecent words; 0.3 for markup, links or foreign script; 0.4 if it breaks off (no closing mark, an open
    bracket or quotation mark); 0.7 if it begins with a small letter; 0.2 if it is a heap of words (fewer than one
    function word in six, where no list was asked for).
    """
    if INDECENT.search(answer):
        return 0.0
    value = 0.3 if UNCLEAN.search(answer) else 1.0
    several_lines = len(lines(answer)) > 1
    is_list = several_lines and asked_items(request) is not None
    is_signed = several_lines and asks_for_letter(request)
    ends = is_list or is_signed or re.search(r"[.!?][\"')”’\]]*$", answer)
    if not ends or answer.count("(") != answer.count(")") or len(re.findall(r'["“”]', answer)) % 2:
        value *= 0.4
    if answer[:1].islower():
        value *= 0.7
    found = words(answer)
    if not is_list and sum(word in FUNCTION_WORDS for word in found) < len(found) / 6:
        value *= 0.2
    return value


def suitable_length(request: str, answer: str) -> float:
    """It is neither curt nor long.

    1 from 8 to 28 words for one sentence (11 to 56 for two, 14 to 84 for three) or 2 to 15 for each item of a list;
    0 up to two words and from twice the upper end on.
    """
    count = len(words(answer))
    if (asked := asked_sentences(request)) is not None:
        low, high = 8 * math.sqrt(asked), 28 * asked
    elif (asked := asked_items(request)) is not None:
        low, high = 2 * asked, 15 * asked
    else:
        low, high = 5, 120
    return ramp(count, 2, low) * (1.0 - ramp(count, high, 2 * high))


CRITERIA: dict[str, Criterion] = {
    "direct": direct,
    "no_filler": no_filler,
    "no_repetition": no_repetition,
    "plain_words": plain_words,
    "on_task": on_task,
    "own_words": own_words,
    "keeps_form": keeps_form,
    "well_formed": well_formed,
    "suitable_length": suitable_length,
}


def ramp(value: float, low: float, high: float) -> float:
    """0 up to ``low``, 1 from ``high`` on, a straight line between."""
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _turns(prompts: Sequence[Content], completions: Sequence[Content]) -> list[tuple[str, str]]:
    """Request and answer of each row."""
    rows = zip(prompts, completions, strict=True)
    return [(plain(prompt, "user"), plain(completion, "assistant").strip()) for prompt, completion in rows]
