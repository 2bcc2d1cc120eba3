"""What a real server refuses, stops, counts and stands; the last test ends it."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import BadRequestError, RateLimitError

BENCH = Path(__file__).parents[2] / "bench"
pytestmark = pytest.mark.serving

ENDLESS = {"regex": "[a-z]{4000}"}
"""No answer of it is over before the time that a request has."""
HOSTILE = {"json": {"allOf": [{"type": "string", "pattern": f".*{letter}.*"} for letter in "abcdefghijklmnopqrst"]}}


def ours(**settings: Any) -> dict[str, Any]:
    """What goes beside a request of OpenAI's."""
    return {"vllm_xargs": {"align": json.dumps(settings)}}


def smc(**settings: Any) -> dict[str, Any]:
    return {"prompt": "the cat", "max_tokens": 40, "seed": 7, **settings}


def test_no_other_process_holds_its_port(server: Any) -> None:
    """The engine's is forked: with the socket, the port would be taken for as long as that takes to end."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert len(children) >= 2  # the engine, and what compiles constraints
    port = httpx.URL(server.url).port
    assert port in _listening(psutil.Process(server.process.pid))
    for child in children:
        assert port not in _listening(child)


def _listening(process: psutil.Process) -> set[int]:
    return {found.laddr.port for found in process.net_connections("inet") if found.status == psutil.CONN_LISTEN}


CHAT = [{"role": "user", "content": "a"}]
BAD: list[tuple[str, dict[str, Any], int, str]] = [
    ("/v1/align/smc", smc(), 400, "give a constraint or a reward"),
    ("/v1/align/smc", smc(constraint={"regex": "("}), 400, "unclosed group"),
    ("/v1/align/smc", smc(constraint={"regex": "[^\\s\\S]"}), 400, "nothing satisfies it"),
    ("/v1/align/smc", smc(constraint=HOSTILE), 400, "takes over 2 s to compile"),
    ("/v1/align/smc", smc(constraint=ENDLESS, particles=9), 400, "over this server's limit of 8"),
    ("/v1/align/smc", smc(constraint=ENDLESS, max_tokens=4096), 400, "more than the 4,096"),
    ("/v1/align/smc", smc(constraint=ENDLESS, temperature=0), 400, "top_k=1 takes the likeliest"),
    ("/v1/align/smc", smc(constraint=ENDLESS, model="other"), 404, "`other` does not exist"),
    ("/v1/align/smc", {"constraint": ENDLESS}, 400, "messages, prompt: give one of them"),
    ("/v1/align/smc", smc(constraint={"words": ["x" * 200_000]}), 413, "--max-body"),
    ("/v1/completions", {"prompt": "a", "stream": True, **ours(constraint=ENDLESS)}, 400, "/v1/align/smc"),
    ("/v1/completions", {"prompt": ["a", "b"], **ours(constraint=ENDLESS)}, 400, "give one text"),
    ("/v1/completions", {"prompt": [1, 999999], **ours(constraint=ENDLESS)}, 400, "999999 is the id of no token"),
    ("/v1/completions", {"prompt": [], **ours(constraint=ENDLESS)}, 400, "prompt"),
    ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 9999, **ours(constraint=ENDLESS)}, 400, "max_tokens"),
    ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 0, **ours(constraint=ENDLESS)}, 400, "max_tokens is 0"),
    ("/v1/completions", {"prompt": "a", "stop": ["b"], **ours(constraint=ENDLESS)}, 400, "stop: it does not go with"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 4, **ours(constraint=ENDLESS)}, 422, "no valid answer"),
    ("/v1/completions", {"prompt": "a", "logprobs": 2}, 400, "processed_logits"),
    ("/v1/completions", {"prompt": "a", "structured_outputs": HOSTILE}, 400, "takes over 2 s to compile"),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "("}}, 400, "unclosed group"),
    ("/v1/completions", {"prompt": ["a", "b"], "n": 9}, 400, "18 answers are over this server's limit of 16"),
    ("/v1/align/smc", smc(reward="same"), 400, "asks for column solution"),
    ("/v1/align/score", {"reward": "picky", "rows": [{"prompt": "a", "completion": "b"}]}, 400, "no such prompt"),
    ("/v1/completions", {"prompt": "a", **ours(reward="picky")}, 422, "no such prompt"),
    ("/v1/responses", {"input": "a", **ours(constraint=ENDLESS)}, 400, "settings of ours go to"),
]


@pytest.mark.parametrize(("path", "body", "status", "said"), BAD, ids=[f"{one[2]} {one[3]}" for one in BAD])
def test_what_cannot_be_done_is_refused_and_says_why(
    server: Any, path: str, body: dict[str, Any], status: int, said: str
) -> None:
    before = server.failures()
    reply = server.post(path, body)
    error = reply.json()["error"]
    assert server.failures() == before, "the client's mistake is none of the server's"
    assert reply.status_code == status
    assert said in error["message"]
    assert error["code"] == status
    assert error["type"]


def test_a_function_of_the_operators_that_fails_is_counted_as_an_error(server: Any) -> None:
    before = server.failures()
    for body in (
        smc(constraint={"python": "operators:only_empty"}),
        smc(constraint={"python": "operators:only_empty"}, stream=True),
    ):
        reply = server.post("/v1/align/smc", body)
        assert "operators:only_empty: raised KeyError" in reply.text
        assert "tell its operator" in reply.text
        assert reply.status_code == (200 if "stream" in body else 500)
    assert server.failures() == before + 2


def test_a_function_that_starts_again_is_nobodys_failure(server: Any) -> None:
    """It was stopped in another one's request, and its module takes five seconds to be imported."""

    def asked(pattern: str) -> httpx.Response:
        both = [{"python": "operators:hangs"}, {"regex": pattern}]
        return server.post("/v1/align/smc", smc(constraint={"all_of": both}, particles=2, max_tokens=8))

    assert asked("a{1,3}").json()["valid"]
    slow = server.log.parent / "operators.slow"
    slow.touch()
    try:
        stopped = asked("b{1,3}")
        assert stopped.status_code == 500
        assert "operators:hangs: took over 1 s on 'b'" in stopped.json()["error"]["message"]
        before = server.failures()
        early = asked("a{1,4}")
        assert early.status_code == 503
        assert early.headers["Retry-After"] == "5"
        assert "is starting again" in early.json()["error"]["message"]
        assert server.failures() == before
    finally:
        slow.unlink()
    end = time.monotonic() + 30
    while asked("a{1,4}").status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.2)


