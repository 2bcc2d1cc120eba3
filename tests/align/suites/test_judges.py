"""``align eval --suite judges``: rules, reward models and a judge behind a server against people."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

Evaluated = Callable[..., tuple[dict[str, Any], str]]
Jsonl = Callable[..., Path]
SUITE = ("--suite", "judges")


class Server(ThreadingHTTPServer):
    """Says A where the first answer is the longer one or where both are short, and nothing of what it is silent on."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.questions: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        self.server.questions.append(question)
        found = re.search(r"\[Answer A\]\n(.*?)\n\n\[Answer B\]\n(.*?)\n\nJudge", question, re.S)
        assert found
        first, second = map(len, found.groups())
        said = "Well" if "silent" in question else "A" if first > second or max(first, second) < 4 else "B"
        payload = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


ROWS = [
    {"prompt": "1", "chosen": "a long one", "rejected": "short"},
    {"prompt": "2", "chosen": "short", "rejected": "a long one"},
    {"prompt": "3", "chosen": "aa", "rejected": "b"},
    {"prompt": "4", "chosen": "long is right", "rejected": "no"},
]


def judge(server: Server) -> str:
    given = {"letters": {"judge": {"url": f"http://127.0.0.1:{server.server_address[1]}", "model": "m", "retries": 0}}}
    return f"annotators={yaml.safe_dump(given, default_flow_style=True).strip()}"


def test_a_judge_behind_a_server(evaluated: Evaluated, jsonl: Jsonl, server: Server, users_rule: str, tmp_path: Path):
    """It likes long answers, and of two short ones the first: p 1, 0, 1/2, 1, so agreement (1 + 0 + 1/2 + 1) / 4.

    One pair of four is not the same in both orders; the first is preferred in 1 + 1 + 2 + 1 of 8 orders. The rule of
    length is right in three, and has no position. People prefer the longer one in 3 of 4, the judge in 3.5.
    """
    data = jsonl(ROWS)
    found, shown = evaluated(users_rule, judge(server), *SUITE, "--data", data)
    rule, letters = found["models"].values()
    values = {name: metric["value"] for name, metric in letters["metrics"].items()}
    assert values["agreement"] == pytest.approx(2.5 / 4)
    assert values["ties"] == 0.25
    assert values["inconsistent"] == 0.25
    assert values["first_preferred"] == pytest.approx(5 / 8)
    assert values["length_bias"] == pytest.approx(0.5 / 4)
    assert letters["position"] == "asked in both orders"
    assert (rule["position"], "inconsistent" in rule["metrics"]) == ("none by construction", False)
    assert "none by construction" in shown
    assert any(line.startswith(f"{users_rule} ") for line in shown.splitlines()), "names are whole"
    assert rule["metrics"]["agreement"]["value"] == 0.75
    (comparison,) = found["comparisons"]
    assert (comparison["model"], comparison["metric"]) == ("letters", "agreement")
    assert comparison["value"] == pytest.approx(-1 / 8)
    assert "none by" in shown
    assert found["people"] is None
    assert len(server.questions) == 8
    # What it said is kept beside the result: the same command does not ask again.
    assert (tmp_path / "result.judged.sqlite").exists()
    evaluated(users_rule, judge(server), *SUITE, "--data", data)
    assert len(server.questions) == 8


def test_pairs_that_it_does_not_judge(evaluated: Evaluated, jsonl: Jsonl, server: Server, users_rule: str):
    """They are counted and told, and models are compared on those that both judged."""
    rows = [*ROWS, {"prompt": "be silent", "chosen": "one answer", "rejected": "other"}]
    found, shown = evaluated(users_rule, judge(server), *SUITE, "--data", jsonl(rows))
    rule, letters = found["models"].values()
    assert (rule["n"], letters["n"], found["n"]) == (5, 4, 5)
    unjudged = letters["metrics"]["unjudged"]
    assert (unjudged["value"], unjudged["low"], unjudged["n"]) == (0.2, 0, 5)
    assert 0.2 < unjudged["high"] < 1
    assert found["data"]["set_aside"] == 1
    assert "not all judged the same pairs" in shown
    assert found["comparisons"][0]["n"] == 4
    assert "the judge's reply is not A or B: 'Well'" in shown


def test_a_prompt_that_is_too_long_for_a_reward_model(
    evaluated: Evaluated, jsonl: Jsonl, reward_dirs: dict[str, Path], users_rule: str
) -> None:
    """It is set aside, and the others are judged."""
    rows = [ROWS[0], {**ROWS[1], "prompt": "too long " * 200}, *ROWS[2:]]
    found, shown = evaluated(users_rule, reward_dirs["scalar"], *SUITE, "--data", jsonl(rows))
    _, model = found["models"].values()
    assert (model["n"], model["metrics"]["unjudged"]["value"]) == (3, 0.25)
    assert "which leave no room for an answer" in shown


