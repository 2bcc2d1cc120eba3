"""Clients of ``align serve``: how fast it answers, and whether it stands what comes in besides."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from serving_ways import DTYPE, LONGEST, MODEL, PLACES, RECORD, person, story

SHORT = RECORD.replace("+", "{1,8}")
"""Records that always fit: good requests must all be answered."""
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bob", "Cem"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
DEEP: dict[str, Any] = {"type": "string"}
for _ in range(60):
    DEEP = {"type": "object", "properties": {"a": DEEP}, "required": ["a"], "additionalProperties": False}
HEAVY = {"allOf": [{"type": "string", "pattern": f".*{letter}.*"} for letter in "abcdefghijklmnop"]}
REWARD = "everyday=align.rewards.rules:everyday_answer"
TRIES = 40
Way = Callable[[int], Awaitable[tuple[str, int]]]
"""Sends a request of a number; what was wrong with the reply, if anything, and how many tokens were drawn for it."""


@contextmanager
def server(port: int | None = None, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """``align serve``, from when it is healthy; its log is in the folder for temporary files."""
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    command = [sys.executable, "-m", "align", "serve", MODEL, "--port", str(port), "--dtype", DTYPE]
    command += ["--max-model-len", "1024", "--max-num-seqs", "64", "--reward", REWARD, *options]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "ALIGN_API_KEY": ""}  # for align_waiting by RPC
    log = Path(tempfile.gettempdir()) / f"align-serve-{port}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"align serve ended with {process.returncode}: {log}")
            with suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            time.sleep(0.5)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def tree(process: psutil.Process) -> list[psutil.Process]:
    """The server and what it has started."""
    return [process, *process.children(recursive=True)]


def resident(process: psutil.Process) -> list[int]:
    """MiB of each of its processes, the first one first and its descendants after it."""
    return [one.memory_info().rss >> 20 for one in tree(process)]


def cpu(process: psutil.Process) -> float:
    """Seconds of all its processes."""
    return sum(sum(one.cpu_times()[:2]) for one in tree(process))


class Client:
    """What is sent, and what must come back."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http
        self.busy = 0

    async def post(self, path: str, body: Any, **settings: Any) -> httpx.Response:
        """A reply; one that says to come back later is taken at its word."""
        for _ in range(TRIES):
            reply = await self.http.post(path, json=body, **settings)
            if reply.status_code != 429:
                return reply
            self.busy += 1
            await asyncio.sleep(float(reply.headers.get("Retry-After", 1)))
        return reply

    async def chat(self, text: str, settings: dict[str, Any] | None, **more: Any) -> httpx.Response:
        """A chat of one message, with our settings as their text."""
        xargs = {} if settings is None else {"vllm_xargs": {"align": json.dumps(settings)}}
        return await self.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **xargs, **more}
        )

    async def plain(self, number: int, **more: Any) -> tuple[str, int]:
        """Without us."""
        reply = await self.chat(story(number), None, max_tokens=LONGEST, ignore_eos=True, **more)
        if reply.status_code != 200:
            return f"plain: {reply.status_code} {reply.text[:200]}", 0
        tokens = int(reply.json()["usage"]["completion_tokens"])
        return ("" if tokens == LONGEST else f"plain: {tokens} tokens"), tokens

    async def structured(self, number: int) -> tuple[str, int]:
        """VLLM's own."""
        reply = await self.chat(person(number), None, max_tokens=64, structured_outputs={"regex": SHORT})
        if reply.status_code != 200:
            return f"structured: {reply.status_code} {reply.text[:200]}", 0
        return "", int(reply.json()["usage"]["completion_tokens"])

    async def answer(self, number: int, spec: dict[str, Any], method: str, particles: int) -> tuple[str, int]:
        """By OpenAI's route: valid, with a weight."""
        settings = {"constraint": spec, "method": method, "particles": particles}
        reply = await self.chat(person(number), settings, max_tokens=64, seed=number)
        if reply.status_code != 200:
            return f"{method}: {reply.status_code} {reply.text[:200]}", 0
        found = reply.json()
        text, own = found["choices"][0]["message"]["content"], found["align"]
        if own["log_weight"] is None or own["log_normaliser"] is None or not own["valid"]:
            return f"{method}: no weight in {own}", 0
        return wrong(text, spec), own["usage"]["drawn_tokens"]

    async def stream(self, number: int, spec: dict[str, Any], hang_up: int | None = None) -> tuple[str, int]:
        """By our route, as events; with ``hang_up`` the client goes after so many."""
        body = {"prompt": person(number), "constraint": spec, "particles": 4, "max_tokens": 64, "stream": True}
        events: list[Any] = []
        for _ in range(TRIES):
            async with self.http.stream("POST", "/v1/align/smc", json=body) as reply:
                if reply.status_code == 429:
                    self.busy += 1
                    await asyncio.sleep(float(reply.headers.get("Retry-After", 1)))
                    continue
                if reply.status_code != 200:
                    return f"stream: {reply.status_code} {(await reply.aread())[:200]!r}", 0
                async for line in reply.aiter_lines():
                    if line.startswith("data: "):
                        events.append(line[6:])
                        if hang_up is not None and len(events) >= hang_up:
                            return "", 0
                break
        if len(events) < 2 or events[-1] != "[DONE]":
            return f"stream: no end after {len(events)} events", 0
        last = json.loads(events[-2])
        if last.get("event") != "answer" or not last["valid"]:
            return f"stream: the last event is {events[-2][:200]}", 0
        if sum('"token"' in event for event in events) < last["usage"]["completion_tokens"]:
            return "stream: events are missing", 0
        return wrong(last["text"], spec), last["usage"]["drawn_tokens"]

    async def score(self, number: int) -> tuple[str, int]:
        """Rewards."""
        rows = [{"prompt": story(number), "completion": "Two ships met a storm. Both came home."}] * 3
        reply = await self.post("/v1/align/score", {"reward": "everyday", "rows": rows})
        good = reply.status_code == 200 and len(reply.json()["scores"]) == 3
        return ("" if good else f"score: {reply.status_code} {reply.text[:200]}"), 0

    async def bad(self, kind: str, number: int) -> str:
        """Something that must be refused, or that hangs up; what was wrong with how it was taken."""
        regex = {"method": "awrs", "particles": 1}
        headers = {"content-type": "application/json"}
        if kind == "hang-up in a stream":
            return (await self.stream(number, {"regex": "[a-z ]{200,400}"}, hang_up=3))[0]
        if kind == "hang-up before the answer":
            body = {"prompt": "hi", "constraint": {"regex": "[a-z ]{200,400}"}, "max_tokens": 400}
            with suppress(httpx.TimeoutException):
                await self.http.post("/v1/align/smc", json=body, timeout=httpx.Timeout(30, read=1.0))
            return ""
        match kind:
            case "malformed JSON":
                reply = await self.http.post("/v1/chat/completions", content=b'{"messages": [{"role"', headers=headers)
            case "malformed settings":
                reply = await self.post("/v1/completions", {"prompt": "hi", "vllm_xargs": {"align": "{no"}})
            case "unknown setting":
                reply = await self.chat("hi", {**regex, "constraint": {"regex": "a"}, "particle": 3})
            case "too large a body":
                reply = await self.post("/v1/align/smc", {"prompt": "a" * (3 << 19), "constraint": {"regex": "a"}})
            case "hostile regex":
                spec = {"regex": f"((a{{1,1000}}){{1,1000}}){{1,{1000 + number % 7}}}b"}
                reply = await self.chat("hi", {**regex, "constraint": spec})
            case "backtracking regex":
                spec = {"regex": "(a|a)*" * 8 + f"(x+x+)+y{{{1 + number % 7}}}"}
                reply = await self.chat("hi", {**regex, "constraint": spec}, max_tokens=24)
                return "" if reply.status_code in (200, 400, 422) else f"{kind}: {reply.status_code}"
            case "heavy schema":
                reply = await self.chat("hi", {**regex, "constraint": {"json": {**HEAVY, "title": str(number)}}})
            case "heavy structured output":
                spec = {"json": {**HEAVY, "title": str(number)}}
                reply = await self.chat("hi", None, structured_outputs=spec, max_tokens=24)
            case "deep schema":
                reply = await self.chat("hi", {**regex, "constraint": {"json": DEEP}}, max_tokens=24)
            case "impossible":
                spec = {"all_of": [{"regex": "a[a-z]*"}, {"regex": "b[a-z]*"}]}
                reply = await self.chat("hi", {**regex, "constraint": spec}, max_tokens=24)
            case "no room":
                reply = await self.chat("hi", {**regex, "constraint": {"regex": "[a-z]{50}"}}, max_tokens=3)
            case _:
                raise AssertionError(kind)
        right = reply.status_code in BAD[kind] and "message" in reply.text
        return "" if right else f"{kind}: {reply.status_code} {reply.text[:200]}"


