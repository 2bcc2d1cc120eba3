"""Ways to train on the same pairs: TRL's DPOTrainer, as its users make it, and the trainer of a recipe of ours."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from speed_data import MAX_LENGTH, Pairs
from speed_tables import BEST, DEFAULTS, FLOAT32, OURS
from trl import DPOConfig, DPOTrainer

from align.config.load import load_recipe
from align.data.pairs import read_pairs
from align.models.hardware import has_bf16_cpu
from align.models.load import load_tokenizer
from align.run import read_splits
from align.trainers.build import build

RANK = 16
HARDWARE_BF16 = torch.cuda.is_available() or has_bf16_cpu()


@dataclass(frozen=True)
class Setup:
    """What all ways have in common: sigmoid DPO, TRL's learning rate, transformers' AdamW.

    Attributes:
        model: folder.
        lora: train an adapter of rank 16 on all linear layers, else all weights.
        steps: of which the first warms up.
        training: more arguments of DPOConfig, for all ways.
    """

    model: str
    lora: bool
    pairs: Pairs
    steps: int
    output: Path
    training: dict[str, Any] = field(default_factory=dict)

    def written(self) -> str:
        """As a line that ``read`` reads."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def read(cls, line: str) -> Setup:
        """What ``written`` wrote."""
        found = json.loads(line)
        pairs, output = found.pop("pairs"), Path(found.pop("output"))
        sizes = [(p, w, r) for p, w, r in pairs["sizes"]]
        return cls(pairs=Pairs(Path(pairs["file"]), pairs["batch"], sizes), output=output, **found)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of DPOConfig that are the same in all ways: the order of the pairs is the data's own."""
        return {
            "max_steps": self.steps,
            "per_device_train_batch_size": self.pairs.batch,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "disable_tqdm": True,
            **self.training,
        }


@dataclass(frozen=True)
class Way:
    """How one trains.

    Attributes:
        make: the trainer, whose ``reference_seconds`` are those of a pass of the reference before training.
        shared: its rows hold the prompt once.
        reference: scored within each step.
    """

    make: Callable[[Setup], Any]
    shared: bool
    reference: bool


def trl(*, best: bool = False, weights: str | None = None, **settings: Any) -> Callable[[Setup], Any]:
    """TRL's DPOTrainer, as its users make it: from the model's name.

    Args:
        best: settings that make it fast where there is memory.
        weights: dtype that a model under an adapter is loaded in; TRL's default is float32, which full training needs.
    """
    if best:
        settings = {"precompute_ref_log_probs": True, "gradient_checkpointing": False, **settings}

    class Timed(DPOTrainer):  # type: ignore[misc]
        reference_seconds = 0.0

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            dataset = super()._precompute_ref_logps(*args, **kwargs)
            self.reference_seconds = time.perf_counter() - began
            return dataset

    def make(setup: Setup) -> Any:
        given = {**settings, "model_init_kwargs": {"dtype": weights}} if weights and setup.lora else settings
        cpu = {} if torch.cuda.is_available() else {"use_cpu": True}
        arguments = DPOConfig(str(setup.output), report_to="none", **cpu, **setup.arguments, **given)
        rows = read_pairs(str(setup.pairs.file)).rows
        text = [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in rows]
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        adapter = lora if setup.lora else None
        trainer = Timed(setup.model, args=arguments, train_dataset=Dataset.from_list(text), peft_config=adapter)
        same_tokens(trainer.train_dataset, setup.pairs)
        return trainer

    return make


def align(**overrides: Any) -> Callable[[Setup], Any]:
    """The trainer of a recipe, with its defaults and ``overrides``."""

    def make(setup: Setup) -> Any:
        recipe = {
            "method": "dpo",
            "model": {"name": setup.model, **({"lora": {"r": RANK}} if setup.lora else {})},
            "data": {"train": str(setup.pairs.file), "max_length": MAX_LENGTH},
            "loss": {"beta": 0.1},
            "training": setup.arguments,
            "tracking": {"wandb": {"mode": "disabled"}},
            "output": str(setup.output),
        }
        file = setup.output.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        checked = load_recipe(str(file), [f"{key}={value}" for key, value in overrides.items()])
        tokenizer = load_tokenizer(setup.model)
        rows = read_splits(checked, tokenizer, None)["train"].dataset()
        same_tokens(rows, setup.pairs)
        return build(checked, tokenizer, rows, None, setup.output).trainer

    return make


def same_tokens(rows: Dataset, pairs: Pairs) -> None:
    """Every way trains on these tokens, in this order."""
    columns = (rows["prompt_ids"], rows["chosen_ids"], rows["rejected_ids"])
    sizes = [tuple(map(len, ids)) for ids in zip(*columns, strict=True)]
    if sizes != pairs.sizes:
        raise SystemExit("the ways would not train on the same tokens")


WAYS = {
    DEFAULTS: Way(trl(), shared=False, reference=True),
    FLOAT32: Way(trl(bf16=False), shared=False, reference=True),
    BEST: Way(trl(best=True, bf16=HARDWARE_BF16, weights="bfloat16" if HARDWARE_BF16 else None), False, False),
    OURS: Way(align(), shared=True, reference=False),
}
if HARDWARE_BF16:
    del WAYS[FLOAT32]
EMULATED = () if HARDWARE_BF16 else (DEFAULTS,)
"""Ways that compute in bf16 where the processor has none."""
# Tried to find the best settings; float32 or bf16 is chosen by what the machine multiplies in hardware.
TRIED = {
    f"{BEST}: float32": Way(trl(best=True, bf16=False), False, False),
    f"{BEST}: bf16 autocast": Way(trl(best=True, bf16=True), False, False),
    f"{BEST}: bf16 weights": Way(trl(best=True, bf16=True, weights="bfloat16"), False, False),
    f"{BEST}: float32, torch.compile": Way(trl(best=True, bf16=False, torch_compile=True), False, False),
}
WITHOUT = {
    OURS: WAYS[OURS],
    f"{OURS}, reference in each step": Way(align(**{"data.reference_cache": "false"}), True, True),
    f"{OURS}, rows not packed": Way(align(**{"data.packing": "false"}), True, False),
    f"{OURS}, rows not shared": Way(align(**{"data.shared_prompt": "false"}), False, False),
}
# Of the losses: the same weights, and no rounding to bf16.
IN_FLOAT32 = {f"{OURS} in float32": Way(align(**{"model.dtype": "float32"}), True, False)}
ALL = {**WAYS, **TRIED, **WITHOUT, **IN_FLOAT32}