def test_parts(
    evaluated: Evaluated, refused: Callable[..., str], jsonl: Jsonl, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers do not depend on how many pairs are asked at once; one part without a verdict is set aside."""
    data = jsonl(ROWS)
    whole, _ = evaluated(judge(server), *SUITE, "--data", data)
    monkeypatch.setattr("align.suites.annotated.PART", 1)
    again, _ = evaluated(judge(server), *SUITE, "--data", data)
    assert again["models"]["letters"]["metrics"] == whole["models"]["letters"]["metrics"]
    silent = {"prompt": "be silent", "chosen": "one answer", "rejected": "other"}
    found, _ = evaluated(judge(server), *SUITE, "--data", jsonl([ROWS[0], silent, *ROWS[1:]]))
    assert found["models"]["letters"]["metrics"]["unjudged"]["value"] == 0.2
    twice = jsonl([ROWS[0], silent, {**silent, "prompt": "still silent"}, *ROWS[1:]])
    assert "none of 2 pairs could be judged" in refused(judge(server), *SUITE, "--data", twice)


def test_judgements_of_several_people(evaluated: Evaluated, jsonl: Jsonl, users_rule: str):
    """Three votes on one pair, one of them the other way round, and a tie: shares 2/3 and, alone, 1/2."""
    one, two = {"prompt": "1", "chosen": "long", "rejected": "s"}, {"prompt": "1", "chosen": "s", "rejected": "long"}
    other = {"prompt": "2", "chosen": "as", "rejected": "good", "preference": 0.5, "annotator": "a"}
    data = jsonl([{**one, "annotator": "a"}, {**one, "annotator": "b"}, {**two, "annotator": "c"}, other])
    found, shown = evaluated(users_rule, *SUITE, "--data", data)
    (rule,) = found["models"].values()
    assert [row["label"] for row in rule["rows"]] == [pytest.approx(2 / 3), 0.5]
    assert rule["metrics"]["agreement"] == {"value": 1.0, "low": None, "high": None, "n": 1}
    assert found["people"]["value"] == pytest.approx(1 / 3)
    assert "two people say the same of 33.3%" in shown


def test_two_judgements_of_a_pair_that_is_not_judged(
    evaluated: Evaluated, jsonl: Jsonl, server: Server, users_rule: str
) -> None:
    """One pair, two rows of the data: both are set aside."""
    silent = {"prompt": "be silent", "chosen": "one answer", "rejected": "other"}
    rows = [*({**row, "annotator": "a"} for row in ROWS), *({**silent, "annotator": who} for who in "ab")]
    found, shown = evaluated(users_rule, judge(server), *SUITE, "--data", jsonl(rows))
    assert (found["n"], found["models"]["letters"]["n"]) == (5, 4)
    assert found["data"]["set_aside"] == 2
    assert "2 of 6 rows" in shown


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        ("reward", "return 3.0", "the rule gave 3.0"),
        (
            "reward",
            "return [1 / len(p) for p in one if p != 'b' or 1 / 0]",
            "row 3: broken:judge: row 1: the rule fails",
        ),
        ("compare", "return 0.5", "the function gave 0.5: wanted a list"),
    ],
)
def test_a_broken_function_stops(
    refused: Callable[..., str],
    jsonl: Jsonl,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    body: str,
    message: str,
) -> None:
    """It says what is wrong in the function and does not blame the data."""
    arguments = "prompts, one" if kind == "reward" else "prompts, first, one"
    (tmp_path / "broken.py").write_text(f"def judge({arguments}):\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    given = "{reward: 'broken:judge', temperature: 1}" if kind == "reward" else "{compare: 'broken:judge'}"
    told = refused(f"annotators={{mine: {given}}}", *SUITE, "--data", jsonl(ROWS))
    assert "annotators.mine: " in told
    assert message in told
    assert "it judged no pair" not in told


def test_a_function_of_position_and_a_reward_model(
    evaluated: Evaluated, jsonl: Jsonl, reward_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "comparing.py").write_text("def first(prompts, one, other):\n    return [0.9] * len(prompts)\n")
    monkeypatch.syspath_prepend(tmp_path)
    words = (reward_dirs["gpm"], "annotators={first: {compare: 'comparing:first'}}", *SUITE, "--data", jsonl(ROWS))
    found, _ = evaluated(*words)
    model, first = found["models"].values()
    assert model["position"] == "none by construction"
    values = {name: metric["value"] for name, metric in first["metrics"].items()}
    assert (values["inconsistent"], values["first_preferred"], values["ties"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "annotators={NAME: {judge"),
        (("annotators={x: {jugde: {}}}",), "annotators.x.jugde"),
        (("align.rewards.rules:brif",), "did you mean"),
        (("align.rewards.rules:brief", "annotators={'align.rewards.rules:brief': a:b}"), "is the name of a model too"),
        (("annotators={x: {judge: {url: 'http://127.0.0.1:9', model: m, retries: 0}}}",), "failed 8 times in a row"),
    ],
)
def test_what_is_refused(refused: Callable[..., str], jsonl: Jsonl, words: tuple[str, ...], message: str):
    assert message in refused(*words, *SUITE, "--data", jsonl(ROWS))


def test_ties_of_people_alone(refused: Callable[..., str], jsonl: Jsonl, users_rule: str):
    data = jsonl([{**row, "preference": 0.5} for row in ROWS])
    assert "people prefer none of any two answers" in refused(users_rule, *SUITE, "--data", data)
