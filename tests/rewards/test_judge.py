"""A judge behind a real server: both orders, log-probs and letters, what is kept, and what fails."""

from __future__ import annotations

import json
import math
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from align.rewards import judge as judging
from align.rewards.annotators import AnnotatorError, annotator_of, parse_annotator
from align.rewards.expression import ExpressionError
from align.rewards.judge import TOGETHER, conversation, read_reply


def said(text: str, *positions: tuple[str, dict[str, float]]) -> dict[str, Any]:
    """A reply with this text and, for its tokens, the probabilities of the likeliest."""
    content = [
        {"token": token, "top_logprobs": [{"token": one, "logprob": math.log(p)} for one, p in top.items()]}
        for token, top in positions
    ]
    return {"choices": [{"message": {"content": text}, "logprobs": {"content": content} if content else None}]}


class Server(ThreadingHTTPServer):
    """Answers by ``behave(question, number of the request)``: a reply, or (status, headers, body)."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.behave: Callable[[str, int], Any] = prefers_long

    def handle_error(self, *_: Any) -> None:
        """A client that has gone away is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append({"path": self.path, **body})
            self.server.headers.append(dict(self.headers))
            number = len(self.server.requests)
        found = self.server.behave(body["messages"][0]["content"], number)
        status, headers, payload = found if isinstance(found, tuple) else (200, {}, json.dumps(found))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload.encode())

    def log_message(self, *_: Any) -> None:
        pass


def answers_in(question: str) -> tuple[str, str]:
    found = re.search(r"\[Answer A\]\n(.*?)\n\n\[Answer B\]\n(.*?)\n\nJudge", question, re.S)
    assert found
    return found[1], found[2]


def prefers_long(question: str, number: int) -> dict[str, Any]:
    first, second = answers_in(question)
    return said("A" if len(first) > len(second) else "B")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(judging, "FIRST_WAIT", 0.001)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def judge(server: Server, **more: Any) -> Any:
    return annotator_of({"judge": {"url": server.url, "model": "m", "timeout": 5, **more}})


def test_both_orders_by_letter(server: Server):
    """A judge of length is sure whatever the order; of equally long ones it says B: 1/2. Scores are held to 10."""
    found = judge(server)(["ask {second}"], [["a", "aaa {prompt}", "b"]])
    assert found.preference.tolist() == [[[0.5, 0, 0.5], [1, 0.5, 1], [0.5, 0, 0.5]]]
    assert found.scores[0].tolist() == [[0, -10, 0], [10, 0, 10], [0, -10, 0]]
    assert found.problems == []
    assert len(server.requests) == 6
    one = server.requests[0]
    assert (one["path"], one["model"], one["temperature"]) == ("/v1/chat/completions", "m", 0)
    assert (one["logprobs"], one["top_logprobs"]) == (True, 20)
    # What looks like a field in a text is text.
    assert all("ask {second}" in one["messages"][0]["content"] for one in server.requests)
    assert any("aaa {prompt}" in one["messages"][0]["content"] for one in server.requests)


def test_both_orders_by_log_probs(server: Server):
    """P(A) = 0.6/0.8 with the good answer first and 0.3/0.6 with it second: p = (3/4 + 1 - 1/2)/2 = 5/8."""
    first, second = {"A": 0.5, " A": 0.1, "B": 0.2}, {"A": 0.3, "B": 0.3, "the": 0.4}
    server.behave = lambda question, number: said("A", ("A", first if answers_in(question)[0] == "good" else second))
    found = judge(server)(["ask"], [["good", "bad"]])
    assert found.preference[0, 0, 1] == pytest.approx(5 / 8)
    assert found.scores[0, 0, 1] == pytest.approx(math.log(5 / 3))


@pytest.mark.parametrize(
    ("reply", "probability"),
    [
        (said("B"), 0),
        (said(" **a**."), 1),
        (said("Answer: B"), 0),
        (said("The better answer is A."), 1),
        (said("A is the better choice."), 1),
        (said("B: The Nile, the"), 0),
        (said("B", ("B", {"B": 0.9})), 0),
        (said("\nB", ("\n", {"\n": 1.0}), ("B", {"B": 0.6, "A": 0.2})), 0.25),
        (said("I think so", ("I", {"I": 0.4, "A": 0.3, "B": 0.1})), 0.75),
        (said("A", ("A", {})), 1),
    ],
)
def test_what_a_reply_says(reply: Any, probability: float):
    assert read_reply(reply) == pytest.approx(probability)


