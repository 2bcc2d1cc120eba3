"""The reference's log-probs, computed once and read by every run that has the same reference and the same rows.

**Which rows, and when.** A run that sees at least half of its training rows has all of them looked up before its first
step, and the missing ones computed in one pass; so have the rows that it evaluates on while it trains. A shorter run
looks them up too, scores with each batch what is missing, as without a cache, and keeps that: it computes nothing that
it does not use.

**The pass.** Rows by falling length, in shards of 256; a shard is on the disk as soon as it is scored, so that a pass
that was stopped goes on. Which rows stand in one batch follows from the shard alone: after a kill they are the same,
and so are the numbers, to the last bit. A batch has as many pairs as one of training, and is laid out alike.

**What log-probs depend on** beside the token ids is the context: the weights (with their dtype, and an adapter's, with
its settings), the model's config, autocast, the attention back-end, the layout of rows, the kind of device, the
releases of torch and transformers, and ``SCORING``. The tokenizer, its chat template and the length limit are not in
it: the model sees token ids alone, and an answer that was cut, or a prompt that was written otherwise, has other ones.
Nor is the loss: a sweep over losses, beta or learning rates has one reference. Of code that comes with a model the
context knows nothing.

**Rounding.** A row is scored beside other rows in the pass than in training. On SmolLM2-135M that moves a token's
log-prob by 1e-7 nats on average and 7e-6 at most in float32, by 0.0015 and 0.1 in bfloat16 (0.03 an answer, a standard
deviation): so a run's first accuracy, of equal models, says how rounding fell.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, Features, List, Value, concatenate_datasets
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor
from transformers import TrainerCallback

from align.models.fingerprint import weights_hash
from align.models.memory import release_freed
from align.tracking.progress import progress

from .logp_shards import Answers, LogpShards, row_key

SCORING = 1  # raised when log-probs are computed otherwise, so that older ones are not read
ROWS_IN_SHARD = 256
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
COLUMNS = ("reference_chosen", "reference_rejected")
# Of a model's config: where it came from and how it is run, which its log-probs do not hang on.
_NOT_IN_CONTEXT = {"_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype"}
_NOT_OF_ADAPTER = {"base_model_name_or_path", "inference_mode", "revision", "peft_version"}

Score = Callable[[Sequence[Mapping[str, Any]]], list[Answers]]
"""The reference's log-probs of tokenised pairs."""


class ReferenceCache:
    """What a ``PairTrainer`` knows of its reference.

    Args:
        shards: where log-probs are kept.
        score: asks the reference itself.
        batch_size: pairs at a time.
        accelerator: the trainer's; its processes share a pass.

    Attributes:
        rows: how many were ``cached`` and how many ``computed``, of those that the run has use for.
        seconds: that reading and computing took before the first step.
    """

    def __init__(self, shards: LogpShards, score: Score, batch_size: int, accelerator: Any) -> None:
        self.shards = shards
        self.rows = Counter(cached=0, computed=0)
        self.seconds = 0.0
        self._score = score
        self._batch_size = batch_size
        self._accelerator = accelerator
        self._scored: dict[bytes, Answers] = {}

    def filled(self, dataset: Dataset, name: str, *, complete: bool) -> Dataset:
        """``dataset`` with the columns ``reference_chosen`` and ``reference_rejected``.

        Args:
            dataset: tokenised pairs.
            name: of the data set, for the progress bar.
            complete: compute what is missing; None stands there otherwise.
        """
        began = time.perf_counter()
        keys, sizes, wanted = [], {}, {}
        for ids in _token_ids(dataset):
            keys.append(row_key(*ids))
            sizes[keys[-1]] = sum(map(len, ids))
            wanted[keys[-1]] = (len(ids[1]), len(ids[2]))
        found = self.shards.read(wanted)
        if complete:
            self.rows.update(cached=len(found), computed=len(wanted) - len(found))
            # By length, and then by key, so that the order of the rows in the data does not matter.
            order = sorted(wanted, key=lambda key: (-sizes[key], key))
            missing = [
                [key for key in order[start : start + ROWS_IN_SHARD] if key not in found]
                for start in range(0, len(order), ROWS_IN_SHARD)
            ]
            places = {key: place for place, key in enumerate(keys)}
            found |= self._pass(dataset.select_columns(list(IDS)), missing, places, name)
        filled = _with_columns(dataset, [found.get(key) for key in keys])
        self.seconds += time.perf_counter() - began
        return filled

    def keep(self, rows: Mapping[bytes, Answers]) -> None:
        """Keep what was scored with a batch; it is on the disk after the next ``flush``."""
        self._scored |= rows
        if len(self._scored) >= ROWS_IN_SHARD:
            self.flush()

    def flush(self) -> None:
        """Write what was scored with batches."""
        if self._scored:
            self.shards.write(self._scored)
            self._scored = {}

    def _pass(
        self, dataset: Dataset, missing: list[list[bytes]], places: Mapping[bytes, int], name: str
    ) -> dict[bytes, Answers]:
        """The missing rows, by shards. Each process has every n-th shard, and reads what the others wrote."""
        rank, processes = self._accelerator.process_index, self._accelerator.num_processes
        computed = self._compute(dataset, missing[rank::processes], places, name)
        if processes > 1:
            self._accelerator.wait_for_everyone()
            others = [key for shard in missing for key in shard if key not in computed]
            computed |= self.shards.read({key: _lengths(dataset[places[key]]) for key in others})
            # Where processes have no disk in common, each computes all of it.
            rest = [[key for key in shard if key not in computed] for shard in missing]
            computed |= self._compute(dataset, rest, places, name)
        return computed

    def _compute(
        self, dataset: Dataset, shards: Sequence[Sequence[bytes]], places: Mapping[bytes, int], name: str
    ) -> dict[bytes, Answers]:
        computed: dict[bytes, Answers] = {}
        total = sum(map(len, shards))
        if not total:
            return computed
        with progress(f"reference log-probs, {name}", total) as advance:
            for shard in filter(None, shards):
                rows: dict[bytes, Answers] = {}
                for start in range(0, len(shard), self._batch_size):
                    part = shard[start : start + self._batch_size]
                    rows |= zip(part, self._score([dataset[places[key]] for key in part]), strict=True)
                    advance(len(part))
                self.shards.write(rows)
                computed |= rows
                release_freed()
        return computed


