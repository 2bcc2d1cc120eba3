"""A language model behind an OpenAI-compatible server as the annotator.

    judge:
      url: http://localhost:8000        # its /v1/chat/completions is asked
      model: Qwen/Qwen3-8B
      api_key_env: JUDGE_KEY            # the environment variable that holds the key, where the server asks for one
      cache: judged.sqlite              # what it said, by content: a run that goes on does not ask again
      timeout: 60                       # seconds of one try
      retries: 3                        # after the first try, where the server is busy, fails or cannot be reached
      logprobs: true                    # false for a server that refuses them, as `align serve` does
      template: |                       # with these three fields; the reply is to be one letter
        {prompt} ... A: {first} ... B: {second} ... A or B?

A judge prefers answers for where they stand, so that each pair is asked in both orders:
``p = (P(A; y, y') + 1 - P(A; y', y)) / 2``. Where the server gives log-probs, ``P(A)`` is the share of A in the
probabilities of A and B (one that is not among the 20 likeliest tokens counts 0), at the first token that is a letter,
or at the first one of all where both letters are likely and the reply has none. Else it is 1 or 0 by the letter.

A reply without a letter, and a question that the server refused or did not answer after all tries, set the pair aside.
When no pair is left, or the server fails many times in a row, it is an AnnotatorError. Answers are kept by model,
template and texts, and not by the server's address; failures are not kept. The key stands in no file and in no
message.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Self
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import torch

from .encoding import Content, plain
from .expression import ExpressionError
from .verdicts import NO_COLUMNS, AnnotatorError, Columns, Groups, Problem, Verdicts, check_groups

TOGETHER = 8
"""Questions under way at a time. So many failures of the server in a row end a call: it is gone, or refuses all."""
OF_THE_QUESTION = (400, 413, 422)
"""What a server says of a question that it does not take, such as one over its context; no failure of its own."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds between tries: twice as many each time, times a draw from [1/2, 1]."""
LONGEST_RETRY_AFTER = 600.0
"""Most seconds that are waited because a server says so."""
MOST_TOKENS = 8
MOST_BYTES = 1 << 20
"""Of a reply."""
FIELDS = ("prompt", "first", "second")
TEMPLATE = """Which of two answers to a request is better?

[Request]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Judge how helpful, correct and clear they are. Neither their order nor their length counts. \
Reply with one letter, A or B."""
_FIELD = re.compile("{(" + "|".join(FIELDS) + ")}")
# Not the article: what follows is the end, a mark, or what is said of an answer.
_LETTER = re.compile(
    r"\W*(?:(?:the\s+)?(?:better\s+)?answer(?:\s+is)?\W+)?([AB])(?:\W*$|[.:)*\n]|\s+(?:is|was|wins|because)\b)", re.I
)


@dataclass(frozen=True)
class JudgeSettings:
    """Section ``judge`` of a recipe; see the module's text."""

    url: str
    model: str
    template: str = TEMPLATE
    api_key_env: str | None = None
    timeout: float = 60.0
    retries: int = 3
    cache: str | None = None
    logprobs: bool = True


def parse_judge(given: Any) -> JudgeSettings:
    """Read a section ``judge``; the server is not asked.

    Raises:
        ExpressionError: what is wrong, and where in the section.
    """
    known = [one.name for one in fields(JudgeSettings)]
    if not isinstance(given, Mapping):
        raise ExpressionError("", f"is not a section with {', '.join(known)}")
    for key in given:
        if key not in known:
            raise ExpressionError(str(key), f"unknown key; known here: {', '.join(known)}")
    given = {key: value for key, value in given.items() if value is not None}
    for key in ("url", "model", "template", "api_key_env", "cache"):
        value = given.get(key)
        if (key in given or key in ("url", "model")) and not (isinstance(value, str) and value.strip()):
            raise ExpressionError(key, "is missing" if value is None else f"is {value!r}; it must be text")
    settings = JudgeSettings(**given)
    if urlsplit(settings.url).scheme not in ("http", "https") or not urlsplit(settings.url).netloc:
        raise ExpressionError("url", f"is {settings.url!r}; it must be as http://host:port")
    if lacking := [name for name in FIELDS if "{" + name + "}" not in settings.template]:
        raise ExpressionError("template", f"has no {{{lacking[0]}}}; it needs {{prompt}}, {{first}} and {{second}}")
    for key, value, least in (("timeout", settings.timeout, 0.001), ("retries", settings.retries, 0)):
        wanted = int if key == "retries" else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted) or not least <= value < math.inf:
            raise ExpressionError(key, f"is {value!r}; it must be {'a whole number' if least == 0 else 'positive'}")
    if not isinstance(settings.logprobs, bool):
        raise ExpressionError("logprobs", f"is {settings.logprobs!r}; it must be true or false")
    if settings.cache and Path(settings.cache).expanduser().is_dir():
        raise ExpressionError("cache", f"{settings.cache} is a folder; name a file")
    return settings


