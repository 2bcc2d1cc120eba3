"""What a real server answers: vLLM with a tiny model in float32, used by OpenAI's client and from its page."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from align.decoding.constraints import Vocabulary, build
from align.decoding.engines import TransformersEngine
from align.decoding.engines.remote import RemoteRollouts
from align.decoding.generate import generate
from align.decoding.law import Law
from align.decoding.request import Answer, Request
from align.errors import AlignError
from align.generate import Settings, answer_controlled
from align.transfer import Transfer

README = Path(__file__).parents[3] / "README.md"
pytestmark = pytest.mark.serving

OBJECT = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


def ours(**settings: Any) -> dict[str, Any]:
    """What goes beside a request of OpenAI's."""
    return {"vllm_xargs": {"align": json.dumps(settings)}}


def smc(**settings: Any) -> dict[str, Any]:
    return {"prompt": "the cat", "max_tokens": 40, "seed": 7, **settings}


def test_the_log_says_what_was_chosen_and_the_key_stays_out_of_it(server: Any) -> None:
    log = server.log.read_text(encoding="utf-8", errors="replace")
    for about in ("engine: vllm", "dtype: float32: asked for", "block_size: 32", "threads: ", "model: "):
        assert f"align serve: {about}" in log
    assert server.key not in log
    assert server.key not in Path(f"/proc/{server.process.pid}/cmdline").read_text(encoding="utf-8")


def test_plain_requests_are_vllms(server: Any) -> None:
    reply = server.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=6, seed=1
    )
    assert reply.usage is not None
    assert reply.usage.completion_tokens <= 6
    assert "align" not in (reply.model_extra or {})
    parts = list(server.client.completions.create(model="tiny", prompt="hi", max_tokens=6, stream=True))
    assert parts[-1].choices[0].finish_reason in ("stop", "length")  # how many there are is a matter of speed


def test_an_answer_under_a_schema_validates_and_has_its_weight(server: Any) -> None:
    reply = server.client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Who?"}],
        max_tokens=60,
        seed=3,
        extra_body=ours(constraint={"json": OBJECT}, particles=4),
    )
    choice = reply.choices[0]
    found = json.loads(choice.message.content or "")
    assert found["name"] in ("Ann", "Bob")
    assert 0 <= found["age"] <= 99
    assert choice.finish_reason == "stop"
    about = (reply.model_extra or {})["align"]
    assert about["valid"]
    assert len(about["samples"]) == 4
    assert about["log_weight"] < 0
    assert 1 <= about["ess"] <= 4
    assert about["usage"]["requests"] >= 4
    assert about["usage"]["drawn_tokens"] >= reply.usage.completion_tokens  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["awrs-smc", "mask"])
def test_the_server_draws_what_is_drawn_without_one(
    server: Any, model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, method: Any
) -> None:
    """The same prompt, seed and settings through transformers: the same texts, weights and evidence."""
    spec = {"regex": "[a-c]{2}[0-9]{1,6}"}
    vocabulary = Vocabulary.of(tiny_tokenizer, size=model.config.vocab_size)
    request = Request(
        tiny_tokenizer("the cat")["input_ids"],
        build(spec, vocabulary),
        method=method,
        particles=6,
        seed=7,
        max_new_tokens=40,
    )
    (expected,) = generate(TransformersEngine(model), [request], vocabulary)
    found = server.smc(constraint=spec, particles=6, method=method).json()
    result = result_of(expected)
    assert found["text"] == vocabulary.text(result.drawn.tokens)
    assert [sample["text"] for sample in found["samples"]] == [vocabulary.text(one.tokens) for one in result.samples]
    weights = [sample["log_weight"] for sample in found["samples"]]
    assert weights == pytest.approx([sample.log_weight for sample in result.samples], abs=2e-3)
    assert found["log_normaliser"] == pytest.approx(result.log_normaliser, abs=2e-3)