class KeepScored(TrainerCallback):  # type: ignore[misc]
    """Writes what was scored with batches at every checkpoint, after an evaluation and at the end."""

    def __init__(self, cache: ReferenceCache) -> None:
        self._cache = cache

    def on_save(self, *_: Any, **__: Any) -> None:
        """Write it."""
        self._cache.flush()

    on_evaluate = on_train_end = on_save


def sees_half(arguments: Any, rows: int) -> bool:
    """Whether a run of these ``TrainingArguments`` sees at least half of its training rows."""
    if arguments.max_steps <= 0:
        return bool(arguments.num_train_epochs >= 0.5)
    step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return bool(2 * arguments.max_steps * step >= rows)


def context_of(model: Any, adapters: Sequence[str], *, rows: str, autocast: str) -> dict[str, Any]:
    """What the log-probs of ``model`` hang on beside the token ids.

    Args:
        model: the reference, or the policy that is it with ``adapters`` on and all others off.
        rows: how they are laid out.
        autocast: the type that products are computed in, or ``no``.
    """
    config = model.config.to_dict()
    return {
        "scoring": SCORING,
        "weights": weights_hash(_base_weights(model)),
        "adapters": [_adapter_hash(model, name) for name in adapters],
        "config": _json_hash({key: value for key, value in config.items() if key not in _NOT_IN_CONTEXT}),
        "attention": model.config.get_text_config()._attn_implementation,
        "rows": rows,
        "autocast": autocast,
        "float32_products": torch.get_float32_matmul_precision(),
        "device": model.device.type,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _base_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights without those of any adapter, under the names that they have where there is none."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    wrapped = {f"{name}." for name, module in base.named_modules() if isinstance(module, wrappers)}
    for name, tensor in base.state_dict().items():
        prefix = next((prefix for prefix in wrapped if name.startswith(prefix)), None)
        if prefix is None:
            yield name, tensor
            continue
        inside, _, rest = name.removeprefix(prefix).partition(".")
        if inside in ("base_layer", "original_module"):
            yield prefix + rest, tensor


def _adapter_hash(model: PeftModel, name: str) -> str:
    """Of an adapter's weights and of its settings: the scale is in these alone."""
    settings = {k: v for k, v in model.peft_config[name].to_dict().items() if k not in _NOT_OF_ADAPTER}
    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return _json_hash([settings, weights_hash(weights.items())])


def _json_hash(content: Any) -> str:
    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, set) else str(value)

    return hashlib.sha256(json.dumps(content, sort_keys=True, default=plain).encode()).hexdigest()


def _token_ids(dataset: Dataset) -> Iterator[tuple[Any, Any, Any]]:
    for batch in dataset.select_columns(list(IDS)).with_format("numpy").iter(1024):
        yield from zip(*(batch[name] for name in IDS), strict=True)


def _lengths(row: Mapping[str, Any]) -> tuple[int, int]:
    return len(row["chosen_ids"]), len(row["rejected_ids"])


def _with_columns(dataset: Dataset, answers: Sequence[Answers | None]) -> Dataset:
    columns = {
        name: [None if pair is None else np.asarray(pair[side]) for pair in answers]
        for side, name in enumerate(COLUMNS)
    }
    features = Features({name: List(Value("float32")) for name in COLUMNS})
    dataset = dataset.remove_columns([name for name in COLUMNS if name in dataset.column_names])
    return concatenate_datasets([dataset, Dataset.from_dict(columns, features)], axis=1)
