"""Where Transfer-Q*'s baseline runs when the policy is in vLLM: its engine, an adapter there, a second one, a server.

The policy's engine is started with ``Place.options``, and the baseline after it by ``rollouts_of``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.decoding.engines import Rollouts
from align.decoding.engines.remote import RemoteRollouts
from align.errors import AlignError
from align.models.load import ADAPTER_CONFIG, locate, origin_of
from align.serve.models import served

if TYPE_CHECKING:
    from align.decoding.engines.vllm import VLLMEngine

Way = Literal["same", "adapter", "engine", "server"]
SHARE = 0.45
"""Of a GPU's memory, for each of two engines."""
UNUSUAL = ("use_dora", "modules_to_save", "trainable_token_indices", "rank_pattern", "lora_bias", "target_parameters")
"""Settings of an adapter that vLLM does not apply, or not as PEFT does."""


@dataclass(frozen=True)
class Place:
    """Where a baseline runs.

    Args:
        way: the policy's own engine, an adapter in it, a second engine, or a server.
        why: in words for a log.
        path: URL, adapter folder, or what ``served`` reads.
        options: that the policy's engine is started with.
    """

    way: Way
    why: str
    path: str
    options: Mapping[str, Any] = field(default_factory=dict)


def is_url(baseline: str) -> bool:
    """Whether it is a server and not a model."""
    return baseline.startswith(("http://", "https://"))


def place_of(model: str, baseline: str, device: Literal["cpu", "cuda"]) -> Place:
    """The place that is best on the device.

    Args:
        model: the policy, as ``align generate --model`` reads it.
        baseline: the same, or a URL.
        device: what vLLM computes on.
    """
    if is_url(baseline):
        return Place("server", f"the server at {baseline}", baseline)
    if baseline == model:
        return Place("same", "the policy's own engine: it is its own baseline", baseline)
    if device == "cpu":
        why = "a second engine in this process: on a CPU an adapter beside its base takes some three times as long"
        return Place("engine", why, baseline)
    adapter = _adapter_of(model, baseline)
    if adapter is None:
        why = "a second engine in this process: it is no plain LoRA adapter of the policy's model"
        return Place("engine", why, baseline, {"gpu_memory_utilization": SHARE})
    rank = json.loads((adapter / ADAPTER_CONFIG).read_text())["r"]
    ranks = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM knows
    options = {"enable_lora": True, "max_lora_rank": next((known for known in ranks if rank <= known), rank)}
    return Place("adapter", "an adapter in the policy's engine: one model in the GPU's memory", str(adapter), options)


def rollouts_of(place: Place | None, policy: VLLMEngine, tokenizer: Any) -> Rollouts | None:
    """The baseline, started where it needs to be; None without a place.

    Raises:
        AlignError: it cannot be loaded or reached, or it has other tokens than the policy.
    """
    if place is None:
        return None
    if place.way == "same":
        return policy
    if place.way == "adapter":
        return policy.adapted(place.path)
    if place.way == "server":
        return server(place.path, tokenizer)
    from .inside import start

    config = policy.llm.llm_engine.model_config
    dtype = str(config.dtype).removeprefix("torch.")
    made = start(served(place.path, dtype), dtype=dtype, **place.options)
    if made.vocabulary.tokens != policy.vocabulary.tokens:
        raise AlignError(other_tokens(place.path, config.model))
    return made


def server(url: str, tokenizer: Any) -> Rollouts:
    """The model behind a URL; the key is in ALIGN_API_KEY.

    Raises:
        AlignError: it cannot be reached, or has other tokens than the policy.
    """
    try:
        return RemoteRollouts(url, tokenizer, key=os.environ.get("ALIGN_API_KEY"))
    except (ValueError, ConnectionError) as error:
        raise AlignError(f"--transfer-q: {error}") from error


def other_tokens(baseline: str, model: str) -> str:
    """What is said where the two models do not fit."""
    return (
        f"{baseline}: its tokens are not those of {model}; a baseline goes on from the model's own tokens, so give "
        "one that was trained from it, or that has the same tokenizer"
    )


def _adapter_of(model: str, baseline: str) -> Path | None:
    """The folder of the baseline's adapter, if it is one of the policy's model that vLLM can apply as it is."""
    folder, origin = Path(baseline).expanduser(), origin_of(baseline)
    adapter = folder if (folder / ADAPTER_CONFIG).is_file() else folder / "adapter"
    if origin is None or origin.adapter or not (adapter / ADAPTER_CONFIG).is_file():
        return None
    if origin_of(model) is not None or locate(origin.name) != locate(model):
        return None
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    plain = (
        config["peft_type"] == "LORA" and config["bias"] == "none" and not any(config.get(name) for name in UNUSUAL)
    )
    return adapter if plain else None