@pytest.mark.parametrize(
    "reply",
    [
        said("A tie"),
        said("A better answer is"),
        said("A or B"),
        said(""),
        said("C"),
        said("both", ("both", {"both": 0.5, "A": 0.1})),
        said("A", ("A", {"A": math.nan, "B": 0.5})),
        {"error": "x"},
        [],
        None,
        {"choices": [{"message": {"content": "A"}, "logprobs": {"content": [{"token": "A"}]}}]},
    ],
)
def test_what_says_nothing(server: Server, reply: Any):
    server.behave = lambda question, number: reply
    with pytest.raises(
        AnnotatorError, match=r"m: none of 1 pairs could be judged by http.*not A or B|not of a chat|A and B are NaN"
    ):
        judge(server)(["ask"], [["a", "b"]])


def test_an_unreadable_pair_is_set_aside_and_asked_again_later(server: Server, tmp_path: Path):
    sulks = True

    def behave(question: str, number: int) -> Any:
        return said("Hm") if sulks and answers_in(question) == ("x", "aa") else prefers_long(question, number)

    server.behave = behave
    annotator = judge(server, cache=str(tmp_path / "new" / "judged.sqlite"))
    found = annotator(["ask"], [["aa", "x", "bbb"]])
    assert [(one.prompt, one.first, one.second) for one in found.problems] == [(0, 0, 1)]
    assert "'Hm'" in found.problems[0].reason
    assert found.preference[0, 0, 1].isnan()
    assert found.preference[0, 2].tolist() == [1, 1, 0.5]
    sulks = False
    assert annotator(["ask"], [["aa", "x", "bbb"]]).problems == []
    assert len(server.requests) == 7


def test_what_was_said_is_kept_by_content(server: Server, tmp_path: Path):
    """Another server, another order of answers, one more answer: what was asked before is not asked again."""
    cache = str(tmp_path / "judged.sqlite")
    first = judge(server, cache=cache)(["ask"], [["aa", "b"]])
    assert len(server.requests) == 2
    elsewhere = annotator_of({"judge": {"url": "http://127.0.0.1:9", "model": "m", "cache": cache}})
    again = elsewhere(["ask"], [["b", "aa"]])
    assert again.preference[0, 1, 0] == first.preference[0, 0, 1] == 1
    judge(server, cache=cache)(["ask"], [["aa", "b", "ccc"]])
    assert len(server.requests) == 2 + 4
    judge(server, cache=cache, model="other")(["ask"], [["aa", "b"]])
    judge(server, cache=cache)(["ask more"], [["aa", "b"]])
    judge(server, cache=cache, template="{prompt}\n[Answer A]\n{first}\n\n[Answer B]\n{second}\n\nJudge.")(
        ["ask"], [["aa", "b"]]
    )
    assert len(server.requests) == 6 + 6
    with sqlite3.connect(cache) as kept:
        assert kept.execute("SELECT COUNT(*) FROM judged").fetchone() == (12,)
    Path(cache).write_text("no data base, but a longer text than its header would be" * 9)
    with pytest.raises(AnnotatorError, match=r"the cache .* cannot be used .*; remove it"):
        judge(server, cache=cache)(["ask"], [["aa", "b"]])


def test_equal_questions_are_asked_once(server: Server):
    found = judge(server)(["ask", "ask"], [["a", "a"], ["a", "a"]])
    assert found.preference.tolist() == [[[0.5, 0.5], [0.5, 0.5]]] * 2
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_server_is_asked_again(server: Server, status: int):
    server.behave = lambda q, number: (status, {}, "busy") if number <= 2 else prefers_long(q, number)
    assert judge(server)(["ask"], [["aa", "b"]]).preference[0, 0, 1] == 1
    assert len(server.requests) == 4
    server.requests.clear()
    server.behave = lambda q, number: (status, {}, "busy")
    with pytest.raises(AnnotatorError, match=f"the server said {status}: busy, tried 2 times"):
        judge(server, retries=1)(["ask"], [["aa", "b"]])
    assert len(server.requests) == 4