class _SetAside(Exception):  # noqa: N818
    """Why a question has no answer; ``by_server`` where that says something of the server."""

    def __init__(self, reason: str, *, by_server: bool) -> None:
        super().__init__(reason)
        self.by_server = by_server


class _Again(Exception):  # noqa: N818
    """Why a try failed that another one may mend, and how many seconds the server wants to be left alone."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Judge:
    """An annotator that asks a server.

    Args:
        settings: of the recipe.
        key: for the server.
        both_orders: False asks for the answers in the order in which they came, to see what the judge makes of it.
    """

    settings: JudgeSettings
    key: str | None = field(default=None, repr=False)
    both_orders: bool = True

    @classmethod
    def of(cls, settings: JudgeSettings) -> Self:
        """With its key from the environment.

        Raises:
            ExpressionError: there is none.
        """
        name = settings.api_key_env
        if name and not os.environ.get(name):
            raise ExpressionError("judge.api_key_env", f"the environment variable {name} is not set, or empty")
        return cls(settings, os.environ[name] if name else None)

    @property
    def name(self) -> str:
        """The judge's."""
        return self.settings.model

    def __call__(self, prompts: Sequence[Content], answers: Groups, columns: Columns = NO_COLUMNS) -> Verdicts:
        """Verdicts on all pairs.

        Raises:
            AnnotatorError: sizes that differ, no pair could be judged, the server is gone, or the cache
                cannot be used.
        """
        check_groups(self.name, prompts, answers, columns)
        size = len(answers[0])
        texts = [[plain(answer, "assistant") for answer in group] for group in answers]
        asked = {
            (row, i, j): self._question(conversation(prompt), texts[row][i], texts[row][j])
            for row, prompt in enumerate(prompts)
            for i in range(size)
            for j in range(size)
            if i < j or (self.both_orders and i != j)
        }
        found = self._answers(list(dict.fromkeys(asked.values())))
        values = torch.full((len(prompts), size, size), 0.5, dtype=torch.float64)
        problems = []
        pairs = [pair for pair in asked if pair[1] < pair[2]]
        for row, i, j in pairs:
            there = found[asked[row, i, j]]
            back = found[asked[row, j, i]] if self.both_orders else there if isinstance(there, str) else 1 - there
            if isinstance(there, str) or isinstance(back, str):
                problems.append(Problem(row, i, j, there if isinstance(there, str) else str(back)))
            else:
                values[row, i, j] = (there + 1 - back) / 2
        if len(problems) == len(pairs):
            what = f"none of {len(pairs)} pairs could be judged by {self.settings.url}: {problems[0].reason}"
            raise AnnotatorError(self.name, what)
        return Verdicts.of_probabilities(values, problems)

    def _question(self, prompt: str, first: str, second: str) -> str:
        texts = {"prompt": prompt, "first": first, "second": second}
        return _FIELD.sub(lambda found: texts[found[1]], self.settings.template)

    def _answers(self, questions: Sequence[str]) -> dict[str, float | str]:
        """Probability of A for each question, or why there is none."""
        try:
            with closing(self._kept()) as kept:
                found: dict[str, float | str] = {}
                for question in questions:
                    row = kept.execute(
                        "SELECT probability FROM judged WHERE key = ?", (self._key(question),)
                    ).fetchone()
                    if row is not None:
                        found[question] = float(row[0])
                with closing(self._asked([one for one in questions if one not in found])) as answers:
                    for question, answer in answers:
                        found[question] = answer
                        if not isinstance(answer, str):
                            row = self._key(question), answer
                            with kept:
                                kept.execute("INSERT OR REPLACE INTO judged VALUES (?, ?)", row)
                return found
        except (sqlite3.Error, OSError) as error:
            what = f"the cache {self.settings.cache} cannot be used ({error}); remove it, or name another"
            raise AnnotatorError(self.name, what) from error

    def _kept(self) -> sqlite3.Connection:
        path = Path(self.settings.cache).expanduser() if self.settings.cache else None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        kept = sqlite3.connect(path or ":memory:", timeout=60)
        with kept:
            kept.execute("CREATE TABLE IF NOT EXISTS judged (key TEXT PRIMARY KEY, probability REAL NOT NULL)")
        return kept

    def _key(self, question: str) -> str:
        what = json.dumps([1, self.settings.model, self.settings.logprobs, question])
        return hashlib.sha256(what.encode()).hexdigest()

    def _asked(self, questions: Sequence[str]) -> Generator[tuple[str, float | str]]:
        """Each question with its answer, as they come, by threads that no process waits for where it ends."""
        stop, in_a_row = threading.Event(), 0
        waiting: SimpleQueue[str] = SimpleQueue()
        done: SimpleQueue[tuple[str, float | BaseException]] = SimpleQueue()
        for question in questions:
            waiting.put(question)

        def work() -> None:
            with contextlib.suppress(Empty):
                while True:
                    question = waiting.get_nowait()
                    try:
                        done.put((question, self._ask(question, stop)))
                    except BaseException as error:
                        done.put((question, error))

        for number in range(min(TOGETHER, len(questions))):
            threading.Thread(target=work, name=f"align-judge-{number}", daemon=True).start()
        try:
            for _ in questions:
                question, answer = done.get()
                if isinstance(answer, _SetAside):
                    in_a_row = in_a_row + 1 if answer.by_server else 0
                    if in_a_row == TOGETHER:
                        what = f"{self.settings.url} failed {TOGETHER} times in a row: {answer}"
                        raise AnnotatorError(self.name, what)
                    yield question, str(answer)
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    in_a_row = 0
                    yield question, answer
        finally:
            stop.set()  # what waits is then asked of nobody

    def _ask(self, question: str, stop: threading.Event) -> float:
        for attempt in range(self.settings.retries + 1):
            if stop.is_set():
                break
            try:
                return read_reply(self._reply(question))
            except _Again as failure:
                if attempt == self.settings.retries:
                    raise _SetAside(f"{failure}, tried {attempt + 1} times", by_server=True) from failure
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1)
                if failure.wait is not None:
                    wait += min(failure.wait, LONGEST_RETRY_AFTER)
                stop.wait(wait)
        raise _SetAside("not asked", by_server=True)  # nobody waits for it any more

    def _reply(self, question: str) -> Any:
        body: dict[str, Any] = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": MOST_TOKENS,
        }
        if self.settings.logprobs:
            body |= {"logprobs": True, "top_logprobs": 20}
        headers = {"Content-Type": "application/json", "User-Agent": "align-lm"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        url = self.settings.url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        request = Request(url, json.dumps(body).encode(), headers)
        deadline = time.monotonic() + self.settings.timeout
        try:
            with _opener.open(request, timeout=self.settings.timeout) as response:
                return json.loads(b"".join(_chunks(response.read1, deadline)))
        except HTTPError as error:
            what = f"the server said {error.code}: {self._said(error)}"
            if error.code in (408, 429) or error.code >= 500:
                raise _Again(what, _seconds(error.headers.get("Retry-After"))) from error
            hint = "; set logprobs: false" if self.settings.logprobs and "logprobs" in what else ""
            raise _SetAside(what + hint, by_server=bool(hint) or error.code not in OF_THE_QUESTION) from error
        except (OSError, HTTPException) as error:  # timeouts and URLError among them
            raise _Again(f"{type(error).__name__}: {error}") from error
        except ValueError as error:
            raise _SetAside(f"the server's reply is no JSON: {error}", by_server=True) from error

    def _said(self, error: HTTPError) -> str:
        try:
            with error:
                said = error.read1(300).decode(errors="replace").strip()
        except (OSError, HTTPException):
            said = ""
        return (said.replace(self.key, "***") if self.key else said) or str(error.reason)


class _NoRedirects(HTTPRedirectHandler):
    """A redirected question would lose its text, and could take the key to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


_opener = build_opener(_NoRedirects)


def _chunks(read: Callable[[int], bytes], deadline: float) -> Iterator[bytes]:
    """A reply, whole by a deadline: the socket's own time-out starts anew with each byte."""
    size = 0
    while chunk := read(1 << 16):
        size += len(chunk)
        if size > MOST_BYTES:
            raise ValueError(f"over {MOST_BYTES:,} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("the reply was not whole in time")
        yield chunk


def _seconds(retry_after: str | None) -> float | None:
    """``Retry-After``: seconds, or a date; None for what is neither, after which the judge's own back-off counts."""
    if retry_after is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", retry_after.strip()):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None


def read_reply(reply: Any) -> float:
    """Probability of A, of a reply of ``/v1/chat/completions``."""
    try:
        choice = reply["choices"][0]
        text = str(choice["message"]["content"] or "")
        tokens = (choice.get("logprobs") or {}).get("content") or []
        said = next((token for token in tokens if _letter(token["token"])), None)
        weights = {"A": 0.0, "B": 0.0}
        for one in (said or (tokens or [{"top_logprobs": []}])[0])["top_logprobs"]:
            if letter := _letter(one["token"]):
                weights[letter] += math.exp(one["logprob"])
        total = weights["A"] + weights["B"]
        if math.isnan(total):
            raise _SetAside("the server's log-probs of A and B are NaN", by_server=True)
        if 0 < total < math.inf and (said or min(weights.values()) > 0):
            return weights["A"] / total
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise _SetAside(f"the reply is not of a chat: {json.dumps(reply)[:200]}", by_server=True) from error
    if (found := _LETTER.match(text)) is None:
        raise _SetAside(f"the judge's reply is not A or B: {text[:80]!r}", by_server=False)
    return float(found[1].upper() == "A")


def _letter(token: str) -> str | None:
    """A or B where a token is that letter, with blanks or marks about it."""
    bare = re.sub(r"[\W_▁Ġ]", "", token)
    return bare if bare in ("A", "B") else None


def conversation(prompt: Content) -> str:
    """A prompt as the judge reads it: one request as it is, of several turns each with who said it."""
    if isinstance(prompt, str):
        return prompt
    turns = [turn for turn in prompt if turn.get("content")]
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n\n".join(f"{str(turn['role']).capitalize()}: {turn['content']}" for turn in turns)
