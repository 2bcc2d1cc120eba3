"""What a rule reads in a request and an answer: words, sentences, items, and the numbers that were asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence

NUMBERS = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "1": 1, "2": 2, "3": 3, "4": 4, "5": 5}
COUNT = r"(?P<count>one|two|three|four|five|[1-5])"
SEVERAL = r"(?P<count>two|three|four|five|[2-5])"
ASKED_SENTENCES = re.compile(rf"\b{COUNT}[ -](?:\w+ ){{0,2}}sentences?\b|\b(?P<a>a) (?:\w+ )?sentence\b", re.I)
ASKED_ITEMS = re.compile(rf"\b(?:name|list|give me|suggest|what are) {SEVERAL} (?!\w* ?sentence)\w+", re.I)
LETTER = re.compile(r"\b(?:email|message|note) to\b", re.I)
SUMMARY = re.compile(r"\b(?:summar(?:y|ise|ize)|sum (?:this|it) up|main point|gist)\b", re.I)

GREETING = re.compile(r"subject:|(?:dear|hi|hello|hey)\b[^.!?]{0,40}$", re.I)
SIGN_OFF = re.compile(
    r"(?:best|kind|warm|yours|sincerely|regards|thanks|many thanks|thank you|love|cheers)\b[^.!?]{0,20}$|\[", re.I
)
MARK = re.compile(r"^(?:\d+[.)]|[-•])\s*(?=\S)")  # of an item in a list
ABBREVIATION = re.compile(r"\b(mr|mrs|ms|dr|st|e\.g|i\.e|etc|a\.m|p\.m|vs)\.", re.I)


def words(text: str) -> list[str]:
    """Lower-case words; apostrophes and inner hyphens belong to a word."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


FUNCTION_WORDS = frozenset(
    words(
        "a about after all also am an and any are as at be because been before being but by can could did do does "
        "each for from had has have he her his how i if in into is it its just may me might more most my no not of "
        "on one or our out she should so some such than that the their them then there these they this those to "
        "too up us was we were what when where which while who why will with would you your"
    )
)


def stem(word: str) -> str:
    """The first five letters, without the ending of a possessive or a plural."""
    return re.sub(r"(?<=..[^s])s$", "", re.sub(r"['’]s?$", "", word)[:5])


def content_words(text: str) -> list[str]:
    """Stems of the words that carry meaning, in order."""
    return [stem(word) for word in words(text) if word not in FUNCTION_WORDS and len(word) > 2]


def ngrams(tokens: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """All runs of ``size`` tokens."""
    return [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]


def lines(text: str) -> list[str]:
    """Lines that are not blank."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def sentences(text: str) -> list[str]:
    """Sentences and items of a list; the greeting of a letter and all from its signature on are left out."""
    found: list[str] = []
    for line in lines(ABBREVIATION.sub(r"\1", text)):
        if found and SIGN_OFF.match(line):
            break
        if not GREETING.match(line):
            parts = re.split(r"(?<=[.!?])[\"')”’]*\s+(?=[^a-z])", MARK.sub("", line))
            found += [part for part in parts if words(part)]
    return found


def items(text: str) -> int:
    """How many items a list has: its marked lines, else the most parts of a sentence that enumerates.

    Parts stand between commas, "and" and "or"; a sentence without "and" or "or" enumerates if its parts are short.
    """
    if marked := sum(MARK.match(line) is not None for line in lines(text)):
        return marked
    most = min(1, len(sentences(text)))
    for sentence in sentences(text):
        parts = [words(part) for part in re.split(r",|;|\band\b|\bor\b", sentence)]
        if re.search(r"\b(?:and|or)\b", sentence) or all(len(part) <= 3 for part in parts):
            most = max(most, sum(bool(part) for part in parts))
    return most


def asked_sentences(request: str) -> int | None:
    """The number of sentences that the request asks for, if it names one."""
    found = ASKED_SENTENCES.search(request)
    return NUMBERS[(found["count"] or found["a"]).lower()] if found else None


def asked_items(request: str) -> int | None:
    """The number of things, two or more, that the request asks for, as in "name three rivers"."""
    found = ASKED_ITEMS.search(request)
    return NUMBERS[found["count"].lower()] if found else None


def asks_for_letter(request: str) -> bool:
    """Whether the answer is an e-mail, a message or a note to somebody."""
    return LETTER.search(request) is not None


def asks_for_summary(request: str) -> bool:
    """Whether the answer is a shorter form of a text in the request."""
    return SUMMARY.search(request) is not None