def test_retry_after_is_honoured(server: Server):
    server.behave = lambda q, number: (429, {"Retry-After": "0.3"}, "") if number == 1 else prefers_long(q, number)
    start = time.monotonic()
    judge(server)(["ask"], [["aa", "b"]])
    assert time.monotonic() - start > 0.3
    assert judging._seconds(formatdate(time.time() + 100, usegmt=True)) == pytest.approx(100, abs=3)
    assert judging._seconds(formatdate(0, usegmt=True)) == 0
    assert judging._seconds(" 1.5 ") == 1.5
    assert [judging._seconds(given) for given in ("soon", "nan", "inf", "-3")] == [None] * 4


def test_a_refusal_is_not_asked_again(server: Server, monkeypatch: pytest.MonkeyPatch):
    """The key goes to the server alone: what the server says of it is not told."""
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    server.behave = lambda q, number: (401, {}, "wrong key sk-secret")
    annotator = judge(server, api_key_env="JUDGE_KEY")
    with pytest.raises(AnnotatorError, match=r"the server said 401: wrong key \*\*\*$"):
        annotator(["ask"], [["aa", "b"]])
    assert len(server.requests) == 2
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in repr(annotator)


def test_a_server_that_refuses_log_probs(server: Server):
    def behave(question: str, number: int) -> Any:
        refused = 400, {}, "logprobs: this server gives none"
        return refused if "logprobs" in server.requests[-1] else prefers_long(question, number)

    server.behave = behave
    with pytest.raises(AnnotatorError, match="said 400: logprobs: this server gives none; set logprobs: false"):
        judge(server)(["ask"], [["aa", "b"]])
    assert judge(server, logprobs=False)(["ask"], [["aa", "b"]]).preference[0, 0, 1] == 1


def test_a_redirect_is_not_followed(server: Server):
    server.behave = lambda q, number: (302, {"Location": "/elsewhere"}, "")
    with pytest.raises(AnnotatorError, match="the server said 302"):
        judge(server)(["ask"], [["aa", "b"]])


def test_a_server_that_hangs_or_trickles_ends_in_a_message(server: Server):
    """It is asked by few at a time, and after so many failures in a row no more; nothing waits for each question."""
    free = threading.Event()

    def hang(question: str, number: int) -> Any:
        free.wait(5)
        return said("A")

    server.behave = hang
    start = time.monotonic()
    answers = [[f"{n}", f"{n} {n}"] for n in range(40)]
    with pytest.raises(AnnotatorError, match=r"failed 8 times in a row: .*timed out, tried 2 times"):
        judge(server, timeout=0.2, retries=1)([f"p{n}" for n in range(40)], answers)
    assert time.monotonic() - start < 3
    assert len(server.requests) <= 3 * TOGETHER
    free.set()


def test_a_server_that_is_gone_is_told_and_what_it_said_is_kept(server: Server, tmp_path: Path):
    """No pair is set aside for it: the same call asks for the rest."""
    server.behave = lambda q, number: (503, {}, "gone") if number > 24 else prefers_long(q, number)
    annotator = judge(server, retries=0, cache=str(tmp_path / "judged.sqlite"))
    prompts, answers = [f"p{n}" for n in range(40)], [["aa", "b"]] * 40
    with pytest.raises(AnnotatorError, match="failed 8 times in a row: the server said 503: gone"):
        annotator(prompts, answers)
    server.requests.clear()
    server.behave = prefers_long
    assert not annotator(prompts, answers).problems
    assert 80 - 24 <= len(server.requests) < 80 - 24 + TOGETHER  # a late reply may be lost


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_question_that_is_refused_is_no_failure_of_the_server(server: Server, status: int):
    """One prompt over the judge's context has 12 questions, side by side; all others are judged."""

    def behave(question: str, number: int) -> Any:
        return (status, {}, "too long") if "LONG" in question else prefers_long(question, number)

    server.behave = behave
    prompts = [f"{'LONG' * (n == 2)} p{n}" for n in range(8)]
    found = judge(server)(prompts, [["a", "bb", "ccc", "dddd"]] * 8)
    assert {problem.prompt for problem in found.problems} == {2}
    assert {problem.reason for problem in found.problems} == {f"the server said {status}: too long"}
    assert len(server.requests) == 8 * 12