BAD = {
    "malformed JSON": (400,),
    "malformed settings": (400,),
    "unknown setting": (400,),
    "too large a body": (413,),
    "hostile regex": (200, 400, 422),
    "backtracking regex": (),
    "heavy schema": (400,),
    "heavy structured output": (400,),
    "deep schema": (400, 422),
    "impossible": (422,),
    "no room": (422,),
    "hang-up in a stream": (),
    "hang-up before the answer": (),
}


def wrong(text: str, spec: dict[str, Any]) -> str:
    """Why the text is not what the constraint says, by other means than ours."""
    if "regex" in spec:
        return "" if re.fullmatch(spec["regex"], text) else f"{text!r} does not match"
    if "words" in spec:
        return "" if text in spec["words"] else f"{text!r} is not among the words"
    try:
        found = json.loads(text)
    except ValueError as error:
        return f"{text!r}: {error}"
    right = found.get("name") in ("Ann", "Bob", "Cem") and 0 <= found.get("age", -1) <= 99 and len(found) == 2
    return "" if right else f"{text!r} is not of the schema"


def goods(client: Client) -> list[Way]:
    """Kinds of good requests."""
    return [
        client.plain,
        lambda n: client.answer(n, {"regex": SHORT}, "awrs", 1),
        lambda n: client.answer(n, {"json": SCHEMA}, "awrs-smc", 4),
        lambda n: client.stream(n, {"regex": SHORT}),
        client.score,
        lambda n: client.answer(n, {"words": PLACES}, "awrs", 2),
        lambda n: client.answer(n, own_constraint(n), "awrs", 1),
    ]


