"""One real server, and a real browser that is told what to do over Chromium's debugging protocol."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import httpx
import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from websockets.sync.client import ClientConnection, connect

if TYPE_CHECKING:
    from openai import OpenAI

MODULE = """
import time
from pathlib import Path

time.sleep(5 * Path(__file__).with_suffix(".slow").exists())

def short(prompts, completions):
    return [-float(len(text)) for text in completions]

def same(completions, solution, **columns):
    return [float(text == right) for text, right in zip(completions, solution)]

def only_empty(text, complete):
    return {"": True}[text]

def no_zero(text, complete):
    return "0" not in text

def hangs(text, complete):
    time.sleep(60 * ("b" in text))
    return True

def picky(prompts, completions):
    raise ValueError("no such prompt")
"""


@dataclass
class Server:
    """Where it is, and how it is asked."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    key: ClassVar = "secret"
    places: ClassVar = 8
    waiting: ClassVar = 8
    plain: ClassVar = 16
    seconds: ClassVar = 6.0

    @property
    def client(self) -> OpenAI:
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60)

    def http(self, **settings: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **settings)

    def post(self, path: str, body: Any) -> httpx.Response:
        with self.http() as client:
            return client.post(path, json=body)

    def smc(self, **settings: Any) -> httpx.Response:
        """Particles."""
        return self.post("/v1/align/smc", {"prompt": "the cat", "max_tokens": 40, "seed": 7, **settings})

    def metric(self, line: str) -> float:
        """The value of a metric by the beginning of its line."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        found = re.search(rf"^{re.escape(line)}[^ ]* (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def failures(self) -> int:
        """How many requests are counted as failures of the server's."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        return sum(
            int(float(one)) for one in re.findall(r'^align_requests_total{.*outcome="error".*} (\S+)$', text, re.M)
        )

    def wait_for(self, line: str, value: float, seconds: float = 10) -> None:
        """Until a metric has a value."""
        end = time.monotonic() + seconds
        while (found := self.metric(line)) != value:
            assert time.monotonic() < end, f"{line} is {found} and not {value}"
            time.sleep(0.05)

    def wait_until_idle(self) -> None:
        """Long before the time of what ran is up."""
        self.wait_for("align_particles_running", 0, seconds=self.seconds / 2)
        self.wait_for("vllm:num_requests_running", 0, seconds=self.seconds / 2)


@pytest.fixture(scope="session")
def model(make_tiny_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """VLLM's attention on a CPU wants heads of 32."""
    return make_tiny_model(hidden_size=128, max_position_embeddings=8192)


@pytest.fixture(scope="session")
def server(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    (folder.parent / "operators.py").write_text(MODULE, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "align", "serve", str(folder), "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "4096", "--max-num-seqs", str(Server.places), "--max-waiting", str(Server.waiting)]
    command += ["--max-plain", str(Server.plain), "--timeout", str(Server.seconds), "--max-body", "100000"]
    for name in ("no_zero", "only_empty", "hangs"):
        command += ["--predicate", f"operators:{name}"]
    for name in ("short", "same", "picky"):
        command += ["--reward", f"{name}=operators:{name}"]
    command += ["--reward", "everyday=align.rewards.rules:everyday_answer"]
    log = folder.parent / "log"
    path = os.pathsep.join(filter(None, [str(folder.parent), os.environ.get("PYTHONPATH")]))
    with log.open("wb") as said:
        process = subprocess.Popen(
            command,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "ALIGN_API_KEY": Server.key,
                "OMP_NUM_THREADS": "1",
                "VLLM_SERVER_DEV_MODE": "1",  # records that nobody has fetched are asked for by RPC
            },
        )
    found = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_until_up(found)
        yield found
    finally:
        process.kill()
        process.wait()


def _wait_until_up(server: Server) -> None:
    end = time.monotonic() + 300
    while True:
        assert server.process.poll() is None, server.log.read_text(encoding="utf-8", errors="replace")[-4000:]
        assert time.monotonic() < end, "the server does not come up"
        try:
            httpx.get(f"{server.url}/health", timeout=5).raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.2)


CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps"),
    *("--remote-debugging-port=0", "--window-size=1200,900"),
)


class Browser:
    """One tab."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self.complaints: list[str] = []
        self.asked: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """A command and its result; what the page complains of meanwhile is kept."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message.get("method", ""), message.get("params", {}))

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait_for(self, script: str, seconds: float = 30) -> Any:
        """Until an expression is truthy."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never: {script}; {self.complaints}"
            time.sleep(0.1)
        return value

    def _note(self, method: str, params: Any) -> None:
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"].get("exception", params)))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append(str(params["args"]))
        elif method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    profile = tmp_path / "profile"
    process = subprocess.Popen(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        told, end = profile / "DevToolsActivePort", time.monotonic() + 60
        while not (told.exists() and "\n" in told.read_text()):
            assert time.monotonic() < end
            time.sleep(0.1)
        port = told.read_text().split()[0]
        pages = httpx.get(f"http://127.0.0.1:{port}/json/list", trust_env=False, timeout=60).json()
        (page,) = [page for page in pages if page["type"] == "page"]
        with connect(page["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        process.wait(timeout=30)