def test_without_the_key_nothing_is_done(server: Any) -> None:
    for path in ("/v1/align/smc", "/v1/completions", "/tokenize"):
        reply = httpx.post(f"{server.url}{path}", json=smc(constraint=ENDLESS), timeout=60)
        assert reply.status_code == 401
        assert reply.json()["error"]["type"] == "AuthenticationError"


def test_openais_client_understands_a_refusal(server: Any) -> None:
    with pytest.raises(BadRequestError, match="unclosed group"):
        server.client.completions.create(model="tiny", prompt="a", extra_body=ours(constraint={"regex": "("}))


def test_a_client_that_hangs_up_takes_its_particles_with_it(server: Any) -> None:
    body, line = (
        smc(constraint=ENDLESS, max_tokens=4000, particles=4),
        'align_requests_total{method="awrs-smc",outcome=',
    )
    before = server.metric(f'{line}"hung_up"}}')
    with pytest.raises(httpx.ReadTimeout), server.http() as client:
        client.post("/v1/align/smc", json=body, timeout=0.7)
    server.wait_until_idle()
    with server.http() as client, client.stream("POST", "/v1/align/smc", json={**body, "stream": True}) as reply:
        assert next(reply.iter_lines()).startswith("data: ")
    server.wait_until_idle()
    assert server.metric(f'{line}"hung_up"}}') == before + 2


