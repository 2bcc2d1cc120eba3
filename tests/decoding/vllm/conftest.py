"""One engine of vLLM for the session: a tiny model in float32, few blocks of cache, and prompts in small chunks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_PLUGINS"] = ""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align.decoding.constraints import Vocabulary
from align.decoding.engines import TransformersEngine
from align.decoding.engines.vllm import VLLMEngine
from align.decoding.request import Answer

HERE = Path(__file__).parent
END = 4
WORDS = ["a", "b", "ab", "<pad>", "<end>"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What uses the engine runs where it is, one a session."""
    for item in items:
        if item.path.is_relative_to(HERE) and "engine" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.serving)


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary([b"a", b"b", b"ab", None, None], frozenset({END}))


@pytest.fixture(scope="session")
def model() -> Any:
    """Few tokens and flat laws, so that everything can be enumerated and some thousand draws meet it all."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=5,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>").save_pretrained(path)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def engine(folder: Path) -> Iterator[VLLMEngine]:
    """24 blocks of 32 tokens: 40 sequences of 90 tokens do not fit, and vLLM has to put some aside."""
    made = VLLMEngine(
        folder,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=64,
        enable_chunked_prefill=True,
        max_num_batched_tokens=64,
        block_size=32,
        num_gpu_blocks_override=24,
        kv_cache_memory_bytes=1 << 26,
    )
    yield made
    made.llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="session")
def outside(model: Any) -> TransformersEngine:
    return TransformersEngine(model)


@pytest.fixture
def predicates(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module ``vllm_predicates``, which constraints import by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import vllm_predicates

    vllm_predicates.CALLS.clear()
    return vllm_predicates


@pytest.fixture
def nothing_is_left(engine: VLLMEngine) -> Iterator[None]:
    """After every test vLLM has no request, running or waiting, and no record waits to be fetched."""
    yield
    core = engine.llm.llm_engine.engine_core.engine_core
    assert engine.llm.llm_engine.get_num_unfinished_requests() == 0
    assert not core.scheduler.requests
    assert engine.llm.collective_rpc("align_waiting") == [0]


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """``assert_same(found, expected)``: the same samples from the same questions, the same weights up to float32."""

    def compare(found: Sequence[Answer], expected: Sequence[Answer], within: float = 2e-4) -> None:
        for one, other in zip(found, expected, strict=True):
            assert one.reason == other.reason
            assert one.result is not None
            assert other.result is not None
            assert [sample.tokens for sample in one.result.samples] == [
                sample.tokens for sample in other.result.samples
            ]
            weights = [sample.log_weight for sample in other.result.samples]
            assert [sample.log_weight for sample in one.result.samples] == pytest.approx(weights, abs=within)
            assert one.result.log_normaliser == pytest.approx(other.result.log_normaliser, abs=within)
            assert one.result.resamplings == other.result.resamplings
            assert one.valid == other.valid

    return compare
