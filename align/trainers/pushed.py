"""Answers of the policy in training, drawn by a vLLM in the same process that is given its weights.

    draws = Pushed(start("folder/of/the/base/model", dtype="bfloat16", ends=ends))
    draws.push(model)
    samples = draws(prompts, seeds=seeds, max_new_tokens=64)

What is drawn is what the weights say in the engine's type: where that is bfloat16 and training is in float32, a little
other law than the one whose log-probs the losses compare. A mixture of two models cannot be drawn by vLLM.
"""

from __future__ import annotations

import os
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora.layer import Embedding, Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from align.decoding.law import Law
from align.errors import AlignError
from align.evals.sampling import Sample

if TYPE_CHECKING:
    from align.decoding.engines.vllm import VLLMEngine

COLUMNS = 8
"""Of each matrix, drawn anew at each push, that are compared."""
SHARE = 0.3
"""Of a GPU's memory for vLLM: weights, keys and values. Training has the rest."""


def start(model: str | Path, *, dtype: str, ends: Collection[int], **options: Any) -> VLLMEngine:
    """An engine with a model's architecture and weights of no meaning, for ``Pushed``; random states stay as they are.

    Args:
        model: folder of a causal model with its tokenizer, or a hub id.
        dtype: in which vLLM computes.
        ends: ids of end tokens.
        options: further arguments of ``VLLMEngine``.

    Raises:
        AlignError: vLLM is missing or does not start with this model, or training is of several processes.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise AlignError("vLLM draws in the process that trains, and there are several: train in one, or without vLLM")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from align.decoding.engines.vllm import VLLMEngine

    shared: dict[str, Any] = {"gpu_memory_utilization": SHARE} if torch.cuda.is_available() else {}
    shared["threads"] = torch.get_num_threads()  # training's, too
    states = random.getstate(), np.random.get_state()  # vLLM seeds all that are in its process
    try:
        with torch.random.fork_rng():
            return VLLMEngine(
                model, ends=ends, **{"dtype": dtype, "max_model_len": -1, "load_format": "dummy", **shared, **options}
            )
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        raise AlignError(f"{model}: vLLM does not start: {error}") from error
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class Pushed:
    """Draws by an engine, with the weights that were pushed last.

    Args:
        engine: in this process, and on one device; nobody else uses it. Its ``vocabulary.ends`` end answers.

    Raises:
        AlignError: the engine is elsewhere.
    """

    def __init__(self, engine: VLLMEngine) -> None:
        self._llm = engine.llm
        inner = engine.llm.llm_engine
        world = inner.vllm_config.parallel_config.world_size
        if not hasattr(inner.engine_core, "engine_core") or world > 1:
            raise AlignError(
                "weights are pushed to a vLLM in this process and on one device: start it with "
                f"VLLM_ENABLE_V1_MULTIPROCESSING=0 and without parallelism (it has {world} workers)"
            )
        self._engine = engine
        self._dtype: torch.dtype = inner.model_config.dtype
        self._tokenizer = engine.llm.get_tokenizer()
        self._pushes = count()
        self._ready = False

    def push(self, model: nn.Module) -> None:
        """Give the engine the weights of a model, one by one, with what its LoRA adapters that are on add to them.

        Sums are taken in float32 and rounded once to the engine's type; the model is left as it is. Then what the
        engine answers to one-hot inputs of each layer, which are columns of the matrix that it computes with, has to
        be what was sent, to the bit: ``COLUMNS`` of each matrix, drawn anew each time, and every vector as a whole.

        Raises:
            AlignError: the model's weights cannot be merged, or vLLM does not take them or holds others; it then draws
                nothing until a push succeeds.
        """
        self._ready = False
        if self._llm.llm_engine.has_unfinished_requests():
            raise AlignError("vLLM is at work: weights cannot be pushed before its requests end")
        sent = _Sent(next(self._pushes))
        weights = sent.remember(merged(model, self._dtype))
        try:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        except (AssertionError, AttributeError, KeyError, RuntimeError, ValueError) as error:
            raise AlignError(f"vLLM does not take the model's weights: {type(error).__name__}: {error}") from error
        if not self._llm.reset_prefix_cache():
            raise AlignError("vLLM keeps what it computed with the last weights: its prefix cache cannot be emptied")
        (problems,) = self._llm.apply_model(sent.differences)
        if problems:
            more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise AlignError(
                f"vLLM does not hold the weights that were sent: {'; '.join(problems[:3])}{more}; draw with "
                "transformers instead"
            )
        self._ready = True

    def __call__(self, prompts: Sequence[Sequence[int]], *, seeds: Sequence[int], max_new_tokens: int) -> list[Sample]:
        """One answer a prompt at temperature 1, without top-p or top-k.

        Args:
            prompts: token ids.
            seeds: one a prompt; equal prompts need different ones to have different answers.
            max_new_tokens: longest answer; shorter where the engine's context ends.

        Raises:
            AlignError: nothing was pushed, or a prompt fills the context. ValueError: as ``Rollouts.rollouts``.
        """
        if not self._ready:
            raise AlignError("vLLM has no weights of the policy: push them first")
        made = self._engine.rollouts(
            prompts, max_new_tokens=max_new_tokens, law=Law(), seeds=seeds, ends=self._engine.vocabulary.ends
        )
        for row, one in enumerate(made):
            if not one.tokens:
                raise AlignError(
                    f"prompts[{row}] has {len(prompts[row]):,} tokens and leaves no room for an answer: vLLM's "
                    f"context is {self._engine.context:,}"
                )
        text = self._tokenizer.decode
        return [Sample(list(one.tokens), text(list(one.tokens), skip_special_tokens=True), one.ended) for one in made]


def merged(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each weight of a causal model, as if its LoRA adapters that are on were merged.

    Raises:
        AlignError: an adapter is another than a plain LoRA of matrices, or weights are quantised.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    adapted = {name: layer for name, layer in base.named_modules() if _is_adapted(name, layer)}
    weights: list[tuple[str, Tensor, Any]] = []
    for name, weight in base.named_parameters(remove_duplicate=False):
        if not weight.is_floating_point():
            raise AlignError(f"{name} is of type {weight.dtype}: quantised weights cannot be pushed to vLLM")
        layer, _, kind = name.rpartition(".")
        owner = layer.removesuffix(".base_layer")
        if owner in adapted:
            weights.append((f"{owner}.{kind}", weight, adapted[owner] if kind == "weight" else None))
        elif not name.startswith(tuple(f"{each}." for each in adapted)):
            weights.append((name, weight, None))
    return ((name, _sum(weight, layer, dtype)) for name, weight, layer in weights)


def _is_adapted(name: str, layer: nn.Module) -> bool:
    if not isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        return False
    plain = isinstance(layer, (Linear, Embedding)) and not layer.lora_variant
    if not plain or any(getattr(part, "bias", None) is not None for part in layer.lora_B.values()):
        raise AlignError(
            f"{name} has a {type(layer).__name__} that adds more than a product of two matrices: vLLM is sent the "
            "weights that a plain LoRA adapter makes; train such a one, or draw with transformers"
        )
    return True


@torch.no_grad()
def _sum(weight: Tensor, layer: Any, dtype: torch.dtype) -> Tensor:
    """A weight with what the layer's adapters that are on add, unless it has that already."""
    if layer is None or layer.disable_adapters or layer.merged:
        return weight.detach().to(dtype)
    total = weight.detach().float()
    for adapter in layer.active_adapters:
        if adapter in layer.scaling:
            total = total + layer.get_delta_weight(adapter).float()
    return total.to(dtype)


