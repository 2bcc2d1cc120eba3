"""Training of a PAL model together with its backbone: adapters, or all of it, beside prototypes, maps and weights.

    model = PalRewardModel.create("folder/of/a/causal/model", kind="pal", lora=LoraConfig(r=16))
    model.attach(PalA(model.hidden_size, ["ann", "bob"], groups=2, dimension=64))
    PalTrainer(model, RewardConfig("out"), train_dataset=judgements).train()

A new model is better fitted to embeddings of the backbone first (``align.trainers.pal``): that takes seconds, and from
maps that mean nothing yet the backbone would learn to be worse.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import RewardConfig

from align.data.judgements import judgement_table
from align.data.load import Row
from align.data.rewards import tokenize_reward_pairs
from align.losses import Loss
from align.losses.catalogue import LossFunction
from align.rewards.pal_model import PalRewardModel

from .collate import RewardCollator
from .pal import Judgements
from .reward import RewardTrainer


class PalTrainer(RewardTrainer):
    """The reward trainer for models of annotators, on rows with an ``annotator`` that the model knows.

    The learning rate of ``args`` is the backbone's; all rates follow its schedule. A step moves the weights of the
    annotators in its batch alone.

    Args:
        loss: of the losses on ``delta``; the model's own when not given.
        kwargs: as in ``RewardTrainer``.

    Attributes:
        judgements: what the model was fitted to before, where a recipe built the trainer.

    Raises:
        ValueError: an optimiser other than AdamW, an annotator that the model does not know, or as ``RewardTrainer``.
    """

    judgements: Judgements
    optimizer: Any  # the Trainer's

    def __init__(
        self,
        model: PalRewardModel,
        args: RewardConfig | None = None,
        *,
        loss: str | LossFunction | Loss | None = None,
        **kwargs: Any,
    ) -> None:
        args = RewardConfig("tmp_trainer") if args is None else copy.copy(args)
        if args.optim not in ("adamw_torch", "adamw_torch_fused"):
            raise ValueError(f"optim is {args.optim}: a PAL model is trained by AdamW; leave it out")
        self.pal = model.pal
        self.places = {name: place for place, name in enumerate(self.pal.settings["users"])}
        super().__init__(model, args, loss=f"pal_{model.pal.loss}" if loss is None else loss, **kwargs)
        self.data_collator = PalCollator(int(model.tokenizer.pad_token_id), places=self.places, **self.layout)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: RewardConfig, dataset_name: str) -> Dataset:
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if "annotator" not in dataset.column_names:
            raise ValueError(f"{dataset_name}: no column annotator, with the name of who judged")
        if strangers := sorted(set(dataset["annotator"]) - self.places.keys()):
            raise ValueError(f"{dataset_name}: annotator {strangers[0]!r} is not one of the model's")
        return dataset

    def _read(self, rows: Iterable[Row], name: str, tokenizer: Any, limit: int | None) -> tuple[Any, Any]:
        table = judgement_table(rows, name)
        return table, tokenize_reward_pairs(table.rows, tokenizer, limit, self.rules.over_long)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*(self._signature_columns or ()), "annotator"]

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """AdamW with a rate each for backbone, maps, annotators with prototypes, and scale."""
        if self.optimizer is None:
            decayed = self.get_decay_parameter_names(self.reward)
            groups: list[dict[str, Any]] = [
                {
                    "params": [
                        weight
                        for name, weight in self.reward.named_parameters()
                        if weight.requires_grad and not name.startswith("pal.") and (name in decayed) is decays
                    ],
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                }
                for decays in (True, False)
            ]
            groups += self.pal.parameter_groups()
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = RowwiseAdamW(
                groups, self.pal.logits.weight, lr=self.args.learning_rate, betas=betas, eps=self.args.adam_epsilon
            )
        return self.optimizer


class RowwiseAdamW(torch.optim.AdamW):
    """AdamW in which rows of a table that have no gradient keep their values and moments.

    Args:
        groups: as for AdamW; the table is in one of them.
        table: (N, K).
        settings: as for AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], table: Tensor, **settings: Any) -> None:
        self.table = table
        super().__init__(groups, **settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        gradient = self.table.grad
        if gradient is None:
            return super().step(closure)
        absent = (gradient == 0).all(1)
        moments = (self.state[self.table].get(name) for name in ("exp_avg", "exp_avg_sq"))
        kept = [(values, values[absent]) for values in (self.table, *moments) if values is not None]
        found = super().step(closure)
        for values, before in kept:
            values[absent] = before
        return found


@dataclass(frozen=True, kw_only=True)
class PalCollator(RewardCollator):
    """As for reward models, with the annotator of each row.

    Args:
        places: number of each annotator in the model's table.
    """

    places: Mapping[str, int]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """``users``: of all chosen answers, then of all rejected ones, (2B,)."""
        users = torch.tensor([self.places[example["annotator"]] for example in examples] * 2)
        return {**super().__call__(examples), "users": users}