def test_a_busy_server_sends_away_and_an_endless_request_is_stopped(server: Any) -> None:
    """Eight particles run, eight wait, and eight more are over; all are stopped when their time is up."""
    body = smc(constraint=ENDLESS, max_tokens=4000, particles=server.places)
    lines = [f'align_requests_total{{method="awrs-smc",outcome="{outcome}"}}' for outcome in ("busy", "timeout")]
    before = [server.metric(line) for line in lines]
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(server.post, "/v1/align/smc", body)
        server.wait_for("align_particles_running", server.places, seconds=server.seconds / 2)
        waiting = pool.submit(server.post, "/v1/align/smc", body)
        server.wait_for("align_particles_waiting", server.waiting, seconds=server.seconds / 2)
        with pytest.raises(RateLimitError) as refused:
            server.client.completions.create(model="tiny", prompt="a", extra_body=ours(constraint=ENDLESS))
        assert int(refused.value.response.headers["Retry-After"]) >= 1
        assert server.client.completions.create(model="tiny", prompt="a", max_tokens=3).usage  # plain ones go on
        for stopped in (running.result(), waiting.result()):
            assert stopped.status_code == 504
            assert f"took over {server.seconds:g} s" in stopped.json()["error"]["message"]
    server.wait_for("align_particles_running", 0)
    server.wait_for("align_particles_waiting", 0)
    server.wait_for("vllm:num_requests_running", 0)
    assert server.smc(constraint={"regex": "[0-9]"}).json()["valid"]
    assert [server.metric(line) for line in lines] == [before[0] + 1, before[1] + 2]


PLAIN = {"model": "tiny", "prompt": "a", "max_tokens": 4000, "ignore_eos": True}


@pytest.mark.parametrize("stream", [False, True])
def test_an_endless_request_without_our_settings_is_stopped_too(server: Any, stream: bool) -> None:
    """8 texts of 4000 tokens; the engine's requests are gone with it."""
    before = server.metric('align_requests_total{method="plain",outcome="timeout"}')
    reply = server.post("/v1/completions", {**PLAIN, "n": 8, "stream": stream})
    server.wait_until_idle()
    assert server.metric("vllm:num_requests_waiting") == 0
    assert server.metric('align_requests_total{method="plain",outcome="timeout"}') == before + 1
    if stream:
        first, *_, last, done, _ = reply.text.split("\n\n")
        assert json.loads(first.removeprefix("data: "))["choices"]
        assert done == "data: [DONE]"
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        assert reply.status_code == 504
        error = reply.json()["error"]
    assert error["message"].startswith(f"the request took over {server.seconds:g} s and was stopped")


HEAVY = {f"p{number}": {"type": "string", "pattern": "(.{0,200}a.{0,200}){9}"} for number in range(60)}


def test_vllms_own_structured_outputs_do_not_hold_up_the_server(server: Any) -> None:
    """With xgrammar it read the first two in its loop for half a minute; now nobody waits for them and the hostile."""
    heavy = {"type": "object", "properties": HEAVY}
    tag = {"triggers": ["<f"], "structures": [{"begin": "<f>", "schema": heavy, "end": "</f>"}]}
    hostile = {"json": {**HOSTILE["json"], "title": "another"}}
    asked = [{"json": heavy}, {"structural_tag": json.dumps(tag)}, hostile]
    with ThreadPoolExecutor(3) as pool:
        running = [
            pool.submit(server.post, "/v1/completions", {"prompt": "a", "max_tokens": 8, "structured_outputs": one})
            for one in asked
        ]
        longest = 0.0
        while not all(reply.done() for reply in running):
            began = time.monotonic()
            assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
            longest = max(longest, time.monotonic() - began)
            time.sleep(0.02)
    assert [reply.result().status_code for reply in running] == [200, 200, 400]
    assert longest < 1.5
    refused = running[2].result()
    assert 1 <= int(refused.headers["Retry-After"]) <= 300
    assert refused.json()["error"]["type"] == "BadRequestError"
    body = {"prompt": "a", "max_tokens": 8, "structured_outputs": {"regex": "[ab]{3}"}}
    text = server.post("/v1/completions", body).json()["choices"][0]["text"]
    assert len(text) == 3
    assert set(text) <= {"a", "b"}


def test_so_many_requests_without_our_settings_are_under_way_and_no_more(server: Any) -> None:
    with server.http() as client, ExitStack() as running:
        for _ in range(server.plain):
            running.enter_context(client.stream("POST", "/v1/completions", json={**PLAIN, "stream": True}))
        for path in ("/v1/completions", "/v1/responses", "/v1/messages"):
            busy = server.post(path, {})
            assert (busy.status_code, busy.json()["error"]["type"]) == (429, "TooManyRequestsError")
            assert int(busy.headers["Retry-After"]) >= 1
        ours = server.post("/v1/align/score", {"reward": "short", "rows": [{"prompt": "a", "completion": "b"}]})
        assert ours.json()["scores"] == [-1.0]
        began = time.monotonic()
        assert server.smc(constraint={"regex": "[ab]{3}"}, particles=server.places).json()["valid"]
        assert time.monotonic() - began < server.seconds / 2, "it waits behind them"
    server.wait_until_idle()
    assert server.post("/v1/completions", {**PLAIN, "max_tokens": 2}).status_code == 200


