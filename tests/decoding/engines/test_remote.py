"""Rollouts over HTTP: from a server that speaks as vLLM's, is busy, stops, or has something else than was asked for.

``tests/align/serve/test_server.py`` has the same against the real one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from align.decoding.engines import TransformersEngine, remote
from align.decoding.engines.remote import RemoteRollouts
from align.decoding.law import Law

CONTEXT = 256
GREEDY: dict[str, Any] = {"law": Law(top_k=1), "ends": {2}}


class Server(ThreadingHTTPServer):
    """One model, and what it answers with before it does what it is asked."""

    daemon_threads = True

    def __init__(self, engine: TransformersEngine, tokenizer: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.engine, self.tokenizer = engine, tokenizer
        self.models, self.ids, self.key = ["tiny"], True, ""
        self.failures: list[tuple[int, dict[str, str]]] = []
        self.asked: list[dict[str, Any]] = []
        self.lock = Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": name, "max_model_len": CONTEXT} for name in self.server.models]})

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if server.key and self.headers["Authorization"] != f"Bearer {server.key}":
            return self.reply(401, {"error": {"message": "Unauthorized"}})
        with server.lock:
            server.asked.append(body)
            failure = server.failures.pop(0) if server.failures else None
            if failure == (0, {}):
                return self.close_connection  # nothing at all
            if failure:
                return self.reply(failure[0], {"error": {"message": "busy"}}, failure[1])
            prompt = body["prompt"]
            if isinstance(prompt, str):
                prompt = server.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            law = Law(top_k=1) if body.get("temperature") == 0 else Law(body.get("temperature") or 1.0)
            (made,) = server.engine.rollouts(
                [prompt],
                max_new_tokens=body["max_tokens"],
                law=law,
                seeds=[body.get("seed", 0)],
                ends=body.get("stop_token_ids", ()),
            )
        ids = {"token_ids": list(made.tokens), "prompt_token_ids": prompt} if server.ids else {}
        usage = {"prompt_tokens_details": {"cached_tokens": 3}} if len(prompt) > 5 else {}
        return self.reply(200, {"choices": [{"text": "", **ids}], "usage": usage})


@pytest.fixture(scope="module")
def engine(make_tiny_model: Callable[..., LlamaForCausalLM]) -> TransformersEngine:
    return TransformersEngine(make_tiny_model(max_position_embeddings=CONTEXT))


@pytest.fixture
def server(
    engine: TransformersEngine, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    monkeypatch.setattr(remote, "LONGEST_WAIT", 0.01)
    made = Server(engine, tiny_tokenizer)
    thread = Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.mark.parametrize("law", [Law(top_k=1), Law(), Law(0.5)])
def test_rollouts_are_those_of_the_servers_model(
    law: Law, server: Server, engine: TransformersEngine, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Forty at once, among them two that are nearly or quite as long as what the model reads."""
    prompts = [*([place % 7 + 5] * (place + 1) for place in range(38)), [9] * (CONTEXT - 2), [9] * CONTEXT]
    settings: dict[str, Any] = {"max_new_tokens": 6, "law": law, "seeds": range(40), "ends": {2}}
    found = RemoteRollouts(f"{server.url}/v1/", tiny_tokenizer).rollouts(prompts, **settings)
    expected = engine.rollouts(prompts, **settings)
    assert [(one.tokens, one.ended) for one in found] == [(one.tokens, one.ended) for one in expected]
    assert [one.cached_tokens for one in found] == [3 * (5 < len(prompt) < CONTEXT) for prompt in prompts]
    assert len(found[-2].tokens) <= 2
    assert not found[-1].tokens
    assert {body["seed"] for body in server.asked[1:]} == set(range(39))
    neutral = {"min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
    kept = {} if law.top_k == 1 else {"temperature": law.temperature, "top_k": 0, "top_p": 1}
    assert all((neutral | kept).items() <= body.items() for body in server.asked[1:]), "no default of the server's"
    assert all(body["ignore_eos"] and body["stop_token_ids"] == [2] for body in server.asked[1:])


def test_one_that_is_busy_is_asked_again(server: Server, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    baseline = RemoteRollouts(server.url, tiny_tokenizer)
    expected = baseline.rollouts([[5, 6]], max_new_tokens=4, seeds=[1], **GREEDY)
    server.failures = [(429, {"Retry-After": "600"}), (503, {}), (0, {}), (502, {"Retry-After": "soon"})]
    assert baseline.rollouts([[5, 6]], max_new_tokens=4, seeds=[1], **GREEDY) == expected
    assert not server.failures
    server.failures = [(429, {})] * 100
    with pytest.raises(ConnectionError, match=r"/v1/completions: 429 Too Many Requests: .*busy"):
        baseline.rollouts([[5, 6]], max_new_tokens=4, seeds=[1], **GREEDY)
    assert len(server.failures) == 100 - remote.TRIES
    server.failures, before = [(400, {})], len(server.asked)
    with pytest.raises(ConnectionError, match="400 Bad Request"):
        baseline.rollouts([[5, 6]], max_new_tokens=4, seeds=[1], **GREEDY)
    assert len(server.asked) == before + 1


def test_one_that_does_not_fit_is_refused_before_anything_is_made(
    server: Server, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    server.key = "secret"
    with pytest.raises(ConnectionError, match="401 Unauthorized"):
        RemoteRollouts(server.url, tiny_tokenizer)
    RemoteRollouts(server.url, tiny_tokenizer, key="secret")
    server.key, server.models = "", ["one", "two"]
    with pytest.raises(ValueError, match=f"the server has one, two; name one, as in {server.url}#one"):
        RemoteRollouts(server.url, tiny_tokenizer)
    RemoteRollouts(f"{server.url}#two", tiny_tokenizer)
    assert server.asked[-1]["model"] == "two"
    server.models, server.ids = ["tiny"], False
    with pytest.raises(ValueError, match="gives no token ids"):
        RemoteRollouts(server.url, tiny_tokenizer)


def test_other_tokens_are_refused(server: Server, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Two of the vocabulary's last tokens have changed places; and nobody is there at all."""
    backend = tiny_tokenizer.backend_tokenizer
    file = json.loads(backend.to_str())
    words = file["model"]["vocab"]
    one, other = sorted(words, key=words.get)[-2:]
    words[one], words[other] = words[other], words[one]
    swapped = type(tiny_tokenizer)(tokenizer_object=type(backend).from_str(json.dumps(file)))
    with pytest.raises(ValueError, match="tiny has other tokens than the policy"):
        RemoteRollouts(server.url, swapped)
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:9/v1/models: .*refused"):
        RemoteRollouts("http://127.0.0.1:9", tiny_tokenizer)