def own_constraint(number: int) -> dict[str, Any]:
    """One that nobody has sent before, so that it must be compiled while hostile ones are."""
    if number % 2:
        return {"regex": SHORT.replace("[1-9][0-9]?", f"({number}|[1-9][0-9]?)")}
    return {"json": {**SCHEMA, "title": str(number)}}


async def left(http: httpx.AsyncClient) -> dict[str, float]:
    """What is under way in the server, and the records that nobody has fetched."""
    text = (await http.get("/metrics")).text
    found = {}
    for name in ("align_particles_running", "align_particles_waiting", "vllm:num_requests_running"):
        match = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        found[name] = float(match[1]) if match else float("nan")
    reply = await http.post("/collective_rpc", json={"method": "align_waiting"})
    found["records"] = float(sum(map(int, reply.json()["results"])))
    return found


async def fill(http: httpx.AsyncClient) -> int:
    """Touch the whole cache of keys and values, memory that the system gives at its first use; its tokens."""
    text = (await http.get("/metrics")).text
    found = {name: int(re.search(rf'[{{,]{name}="(\d+)"', text)[1]) for name in ("num_gpu_blocks", "block_size")}  # type: ignore[index]
    tokens = found["num_gpu_blocks"] * found["block_size"]
    rng = random.Random(0)
    prompts = [[rng.randrange(1000, 40_000) for _ in range(1000)] for _ in range(tokens // 1000 + 1)]
    for prompt in prompts:
        await http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1})
    return tokens