def test_under_load_good_requests_are_answered_right_and_nothing_is_left(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients of the serving bench, each with ten requests: nine good ones, and another kind of a bad one."""
    monkeypatch.syspath_prepend(str(BENCH))
    import serving_load

    async def load() -> tuple[Any, dict[str, float]]:
        headers = {"Authorization": f"Bearer {server.key}"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=60) as http:
            crowd = serving_load.Crowd(serving_load.Client(http), faults.append)
            await crowd.warm_up()
            await crowd.run(len(serving_load.BAD), lambda turns: turns == 10)
            await asyncio.to_thread(server.wait_until_idle)
            return crowd, await serving_load.left(http)

    faults: list[str] = []
    crowd, left = asyncio.run(load())
    assert faults == []
    assert crowd.good.total() == 9 * len(serving_load.BAD)
    assert crowd.bad == dict.fromkeys(serving_load.BAD, 1)
    assert left == dict.fromkeys(left, 0)
    assert len(left) == 4


def test_a_long_prompt_with_a_seed_does_not_stop_the_engine(server: Any) -> None:
    """On a CPU vLLM's own sampler fails where it draws by a seed in the middle of a prompt, and its engine ends."""
    body = {"model": "tiny", "prompt": "the cat " * 550, "max_tokens": 2, "seed": 3, "temperature": 1.0}
    with ThreadPoolExecutor(3) as pool:
        replies = list(pool.map(lambda _: server.post("/v1/completions", body), range(3)))
    assert [reply.status_code for reply in replies] == [200] * 3
    assert replies[0].json()["usage"]["prompt_tokens"] > 2048


def test_the_metrics_count_all_of_it_beside_vllms(server: Any) -> None:
    """The second request has no room for its answer, so that all its particles die."""
    counted = [
        f'align_requests_total{{method="{method}",outcome="{outcome}"}}'
        for method, outcome in (("awrs-smc", "ok"), ("awrs-smc", "bad"), ("mask", "no_answer"), ("plain", "ok"))
    ]
    before = [server.metric(line) for line in counted]
    assert server.smc(constraint={"regex": "[ab]{3}"}).json()["valid"]
    cut = {"constraint": {"regex": "[ab]{9}"}, "method": "mask"}
    assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 3, **ours(**cut)}).status_code == 422
    for stream in (False, True):
        assert server.smc(**cut, **{"max_tokens": 3, "stream": stream}).status_code == 200
    assert server.smc(constraint={"regex": "("}).status_code == 400
    assert server.post("/v1/completions", {**PLAIN, "max_tokens": 2}).status_code == 200
    assert server.smc(constraint={"regex": "a"}, method="mask").status_code == 200
    assert [server.metric(line) for line in counted] == [before[0] + 1, before[1] + 1, before[2] + 3, before[3] + 1]
    for line in ("align_tokens_total", "align_evaluations_total", "align_masks_total", "align_dead_particles_total"):
        assert server.metric(line) >= 1
    assert server.metric("align_evaluations_per_token_count") >= 1
    assert server.metric('align_request_seconds_count{method="mask"}') >= 1
    assert server.metric("vllm:generation_tokens_total") >= 1


def test_told_to_stop_it_finishes_what_is_under_way(server: Any) -> None:
    """The last test: after it there is no server."""
    body = smc(constraint={"regex": "[a-z]{300}"}, max_tokens=400, particles=2)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.post, "/v1/align/smc", body)
        server.wait_for("align_particles_running", 2)
        server.process.send_signal(signal.SIGTERM)
        refused = server.post("/v1/align/smc", body)
        assert refused.status_code == 503
        assert "stopping" in refused.json()["error"]["message"]
        assert running.result().json()["valid"]
    assert server.process.wait(20) == 0