def test_it_is_a_baseline_of_transfer_q(
    server: Any,
    model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its greedy rollouts, more of them than it has places and seats, are those of transformers; by seed the rest.

    And ``align generate --transfer-q`` answers by its URL as by its folder.
    """
    baseline = RemoteRollouts(server.url, tiny_tokenizer, key=server.key)
    prompts = [[5 + place % 40, 9, 5 + place % 7] for place in range(50)]
    settings: dict[str, Any] = {"max_new_tokens": 12, "seeds": range(50), "ends": {tiny_tokenizer.eos_token_id}}
    found = baseline.rollouts(prompts, law=Law(top_k=1), **settings)
    expected = TransformersEngine(model).rollouts(prompts, law=Law(top_k=1), **settings)
    assert [(one.tokens, one.ended) for one in found] == [(one.tokens, one.ended) for one in expected]
    long = {"max_new_tokens": 1, "law": Law(top_k=1), "ends": {tiny_tokenizer.eos_token_id}}
    (kept,) = [baseline.rollouts([[7] * 600], seeds=[1], **long) for _ in range(2)][1]
    assert kept.cached_tokens >= 128
    law = Law(1.5, top_k=40, top_p=0.95)
    drawn = [[one.tokens for one in baseline.rollouts(prompts, law=law, **settings)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert any(one.ended for one in found) or any(tiny_tokenizer.eos_token_id in tokens for tokens in drawn[0])
    monkeypatch.syspath_prepend(server.log.parent)
    monkeypatch.setattr("align.models.hardware.has_bf16_cpu", lambda: False)
    folder = str(server.log.parent / "tiny")

    def answer(where: str) -> dict[str, Any]:
        transfer = Transfer(where, "operators:short", q_length="4", q_candidates=4, q_alpha=3.0)
        return answer_controlled(Settings(folder, 8, 0.0, 1, raw=True), transfer, "the cat")

    with pytest.raises(AlignError, match=f"--transfer-q: {server.url}/v1/models: 401 Unauthorized"):
        answer(server.url)
    monkeypatch.setenv("ALIGN_API_KEY", server.key)
    by_url, by_folder = answer(server.url), answer(folder)
    assert (by_url["valid"], by_url["completion"]) == (True, by_folder["completion"])
    assert by_url["costs"]["rollout_tokens"] == by_folder["costs"]["rollout_tokens"]


def result_of(answer: Answer) -> Any:
    assert answer.result is not None
    assert answer.result.drawn is not None
    return answer.result


def test_one_particle_streams_what_it_answers_without_a_stream(server: Any) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "seed": 4,
        "max_tokens": 60,
        "extra_body": ours(constraint={"regex": "(é|[a-z ]){20,30}"}, method="awrs", particles=1),
    }
    whole = server.client.chat.completions.create(**asked)
    parts = list(server.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    said = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert said == whole.choices[0].message.content
    assert re.fullmatch("(é|[a-z ]){20,30}", said)
    assert len(parts) > 5
    last, usage = parts[-2:]
    assert last.choices[0].finish_reason == "stop"
    about, expected = ((reply.model_extra or {})["align"] for reply in (last, whole))
    assert about["log_weight"] == pytest.approx(expected["log_weight"], abs=2e-3)
    assert usage.usage == whole.usage


def test_particles_are_watched_as_they_grow(server: Any) -> None:
    body = smc(constraint={"regex": "[a-c]{8,12}"}, particles=6, threshold=1.0)
    quiet = server.post("/v1/align/smc", body).json()
    events = []
    with server.http() as client, client.stream("POST", "/v1/align/smc", json={**body, "stream": True}) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    events = [json.loads(line) for line in lines]
    answer = events.pop()
    assert (answer["text"], answer["log_normaliser"]) == (quiet["text"], pytest.approx(quiet["log_normaliser"]))
    assert {event["event"] for event in events} >= {"token", "copy", "resample", "stop"}
    grown: dict[int, list[str]] = {}
    for event in events:  # what was told is enough to draw the particles
        if event["event"] == "token":
            grown.setdefault(event["particle"], []).append(event["text"])
            assert len(grown[event["particle"]]) == event["step"] + 1
        elif event["event"] == "copy":
            grown[event["target"]] = grown[event["source"]][: event["step"] + 1]
    assert answer["text"] in {"".join(texts) for texts in grown.values()}


def test_rewards_tilt_and_score(server: Any) -> None:
    body = smc(constraint={"regex": "[a-z]{1,30}"}, particles=8, method="awrs")
    free = server.post("/v1/align/smc", body).json()
    tilted = server.post("/v1/align/smc", {**body, "reward": "short", "reward_strength": 0.5}).json()
    weights = {one["text"]: one["log_weight"] for one in free["samples"]}
    for sample in tilted["samples"]:
        expected = weights[sample["text"]] - 0.5 * len(sample["text"])
        assert sample["log_weight"] == pytest.approx(expected, abs=2e-3)
    rows = [{"prompt": "2+2", "completion": "4", "solution": "4"}, {"prompt": "3", "completion": "1", "solution": "3"}]
    found = server.post("/v1/align/score", {"reward": "same", "rows": rows}).json()
    assert found == {"object": "align.score", "reward": "same", "scores": [1.0, 0.0]}
    assert server.post("/v1/align/score", {"reward": "other", "rows": rows}).status_code == 400
    no_solution = [{"prompt": "2+2", "completion": "4"}]
    assert server.post("/v1/align/score", {"reward": "same", "rows": no_solution}).status_code == 400


def test_python_is_called_where_the_operator_named_it(server: Any) -> None:
    both = {"all_of": [{"regex": "[0-9]{3}"}, {"python": "operators:no_zero"}]}
    found = server.smc(constraint=both, particles=4).json()
    assert re.fullmatch("[1-9]{3}", found["text"])
    refused = server.smc(constraint={"python": "os:system"})
    assert refused.status_code == 400
    assert re.search("may be called: .*operators:no_zero", refused.json()["error"]["message"])


def of_readme(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return str(found)


def test_the_readmes_curl_gets_what_it_promises(server: Any) -> None:
    """White space is left out, since this model would write little else."""
    _, url, *rest = shlex.split(of_readme("bash"))
    body = json.loads(rest[rest.index("-d") + 1])
    settings = json.loads(body["vllm_xargs"]["align"])
    settings["constraint"]["json"]["x-guidance"] = {"whitespace_flexible": False}
    reply = server.post(httpx.URL(url).path, {**body, "model": "tiny", **ours(**settings)}).json()
    found = json.loads(reply["choices"][0]["message"]["content"])
    assert re.fullmatch("[0-9]{4}-[01][0-9]-[0-3][0-9]", found["date"])
    assert re.fullmatch("[0-2][0-9]:[0-5][0-9]", found["time"])
    assert reply["align"]["log_weight"] < 0


def test_the_readmes_python_runs(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code = of_readme("python3")
    for theirs, here in (
        ("http://127.0.0.1:8000", server.url),
        ('api_key="none"', f'api_key="{server.key}"'),
        ('"quickstart"', '"tiny"'),
    ):
        assert theirs in code
        code = code.replace(theirs, here)
    exec(code, {})
    year, numbers = capsys.readouterr().out.splitlines()
    assert re.fullmatch("20[0-9]{2}", year)
    assert len([float(number) for number in numbers.split()]) == 3


def test_the_page_shows_particles_as_they_grow(server: Any, browser: Any) -> None:
    """The page in a real browser: a run with its columns, a refusal in words, and the three ways side by side."""
    browser.call("Page.navigate", url=f"{server.url}/")
    browser.wait_for("document.querySelector('#error')?.hidden === false")  # no key yet, so the server is silent
    assert browser.run("document.querySelector('#key-label').checkVisibility()")
    browser.run(
        "var type = (id, value) => { const field = document.getElementById(id); field.value = value;"
        f" field.dispatchEvent(new Event('change')); }}; type('key', {json.dumps(server.key)})"
    )
    browser.wait_for(
        "document.querySelector('#model').textContent === 'tiny' && document.querySelector('#error').hidden"
    )
    assert browser.run("[...document.querySelectorAll('#reward option')].map((one) => one.value)") == [
        "",
        "everyday",
        "picky",
        "same",
        "short",
    ]
    browser.complaints.clear()  # the browser's own line on the 401

    browser.run("type('constraint', '(ab?){6}|[0-9]{3}'); type('longest', 20); type('count', 4); type('seed', 5)")
    browser.run("document.querySelector('#run').click()")
    browser.wait_for("document.querySelectorAll('#numbers dd').length")
    texts = browser.run(
        "[...document.querySelectorAll('.particle .text')].map((text) =>"
        " [...text.querySelectorAll('span')].map((span) => span.textContent).join(''))"
    )
    assert len(texts) == 4
    assert all(re.fullmatch(r"(ab?){6}|[0-9]{3}", text) for text in texts)
    assert browser.run("document.querySelectorAll('.particle .text s').length") > 0
    shares = browser.run(
        "[...document.querySelectorAll('.head span:last-child')].map((one) => parseInt(one.textContent))"
    )
    assert sum(shares) == pytest.approx(100, abs=2)
    assert browser.run("document.querySelector('#numbers dd').textContent") in texts
    assert browser.complaints == []

    browser.run("type('constraint', '([a-z] ){150,}'); type('longest', 400); document.querySelector('#run').click()")
    browser.wait_for("document.querySelectorAll('.particle .text s').length > 20")  # before there is an answer
    assert browser.run("!document.querySelector('#stop').disabled && !document.querySelectorAll('#numbers dd').length")
    browser.run("document.querySelector('#stop').click()")
    browser.wait_for("document.querySelector('#stop').disabled")

    browser.run("type('constraint', '('); type('longest', 20)")
    browser.run("document.querySelector('#run').click()")
    assert "regex" in browser.wait_for("document.querySelector('#error').textContent")
    browser.run("type('constraint', '[ab]{3}'); document.querySelector('#side').click()")
    browser.wait_for(
        "[...document.querySelectorAll('#compare section .text')].every((text) => text.textContent !== '…')"
    )
    sides = browser.run("[...document.querySelectorAll('#compare section .text')].map((text) => text.textContent)")
    assert len(sides) == 3
    assert all(re.fullmatch("[ab]{3}", text) for text in sides[1:])
    assert {url.split("/")[2] for url in browser.asked if url.startswith("http")} == {server.url.split("/")[2]}
    browser.call("Emulation.setDeviceMetricsOverride", width=380, height=800, deviceScaleFactor=1, mobile=True)
    assert browser.run("document.documentElement.scrollWidth") <= 380
