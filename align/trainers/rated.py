"""Training on groups of answers that data holds, with what each answer is worth (``align.data.groups``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments

from .grouped import Group, GroupedTrainer


class RatedTrainer(GroupedTrainer):
    """``GroupedTrainer`` on rows of ``TokenizedGroups.dataset``, for ``gpo``, ``sppo`` and their pointwise forms.

    Args:
        kwargs: as in ``GroupedTrainer``.

    Raises:
        ValueError: a loss that learns from something other than scores or win rates.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, args: TrainingArguments, **kwargs: Any) -> None:
        super().__init__(model, args, data_collator=list, **kwargs)
        if not {"scores", "win_rates"} & self.takes.keys():
            raise ValueError(
                f"loss: {self.group_loss.info.name} learns from answers that the policy gives as it learns; on groups "
                "of data train gpo or sppo, or their pointwise forms"
            )

    def judged(self, batches: list[Any]) -> list[dict[str, torch.Tensor]]:
        """Rows of the data as groups."""
        return super().judged([[_group(row) for row in batch] for batch in batches])


def _group(row: Mapping[str, Any]) -> Group:
    """NaN for the numbers that the data has not: the loss does not read them."""
    unknown = [torch.nan] * len(row["answer_ids"])
    scores, win_rates = (torch.tensor(row.get(name) or unknown) for name in ("scores", "win_rates"))
    return Group(row["prompt_ids"], row["answer_ids"], None, scores, win_rates, compared=row.get("compared"))