async def speed(
    url: str, process: psutil.Process, rounds: int, counts: dict[int, int], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Closed loops of 1, 8 and 32 clients, kinds of requests in turns."""
    rows = []
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=64)) as http:
        client = Client(http)
        ways: dict[str, Way] = {
            "unconstrained, temperature 1": lambda n: client.plain(n, temperature=1.0),
            "structured output, record regex": client.structured,
            "AWRS, record regex": lambda n: client.answer(n, {"regex": SHORT}, "awrs", 1),
            "AWRS, JSON schema": lambda n: client.answer(n, {"json": SCHEMA}, "awrs", 1),
            "AWRS-SMC, 8 particles, record regex": lambda n: client.answer(n, {"regex": SHORT}, "awrs-smc", 8),
        }
        for way in ways.values():
            await way(0)
        for turn, (at, count) in itertools.product(range(rounds), counts.items()):
            for name, way in ways.items():
                numbers, waits, tokens, faults = iter(range(count)), list[float](), 0, list[str]()

                async def ask(way: Any = way, numbers: Any = numbers, waits: Any = waits, faults: Any = faults) -> int:
                    drawn = 0
                    for number in numbers:
                        began = time.perf_counter()
                        fault, some = await way(number)
                        waits.append(time.perf_counter() - began)
                        drawn += some
                        faults += [fault] if fault else []
                    return drawn

                began, worked = time.perf_counter(), cpu(process)
                tokens = sum(await asyncio.gather(*(ask() for _ in range(at))))
                made = {"wall": time.perf_counter() - began, "cpu": cpu(process) - worked, "tokens": tokens}
                rows.append(
                    {"part": "http", "way": name, "at": at, "round": turn, **made, "waits": waits, "faults": faults}
                )
                say(f"http {at} {name}: {tokens / made['wall']:.0f} tokens/s {faults[:1]}")
    return rows


class Crowd:
    """Clients that send one request after another, every tenth of them bad.

    Args:
        client: by which they all send.
        say: told of what was wrong.
    """

    def __init__(self, client: Client, say: Callable[[str], None]) -> None:
        self._client, self._say, self._kinds = client, say, goods(client)
        self.good, self.bad, self.faults = Counter[str](), Counter[str](), list[str]()
        self.waits: list[float] = []

    async def warm_up(self) -> None:
        """Each kind of good requests twice; those with constraints of their own have others later."""
        for number in range(2 * len(self._kinds)):
            await self._kinds[number % len(self._kinds)](number)

    async def run(self, clients: int, over: Callable[[int], bool]) -> None:
        """So many clients, each until it is over after as many requests as it has sent."""
        await asyncio.gather(*(self._one(place, over) for place in range(clients)))

    async def _one(self, place: int, over: Callable[[int], bool]) -> None:
        kinds = self._kinds
        bads = itertools.cycle([*BAD][place % len(BAD) :] + [*BAD][: place % len(BAD)])
        for turns in itertools.count():
            if over(turns):
                return
            turn = place + turns
            number, sent = 1000 * place + turn, time.perf_counter()
            kind = next(bads) if turn % 10 == 9 else f"good {turn % len(kinds)}"
            try:
                if kind in BAD:
                    fault = await self._client.bad(kind, number)
                    self.bad[kind] += 1
                else:
                    fault, _ = await kinds[turn % len(kinds)](number)
                    self.waits.append(time.perf_counter() - sent)
                    self.good[kind] += 1
            except Exception as error:
                fault = f"{kind}: {type(error).__name__}: {error}"
            if fault:
                self.faults.append(fault)
                self._say(fault)


async def load(
    url: str, process: psutil.Process, minutes: float, say: Callable[[str], None], clients: int = 32
) -> dict[str, Any]:
    """``clients`` clients, one request in ten bad; then nothing may be left."""
    memory: list[tuple[float, list[int]]] = []
    limits = httpx.Limits(max_connections=2 * clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        client = Client(http)
        crowd = Crowd(client, say)
        say(f"{await fill(http):,} tokens of the cache touched")
        await crowd.warm_up()
        began = time.monotonic()
        until = began + 60 * minutes

        async def watch() -> None:
            while time.monotonic() < until:
                memory.append((time.monotonic() - began, resident(process)))
                say(f"{memory[-1][0]:.0f} s: {memory[-1][1]} MiB, {crowd.good.total()} good, {crowd.bad.total()} bad")
                await asyncio.sleep(15)

        await asyncio.gather(watch(), crowd.run(clients, lambda turns: time.monotonic() > until))
        seconds = time.monotonic() - began
        remaining: dict[str, float] = {}
        for _ in range(60):
            remaining = await left(http)
            if not any(remaining.values()):
                break
            await asyncio.sleep(0.5)
        memory.append((time.monotonic() - began, resident(process)))
    return {
        "part": "load",
        "clients": clients,
        "seconds": seconds,
        "good": crowd.good.total(),
        "bad": dict(crowd.bad),
        "faults": crowd.faults,
        "waits": crowd.waits,
        "busy": client.busy,
        "left": remaining,
        "memory": memory,
    }