def test_no_process_waits_for_a_judge_as_it_ends(server: Server):
    """A run that has waited long enough ends, whatever questions are still under way."""
    free, asked = threading.Event(), threading.Event()

    def hang(question: str, number: int) -> Any:
        if number == TOGETHER:
            asked.set()
        free.wait(5)
        return said("A")

    server.behave = hang
    annotator, answers = judge(server), [["a", "b"]] * 20
    caller = threading.Thread(target=annotator, args=([f"p{n}" for n in range(20)], answers))
    caller.start()
    assert asked.wait(5)
    asking = [thread for thread in threading.enumerate() if thread.name.startswith("align-judge")]
    free.set()
    caller.join()
    assert len(asking) == TOGETHER
    assert all(thread.daemon for thread in asking)


def test_a_reply_must_be_whole_in_time():
    """A byte each 0.05 seconds keeps a socket's own time-out from ending it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        done = threading.Event()

        def trickle() -> None:
            client, _ = listening.accept()
            client.recv(1 << 16)
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not done.wait(0.05):
                try:
                    client.sendall(b" ")
                except OSError:
                    break
            client.close()

        threads = [threading.Thread(target=trickle) for _ in range(2)]
        for thread in threads:
            thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        annotator = annotator_of({"judge": {"url": url, "model": "m", "timeout": 0.3, "retries": 0}})
        start = time.monotonic()
        with pytest.raises(AnnotatorError, match="not whole in time"):
            annotator(["ask"], [["aa", "b"]])
        assert time.monotonic() - start < 2
        done.set()
        for thread in threads:
            thread.join()


def test_no_server_at_all():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    annotator = annotator_of({"judge": {"url": f"http://127.0.0.1:{port}/v1/", "model": "m", "retries": 0}})
    with pytest.raises(AnnotatorError, match=r"Connection refused.*, tried 1 times"):
        annotator(["ask"], [["aa", "b"]])


def test_a_conversation_is_read_whole():
    assert conversation([{"role": "user", "content": "Hi"}]) == "Hi"
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", None), ("user", "Why?")]
    told = conversation([{"role": role, "content": text} for role, text in turns])
    assert told == "System: Be brief.\n\nUser: Hi\n\nUser: Why?"


@pytest.mark.parametrize(
    ("given", "where", "problem"),
    [
        ("gpt", "judge", "is not a section"),
        ({"model": "m"}, "judge.url", "is missing"),
        ({"url": "http://h"}, "judge.model", "is missing"),
        ({"url": "localhost:8000", "model": "m"}, "judge.url", "must be as http://host:port"),
        ({"url": "http://h", "model": 3}, "judge.model", "must be text"),
        ({"url": "http://h", "model": "m", "tries": 2}, "judge.tries", "unknown key; known here: url, model"),
        ({"url": "http://h", "model": "m", "template": "{prompt} {first}"}, "judge.template", "has no {second}"),
        ({"url": "http://h", "model": "m", "timeout": 0}, "judge.timeout", "must be positive"),
        ({"url": "http://h", "model": "m", "retries": 1.5}, "judge.retries", "whole number"),
        ({"url": "http://h", "model": "m", "logprobs": 1}, "judge.logprobs", "true or false"),
        ({"url": "http://h", "model": "m", "cache": "."}, "judge.cache", "is a folder"),
    ],
)
def test_what_is_wrong_in_a_recipe(given: Any, where: str, problem: str):
    with pytest.raises(ExpressionError, match=re.escape(problem)) as caught:
        parse_annotator({"judge": given})
    assert caught.value.where == where


def test_a_key_that_is_not_there_is_told_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_KEY_HERE", raising=False)
    parsed = parse_annotator({"judge": {"url": "http://h", "model": "m", "api_key_env": "NO_KEY_HERE"}})
    with pytest.raises(ExpressionError, match="NO_KEY_HERE is not set"):
        parsed.load()
