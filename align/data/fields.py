"""What a prompt and an answer may be, and how a shared beginning becomes the prompt.

Text is taken as it stands. Messages are ``{"role": ..., "content": ...}``; an answer to a prompt of messages may be
plain text, which is then one assistant message. An answer holds assistant turns (and what lies between them, such as
tool results) and ends in one; whatever the user or the system said belongs to the prompt.

A prompt must not be empty, since the first token of an answer has a probability only after something; within messages
the content of a turn may be.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .rows import Content, Message

EMPTY = "empty completion: there is nothing to learn from; drop the row or fix the export"
NO_UNICODE = "holds half a surrogate pair, which is no text: fix the export"
FULL_TURNS = "leave the prompt out where the answers hold the whole conversation"


Talks = dict[str, list[Message]]


class FieldError(ValueError):
    """A field that cannot be used, and why."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


@contextmanager
def collecting(problems: list[FieldError]) -> Iterator[None]:
    """Note the problem and go on, so that a row is told all that is wrong with it."""
    try:
        yield
    except FieldError as problem:
        problems.append(problem)


LARGEST = 1e6  # as align.losses.types.LARGEST


def check_size(field: str, value: float) -> float:
    """The number, where losses can take it.

    Raises:
        FieldError: it is too large.
    """
    if abs(value) > LARGEST:
        raise FieldError(field, f"{value:g} is beyond {LARGEST:g}: give the column in larger units")
    return value


def required(field: str, row: dict[str, Any], wanted: str) -> Any:
    """The field's value; where it is absent or null, a FieldError with the keys found and the keys wanted."""
    if field not in row:
        raise FieldError(field, f"missing: the row has {', '.join(map(str, row)) or 'no fields'}; wanted {wanted}")
    if row[field] is None:
        raise FieldError(field, f"null; wanted {wanted}")
    return row[field]


def answer_field(row: Mapping[str, Any]) -> str:
    """The column of a single answer: ``completion``, or ``response`` where that stands alone."""
    return "response" if "response" in row and "completion" not in row else "completion"


def content(field: str, value: Any) -> Content:
    """The value as text or messages of text; fields of a message that are null are left out.

    Raises:
        FieldError: it is neither, or a message lacks its role or content.
    """
    if isinstance(value, str):
        return _text(field, value)
    if not isinstance(value, list):
        raise FieldError(field, f"{_kind(value)}, not text or chat messages")
    return [_message(field, number, message) for number, message in enumerate(value, start=1)]


def _message(field: str, number: int, message: Any) -> Message:
    if not isinstance(message, dict):
        raise FieldError(field, f"message {number} is {_kind(message)}, not an object with role and content")
    given = {key: value for key, value in message.items() if value is not None}
    if "role" not in given or "content" not in given:
        raise FieldError(field, f"message {number} has {', '.join(given) or 'no fields'}; wanted role, content")
    for key, value in given.items():
        if not isinstance(value, str):
            raise FieldError(field, f"message {number}: {key} is {_kind(value)}, not text")
        _text(field, value)
    return given


def _text(field: str, value: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise FieldError(field, NO_UNICODE) from error
    return value


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", dict: "an object", list: "a list"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def resolve(prompt: Content | None, answers: Mapping[str, Content]) -> tuple[Content, Mapping[str, Content]]:
    """Prompt and answers in one form: all text, or all messages.

    - A prompt of messages: answers of text become assistant messages; answers that repeat the prompt lose it.
    - A prompt of text: answers are text, or whole conversations whose shared beginning ends in the prompt's text.
    - No prompt: the shared beginning of the answers, as whole messages, or as whole words of text.

    Raises:
        FieldError: prompt or answer is empty, the forms do not fit each other, or the turns do not.
    """
    if prompt is not None and not prompt:
        raise FieldError("prompt", "empty prompt: an answer needs something before it")
    texts = {name: answer for name, answer in answers.items() if isinstance(answer, str)}
    talks = {name: answer for name, answer in answers.items() if not isinstance(answer, str)}
    if isinstance(prompt, list):
        talks = {name: _assistant(texts[name]) if name in texts else talks[name] for name in answers}
    elif texts and talks:
        raise FieldError(next(iter(talks)), "messages where another answer is text: give all answers in one form")
    for name in answers:
        if not (talks.get(name) or texts.get(name)):
            raise FieldError(name, EMPTY)
    if talks:
        return _resolve_talks(prompt, talks)
    if prompt is None:
        prompt, texts = _split_texts(texts)
    for name, text in texts.items():
        if not text.strip():
            raise FieldError(name, EMPTY)
    return prompt, texts


def _assistant(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}] if text else []


def _resolve_talks(prompt: Content | None, answers: Talks) -> tuple[list[Message], Talks]:
    if isinstance(prompt, list):
        shared = prompt
        repeated = all(answer[: len(prompt)] == prompt for answer in answers.values())
    else:
        shared = _shared_messages(list(answers.values()))
        repeated = True
        if not shared:
            raise FieldError("prompt", "missing, and the answers share no first message: add a prompt field")
        if prompt is not None and shared[-1]["content"] != prompt:
            raise FieldError("prompt", f"text, but answers are messages: give the prompt as messages, or {FULL_TURNS}")
    if shared[-1]["role"] == "assistant":
        raise FieldError("prompt", "ends in an assistant turn: end it with the turn that the answer replies to")
    rest = {name: answer[len(shared) :] if repeated else answer for name, answer in answers.items()}
    for name, answer in rest.items():
        _check_turns(name, answer)
    return shared, rest


def _shared_messages(answers: Sequence[list[Message]]) -> list[Message]:
    """The first messages that all answers have; of a single answer, all but the last."""
    count = 0
    shortest = min(len(answer) for answer in answers) - (len(answers) == 1)
    while count < shortest and all(answer[count] == answers[0][count] for answer in answers):
        count += 1
    return answers[0][:count]


def _check_turns(name: str, answer: list[Message]) -> None:
    if not answer:
        raise FieldError(name, f"{EMPTY} (another answer goes on where this one ends)")
    if answer[-1]["role"] != "assistant":
        raise FieldError(name, f"ends in a {answer[-1]['role']} turn, not in an assistant turn")
    if not answer[-1]["content"].strip():
        raise FieldError(name, EMPTY)
    for number, message in enumerate(answer, start=1):
        if message["role"] in ("user", "system"):
            raise FieldError(
                name, f"message {number} is a {message['role']} turn: put it into the prompt, or {FULL_TURNS}"
            )


def _split_texts(texts: dict[str, str]) -> tuple[str, dict[str, str]]:
    shared = os.path.commonprefix(list(texts.values()))  # noqa: RUF071 - of texts, not of paths
    for name, text in texts.items():
        if len(text) == len(shared):
            reason = "is the beginning of the other answer, so that no prompt can be told from it: add a prompt field"
            raise FieldError(name, reason)
    prompt = _whole_words(shared, [text[len(shared)] for text in texts.values()])
    if not prompt:
        raise FieldError("prompt", "missing, and the answers share no first word: add a prompt field")
    return prompt, {name: text[len(prompt) :] for name, text in texts.items()}


def _whole_words(shared: str, following: Sequence[str]) -> str:
    """Cut back to the end of a word, blanks left to the answers: "is it b|lue" and "is it b|ig" share "is it"."""
    if shared[-1:].isspace() or all(character.isspace() for character in following):
        return shared.rstrip()
    words = shared.rsplit(maxsplit=1)
    return words[0] if len(words) == 2 else ""