class _Sent:
    """What was sent: every vector, and some columns of every matrix.

    Args:
        seed: of the choice of columns.
    """

    def __init__(self, seed: int) -> None:
        self._parts: dict[str, Tensor] = {}
        self._widths: dict[str, int] = {}
        self._columns: dict[int, Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def remember(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same weights, as they pass."""
        for name, weight in weights:
            if weight.ndim == 2:
                width = self._widths[name] = weight.shape[1]
                if width not in self._columns:
                    self._columns[width] = torch.randperm(width, generator=self._generator)[:COLUMNS]
                self._parts[name] = weight[:, self._columns[width].to(weight.device)].clone()
            else:
                self._parts[name] = weight.clone()
            yield name, weight

    @torch.inference_mode()
    def differences(self, model: Any) -> list[str]:
        """Where vLLM's model holds something else.

        It has some matrices on top of each other in one: ``packed_modules_mapping`` says which and in which order, and
        ``hf_to_vllm_mapper`` how it names them.
        """
        packed = {
            part: (whole, place)
            for whole, parts in getattr(model, "packed_modules_mapping", {}).items()
            for place, part in enumerate(parts)
        }
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        found: dict[str, list[tuple[int, str]]] = {}
        for name in self._parts:
            theirs = (name if mapper is None else mapper.map_name(name) or name).split(".")
            place = sum(packed[word][1] for word in name.split(".") if word in packed)
            found.setdefault(".".join(packed.get(word, (word,))[0] for word in theirs), []).append((place, name))
        problems = [f"{name} was not sent" for name, _ in model.named_parameters() if name not in found]
        for where, parts in found.items():
            names = [name for _, name in sorted(parts)]
            wanted = torch.cat([self._parts[name] for name in names]).cpu().double()
            if not bool(wanted.isfinite().all()):
                problems.append(f"{where} is NaN or infinite")
                continue
            try:
                held = self._held(model, where, names[0])
            except (AttributeError, RuntimeError) as error:  # it has no such layer, or of another width
                problems.append(f"{where} is another ({error})")
                continue
            if not all(torch.equal(each, wanted) for each in held):
                problems.append(f"{where} is another")
        return problems

    def _held(self, model: Any, where: str, name: str) -> list[Tensor]:
        """What vLLM has there, float64 on the CPU: of a matrix what it multiplies with and, where it is kept, itself.

        On a CPU only a copy that is laid out for the processor is left of most, and not every product with such a copy
        checks its width.
        """
        layer = model.get_submodule(where.rpartition(".")[0])
        weight: Tensor = getattr(layer, where.rpartition(".")[2])
        if name not in self._widths:
            return [weight.cpu().double()]
        width = layer.input_size_per_partition
        if width != self._widths[name]:
            raise RuntimeError(f"{width} columns, not {self._widths[name]}")
        rows = getattr(layer, "org_vocab_size", None)  # those of the vocabulary are padded
        columns = self._columns[self._widths[name]].to(weight.device)
        hot = nn.functional.one_hot(columns, self._widths[name]).to(weight.dtype)
        held = [layer.quant_method.apply(layer, hot, None).T]
        if weight.ndim == 2:
            held.append(weight[:, columns])
        return [each[:rows].cpu().double() for each in held]
