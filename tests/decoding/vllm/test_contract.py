"""Everything private or moving of vLLM that is touched here: where an upgrade changes it, it fails here first."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from llguidance import LLMatcher, LLTokenizer, grammar_from
from vllm import LLM, SamplingParams
from vllm.config import ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.generate.base import protocol
from vllm.entrypoints.launchers import cli_args
from vllm.entrypoints.launchers.api_server.entry import build_and_serve
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.entrypoints.openai.chat_completion.api_router import create_chat_completion
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.api_router import create_completion
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.utils import api_utils
from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMValidationError
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.sample import sampler
from vllm.v1.sample.logits_processor import interface as first
from vllm.v1.structured_output import backend_guidance, backend_xgrammar
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.structured_output.request import get_structured_output_key
from vllm.v1.worker.gpu.sample.logits_processor import interface as second
from vllm.v1.worker.worker_base import WorkerBase

from align.decoding.vllm.processor import AlignProcessor, AlignWorker
from align.decoding.vllm.settings import LOGPROBS, PLAIN


def names(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def fields(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def test_the_first_runners_interface() -> None:
    assert names(first.LogitsProcessor.__init__) == ["vllm_config", "device", "is_pin_memory"]
    assert names(first.LogitsProcessor.apply) == ["logits"]
    assert names(first.LogitsProcessor.update_state) == ["batch_update"]
    assert names(first.LogitsProcessor.validate_params) == ["sampling_params"]
    assert first.LogitsProcessor.__abstractmethods__ == {"__init__", "apply", "is_argmax_invariant", "update_state"}
    assert list(first.BatchUpdate.__dataclass_fields__) == ["batch_size", "removed", "added", "moved"]
    assert [way.name for way in first.MoveDirectionality] == ["UNIDIRECTIONAL", "SWAP"]
    assert first.AddedRequest.__args__[:2] == (int, SamplingParams)
    assert "removed, added, moved" in inspect.getsource(first.BatchUpdate)


def test_the_second_runners_interface() -> None:
    assert names(second.LogitsProcessor.__init__) == ["vllm_config", "req_states"]
    assert names(second.LogitsProcessor.apply) == ["logits", "ctx"]
    assert names(second.LogitsProcessor.add_request) == ["req_idx", "sampling_params"]
    assert names(second.LogitsProcessor.validate_params) == ["sampling_params"]
    assert second.LogitsProcessor.__abstractmethods__ == {"apply"}
    assert {"all_token_ids", "prompt_len"} <= fields(second.LogitsProcRequestState)
    assert {"idx_mapping_np", "seq_lens_upper_bound_np"} <= fields(second.LogitsContext)


def test_one_class_is_taken_by_both_loaders() -> None:
    from vllm.v1.sample.logits_processor import cached_load_custom_logitsprocs
    from vllm.v1.worker.gpu.sample.logits_processor.loader import build_custom_logits_processors_params_validator

    path = "align.decoding.vllm.processor:AlignProcessor"
    assert cached_load_custom_logitsprocs((path,)) == [AlignProcessor]
    validate = build_custom_logits_processors_params_validator((path,))
    validate(SamplingParams())
    with pytest.raises(VLLMValidationError, match="give a seed"):
        validate(SamplingParams(extra_args={"align": {}}))
    assert not AlignProcessor.is_argmax_invariant(None)  # type: ignore[arg-type]


def test_sampling_parameters() -> None:
    found = {field.name for field in msgspec.structs.fields(SamplingParams)}
    ours = {"n", "temperature", "top_k", "top_p", "seed", "max_tokens", "extra_args", "structured_outputs"}
    sent = {"stop_token_ids", "ignore_eos", "detokenize", "output_kind", "skip_clone"}
    assert found >= ours | sent | set(PLAIN) | set(LOGPROBS)
    plain = SamplingParams()
    assert all(getattr(plain, name) in (value, None, []) for name, value in PLAIN.items())
    assert {kind.name for kind in RequestOutputKind} >= {"DELTA", "FINAL_ONLY"}
    # What does not change the law, or is looked at: a field that comes anew has to be put on one side.
    harmless = {"stop", "include_stop_str_in_output", "stream_interval", "flat_logprobs", "prompt_logprob_start"}
    harmless |= {"skip_special_tokens", "spaces_between_special_tokens", "output_text_buffer_length"}
    harmless |= {"skip_reading_prefix_cache", "repetition_detection", "routed_experts_prompt_start", "watermarking"}
    public = {name for name in found if not name.startswith("_")}
    assert public == ours | sent | set(PLAIN) | set(LOGPROBS) | harmless


def test_validation_errors_are_the_clients() -> None:
    assert issubclass(VLLMValidationError, VLLMClientError)
    assert not issubclass(VLLMClientError, ValueError)


def test_outputs() -> None:
    assert {"token_ids", "logprobs", "finish_reason"} <= fields(CompletionOutput)
    given = names(RequestOutput.__init__)
    assert {"request_id", "outputs", "finished", "num_cached_tokens"} <= set(given)
    assert "logprob" in (Logprob.__annotations__ or fields(Logprob))


def test_the_engine() -> None:
    assert names(LLMEngine.abort_request)[0] == "request_ids"
    assert names(LLMEngine.add_request)[:3] == ["request_id", "prompt", "params"]
    assert {"step", "get_num_unfinished_requests", "has_unfinished_requests"} <= set(dir(LLMEngine))
    source = inspect.getsource(LLMEngine.__init__)
    for attribute in ("vllm_config", "model_config", "engine_core"):
        assert f"self.{attribute} = " in source or f"self.{attribute}: " in source
    assert names(LLM.collective_rpc)[:3] == ["method", "timeout", "args"]
    assert "self.llm_engine = " in inspect.getsource(LLM.__init__)
    wanted = {"logits_processors", "worker_extension_cls", "logprobs_mode", "additional_config"}
    wanted |= {"enable_prefix_caching", "disable_log_stats", "kv_cache_memory_bytes", "enforce_eager", "block_size"}
    assert fields(EngineArgs) >= wanted | {"max_model_len", "max_num_seqs", "dtype", "scheduler_cls"}
    assert fields(VllmConfig) >= {"speculative_config", "additional_config", "model_config", "scheduler_config"}
    assert {"logprobs_mode", "tokenizer", "tokenizer_revision", "trust_remote_code"} <= fields(ModelConfig)
    assert {"get_vocab_size", "try_get_generation_config"} <= set(dir(ModelConfig))
    assert "max_num_seqs" in fields(SchedulerConfig)
    assert "worker_extension_cls" in fields(ParallelConfig)
    assert "_preempt_request" in dir(Scheduler)  # a test's


def test_the_worker_is_extended_without_a_clash() -> None:
    """One class is made of both, and names that the worker has are refused."""
    own = {name for name in dir(AlignWorker) if not name.startswith("__")}
    assert own == {"align_pop", "align_refused", "align_waiting"}
    assert not own & set(dir(WorkerBase))


def test_the_client_and_its_plugins() -> None:
    assert names(EngineClient.generate)[:3] == ["prompt", "sampling_params", "request_id"]
    assert names(AsyncLLM.generate)[:3] == ["prompt", "sampling_params", "request_id"]
    assert names(AsyncLLM.collective_rpc)[:3] == ["method", "timeout", "args"]
    assert names(EndpointPlugin.attach_router) == ["app"]
    assert names(EndpointPlugin.init_state) == ["engine_client", "state", "args"]
    assert set(EndpointPlugin.__annotations__) == {"name", "required_tasks"}


def test_what_the_processor_puts_in_the_samplers_place() -> None:
    assert names(sampler.batched_count_greater_than) in (["x", "values"], ["logprobs", "of"])
    assert "batched_count_greater_than(" in inspect.getsource(sampler)


def test_what_copies_take_their_blocks_by() -> None:
    """Where a version has another of these, copies are computed, or nothing starts."""
    assert issubclass(AsyncScheduler, Scheduler)
    assert "_get_local_prefix_cache_hit" not in vars(AsyncScheduler)
    assert names(Scheduler._get_local_prefix_cache_hit) == ["request"]
    assert names(KVCacheManager.prefix_cache_lookup_enabled) == ["request"]
    lookup = names(SingleTypeKVCacheManager._has_partial_local_hit)
    assert lookup == ["new_computed_blocks", "num_local_computed_tokens"]
    assert names(KVCacheBlocks) == ["blocks"]


def test_the_server_and_its_handlers() -> None:
    """What is started in the place of ``vllm serve``, and what its routes are asked for."""
    assert names(build_and_serve)[:4] == ["engine_client", "listen_address", "sock", "args"]
    assert names(setup_server) == ["args", "reuse_port"]
    given = {"vllm_config", "usage_context", "disable_log_stats", "enable_log_requests"}
    assert set(names(AsyncLLM.from_vllm_config)) >= given
    assert names(AsyncLLM.shutdown) == ["timeout"]
    assert names(OpenAIServingChat.render_chat_request) == ["request"]
    assert names(OpenAIServingCompletion.render_completion_request) == ["request"]
    assert names(OpenAIServingCompletion.create_error_response)[0] == "message"
    assert names(OpenAIServingModels.model_name) == ["lora_request"]
    for handler in (create_chat_completion, create_completion):
        assert names(handler) == ["request", "raw_request"]
    assert all("vllm_xargs" in kind.model_fields for kind in (ChatCompletionRequest, CompletionRequest))
    source = inspect.getsource(api_utils)  # a request whose time is up is stopped as one whose client has gone
    assert "listen_for_disconnect(request)" in inspect.getsource(api_utils.with_cancellation)
    assert 'message["type"] == "http.disconnect"' in source
    assert {"make_arg_parser", "validate_parsed_serve_args"} <= set(dir(cli_args))
    assert {"cli_env_setup", "validate_json_request"} <= set(dir(api_utils))


def test_where_structured_outputs_are_read() -> None:
    """They are compiled elsewhere first, so that the loop needs not: by the name that is looked up at each request."""
    assert names(backend_guidance.validate_guidance_grammar) == ["sampling_params", "tokenizer"]
    source = inspect.getsource(SamplingParams._validate_structured_outputs)
    assert "from vllm.v1.structured_output.backend_guidance import (" in source
    assert names(backend_xgrammar.validate_xgrammar_grammar) == ["sampling_params"]
    source = inspect.getsource(protocol.validate_structural_tag_payload)
    assert "from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar" in source
    assert names(get_structured_output_key) == ["params"]
    kinds = {"JSON", "JSON_OBJECT", "REGEX", "GRAMMAR", "CHOICE", "STRUCTURAL_TAG"}
    assert {kind.name for kind in StructuredOutputOptions} == kinds
    assert names(GracefulHTTPError) == ["message", "http_status"]
    assert not issubclass(GracefulHTTPError, VLLMClientError)
    tag = {"triggers": ["<f"], "structures": [{"begin": "<f>", "schema": {"type": "integer"}, "end": "</f>"}]}
    wrong = backend_guidance.serialize_guidance_grammar(StructuredOutputOptions.STRUCTURAL_TAG, json.dumps(tag))
    matcher = LLMatcher(LLTokenizer("byte"), grammar_from("grammar", wrong), log_level=0)
    assert matcher.try_consume_tokens(list(b'<f>"a"</f>')) == 10  # why they are made grammars before
