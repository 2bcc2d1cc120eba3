"""Tiny models and tokenizers, made on the spot: nothing in a test touches the network."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align.losses import LOSSES

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_collection_finish() -> None:
    """What was imported stays: collections of garbage that look through it take half of the time of a run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What runs keep in Align's cache goes when the tests end, and is nobody else's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def table_as_before() -> Iterator[None]:
    """The losses that a test enters are taken out again."""
    before = dict(LOSSES)
    yield
    LOSSES.clear()
    LOSSES.update(before)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer: 256 bytes, a few merges that cross a word boundary, and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("Ġ", "a"), ("Ġ", "the"), ("e", "r")]
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    model = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def make_tiny_model(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaForCausalLM]:
    """``make_tiny_model(seed=0, **config)``: a random Llama; the same seed gives the same weights."""

    def make(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
        config = LlamaConfig(
            **{
                "vocab_size": len(tiny_tokenizer),
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "initializer_range": 0.2,
                "bos_token_id": tiny_tokenizer.bos_token_id,
                "eos_token_id": tiny_tokenizer.eos_token_id,
                "pad_token_id": tiny_tokenizer.pad_token_id,
                **overrides,
            }
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def tiny_model_dir(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_tokenizer: PreTrainedTokenizerFast,
    make_tiny_model: Callable[..., LlamaForCausalLM],
) -> Path:
    """A folder with the tiny model (seed 0) and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-model")
    make_tiny_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def alone(function: Callable[[], Any]) -> None:
    """In a forked process: as if it had been started anew, on one thread, and not yet been a part of any group."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    function()


class Forked(ForkProcess):
    """A process of its own that has imported what this one has, which takes a command seconds to do.

    Its standard error goes to the file ``said``. Ctrl-C interrupts it.
    """

    def __init__(self, function: Callable[[], Any], said: Path) -> None:
        super().__init__(target=alone, args=(function,))
        self.said = said

    def run(self) -> None:
        os.dup2(os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        super().run()


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes this process compute as a forked one does, to the last bit."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fork(tmp_path: Path, one_thread: None) -> Iterator[Callable[[Callable[[], Any]], Forked]]:
    """``fork(function)`` runs it in a process of its own, which the test may kill."""
    started: list[Forked] = []

    def start(function: Callable[[], Any]) -> Forked:
        started.append(Forked(function, tmp_path / f"said-{len(started)}"))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def two_processes(one_thread: None) -> Callable[[Callable[[], Any]], None]:
    """``two_processes(function)`` runs it in both processes of a group over gloo, by torchrun's own launcher."""

    def launch(function: Callable[[], Any]) -> None:
        settings = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "test", "max_restarts": 0}
        elastic_launch(LaunchConfig(1, 1, 2, start_method="fork", **settings), alone)(function)

    return launch
