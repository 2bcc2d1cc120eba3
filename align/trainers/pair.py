"""Training on pairs with any loss of the library, in TRL's DPOTrainer.

What is TRL's: arguments, PEFT, reference model, checkpoints, logging, the loop. What is ours: the rows (a prompt is
computed once for its answers, and pairs are packed), the log-probs (completion tokens only), the loss, its metrics in
its own units, and the check at the first step that policy and reference agree.
``tests/align/trainers/test_trl_contract.py`` names every private attribute of TRL that is used here.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from align.data.pairs import pair_table
from align.data.tokenize import tokenize_pairs
from align.errors import AlignError
from align.losses import Loss, LossOutput, PairLogps, SequenceLogps, combine
from align.losses.catalogue import KINDS, LossFunction
from align.losses.logprobs import TokenLogps
from align.losses.rows import PADDING, Rows
from align.models.scoring import score

from .by_length import LengthGrouped
from .collate import PairCollator, rows_of
from .given import check_dataset, tokenized_dataset, untokenized_rows
from .host import loss_with_beta, ranked_right, refuse_what_would_be_dropped
from .reference_cache import COLUMNS
from .reference_host import ReadsReferences

logger = logging.getLogger(__name__)

# DPOConfig's own loss settings that would be dropped here: (field, value that means "off", what to do instead).
_NOT_TAKEN: list[tuple[str, Any, str]] = [
    ("loss_type", ["sigmoid"], "name the loss: PairTrainer(loss=...)"),
    ("loss_weights", None, "give weights with the losses: Loss.of(name, weight=...)"),
    ("label_smoothing", 0.0, 'give it with the loss: Loss.of("dpo", label_smoothing=...)'),
    ("ld_alpha", None, "ln_dpo normalises by length"),
    ("use_weighting", False, "WPO's weights are not available"),
    ("f_divergence_type", "reverse_kl", "only the reverse KL is available"),
    ("precompute_ref_log_probs", False, "PairTrainer(reference_cache=FOLDER) does it, for any loss, beta and rate"),
    ("padding_free", False, "packing=True is what saves padding here"),
    ("pad_to_multiple_of", None, "rows are padded to the widest of their batch"),
    ("truncation_mode", "keep_start", "answers are cut at the end, both at the same length"),
]


class PairTrainer(LengthGrouped, ReadsReferences, DPOTrainer):  # type: ignore[misc]
    """TRL's DPOTrainer with the library's losses; it stands where ``DPOTrainer(...)`` stood.

    Args:
        model: policy, as a path or a causal model, PEFT or not.
        ref_model: reference. None: the adapters switched off for a fresh adapter, a frozen copy of the adapter for one
            that has been trained before, a frozen copy of the model for full training, nothing for losses that need
            none.
        args: TRL's ``DPOConfig``. A ``beta`` that is not DPOConfig's own default counts for losses given by name or
            function; left at that default, each loss has its own (``align recipes methods``). Other loss settings of
            DPOConfig are refused, because they would be dropped. ``train_sampling_strategy="group_by_length"`` is our
            own sampler (``by_length``): every row once an epoch, exact on resuming.
        loss: a loss by name (``"ln_dpo"``), by function (``ln_dpo``), with settings (``Loss.of("ln_dpo", beta=5.0)``),
            or several of these to add up.
        shared_prompt: the prompt once for both answers, where the architecture allows it.
        packing: several pairs in a row, where prompts are shared.
        starts_at_reference: policy and reference are the same model at the first step, which is then checked. Say
            False when a reference other than the starting point is meant.
        reference_cache: folder that keeps the reference's log-probs, for any number of runs
            (``align.trainers.reference_cache``). Full training that sees half of its rows or more then keeps no copy
            of the model: what is evaluated on after the first step must be in ``eval_dataset``. None: the reference is
            scored with each batch.
        kwargs: as in ``DPOTrainer``.

    Attributes:
        references: what was read and computed of the cache; None without one, or where no loss needs a reference.

    Raises:
        ValueError: an argument of ``DPOConfig`` that this trainer would have to drop, or a loss that does not exist.
        AlignError: ``reference_cache`` cannot be written, or a log-prob of the reference is not finite.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        *,
        loss: str | LossFunction | Loss | Sequence[str | LossFunction | Loss] = "dpo",
        shared_prompt: bool = True,
        packing: bool = True,
        starts_at_reference: bool = True,
        reference_cache: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        args = DPOConfig("tmp_trainer") if args is None else copy.copy(args)
        refuse_what_would_be_dropped(args, _NOT_TAKEN, "PairTrainer")
        if kwargs.get("data_collator") is not None:
            raise ValueError("data_collator: the rows of a pair are laid out here; leave it out")
        self.losses = _losses(loss, args)
        self.needs_reference = any(term.reference for term in self.losses)
        self.starts_at_reference = starts_at_reference

        adapted = isinstance(model, PeftModel) or kwargs.get("peft_config") is not None
        cached = reference_cache is not None and self.needs_reference
        if cached:
            check_dataset(kwargs.get("train_dataset"), "train")
            self._plan_references(args, len(kwargs["train_dataset"]))
        ref_model = self._reference_to_give(model, ref_model, args, adapted, known=self._all_cached)
        super().__init__(model=model, ref_model=ref_model, args=args, **kwargs)
        self.precompute_ref_logps = False  # TRL's own
        self._attach_scoring()
        self._choose_rows(self.model, shared_prompt, packing, "chosen and rejected answers")
        self.data_collator = PairCollator(self._tokenizer.pad_token_id, **self.layout)
        if not self.needs_reference:
            names = " + ".join(term.info.name for term in self.losses)
            logger.warning(
                "no displacement/* among the metrics of each step: %s has no reference to compare with; "
                "the suite displacement measures it after training",
                names,
            )
        if cached:
            self._read_references(Path(str(reference_cache)).expanduser())

    # --- data ---------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str) -> Dataset:
        """Rows of text or messages to token ids, by the rules of ``align.data``; tokenised rows as they are."""
        check_dataset(dataset, dataset_name)
        if not {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(dataset.column_names):
            table = pair_table(untokenized_rows(dataset, dataset_name), dataset_name)
            tokenized = tokenize_pairs(table.rows, processing_class, args.max_length)
            dataset = tokenized_dataset(table, tokenized, dataset_name)
        self._check_soft_labels(dataset, dataset_name)
        return dataset

    def _check_soft_labels(self, dataset: Dataset, dataset_name: str) -> None:
        """Probabilities of preference must not be dropped by a loss that cannot read them."""
        sure = sorted({loss.info.name for loss in self.losses if not loss.info.soft})
        if not sure or "preference" not in dataset.column_names:
            return
        given = sum(probability is not None for probability in dataset["preference"])
        if given:
            raise AlignError(
                f"{dataset_name}: {given:,} rows have a soft label (column preference), and {', '.join(sure)} takes "
                "sure labels alone: remove the column, or choose a loss that takes them (align recipes methods)"
            )

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["prompt_ids", "chosen_ids", "rejected_ids", "strength", "preference", *COLUMNS]

    # --- loss ---------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool) -> Any:
        if return_outputs:
            raise ValueError("compute_metrics would need logits, and none are built; evaluate with align.evals")
        rows = rows_of(inputs)
        tokens = score(model, rows)
        policy = _pair_logps(rows, tokens.logps)
        reference: PairLogps | None = None
        if self.needs_reference:
            reference_logps = self._reference_logps(rows, inputs)
            kept = self.references.shards.folder if self.references and "reference_logps" in inputs else None
            self._check_step_zero(tokens, reference_logps, kept)
            reference = _pair_logps(rows, reference_logps)
        output = combine(self.losses, policy, reference, inputs.get("preference"))
        self._record(rows, tokens, policy, reference, output, inputs.get("preference"))
        return (inputs["strength"] * output.loss).mean()

    def _record(
        self,
        rows: Rows,
        tokens: TokenLogps,
        policy: PairLogps,
        reference: PairLogps | None,
        output: LossOutput,
        preference: torch.Tensor | None,
    ) -> None:
        """Metrics of a batch, summed over processes in one reduction."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        chosen_tokens = rows.answer < rows.answers // 2
        margins = output.chosen_rewards - output.rejected_rewards
        by_pair = {
            "rewards/chosen": output.chosen_rewards,
            "rewards/rejected": output.rejected_rewards,
            "rewards/margins": margins,
            "logps/chosen": policy.chosen.total,
            "logps/rejected": policy.rejected.total,
            "length/chosen_tokens": policy.chosen.length,
            "length/rejected_tokens": policy.rejected.length,
            **output.metrics,
        }
        if reference is not None:
            chosen = (policy.chosen.total - reference.chosen.total).detach()
            rejected = (policy.rejected.total - reference.rejected.total).detach()
            by_pair |= {
                "displacement/chosen_delta": chosen,
                "displacement/chosen_delta_per_token": chosen / policy.chosen.length,
                "displacement/rejected_delta": rejected,
                "displacement/rejected_delta_per_token": rejected / policy.rejected.length,
                "displacement/frac_chosen_down": (chosen < 0).float(),
            }
            # Of all batches since the last log, in which the others are averaged.
            falls = metrics["displacement/largest_fall"]
            fall = self.accelerator.gather(chosen.float().min().neg().clamp(min=0)[None]).max()
            falls[:] = [max([*falls, float(fall)])]
        sums = {name: value.detach().float().sum() for name, value in by_pair.items()}
        right, decided = ranked_right(margins, preference)
        sums |= {
            "right": right.float().sum(),
            "decided": decided.float().sum(),
            "entropy": tokens.entropy.float().sum(),
            "mean_token_accuracy": tokens.top[chosen_tokens].float().sum(),
            "scored": tokens.logps.new_tensor(len(chosen_tokens), dtype=torch.float32),
            "chosen": chosen_tokens.float().sum(),
            "seen": (rows.segments != PADDING).float().sum(),
            "positions": tokens.logps.new_tensor(rows.segments.numel(), dtype=torch.float32),
            "pairs": tokens.logps.new_tensor(rows.answers // 2, dtype=torch.float32),
        }
        reduced = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").tolist()
        total = dict(zip(sums, reduced, strict=True))

        for name in by_pair:
            metrics[name].append(total[name] / total["pairs"])
        if total["decided"]:
            metrics["rewards/accuracies"].append(total["right"] / total["decided"])
        metrics["entropy"].append(total["entropy"] / total["scored"])
        metrics["mean_token_accuracy"].append(total["mean_token_accuracy"] / total["chosen"])
        metrics["perf/padding"].append(1 - total["seen"] / total["positions"])
        if self.model.training:
            self._count_tokens(total["seen"], total["positions"])
        metrics["num_tokens"] = [self._total_train_tokens]


def _losses(given: Any, args: DPOConfig) -> list[Loss]:
    terms = list(given) if isinstance(given, (list, tuple)) else [given]
    default = DPOConfig.__dataclass_fields__["beta"].default
    losses = [loss_with_beta(term, args.beta, default) for term in terms]
    for loss in losses:
        if loss.info.kind != "pair":
            raise ValueError(
                f"loss: {loss.info.name} is not a loss on pairs, which PairTrainer trains on: it takes "
                f"{KINDS[loss.info.kind]}"
            )
    return losses


def _pair_logps(rows: Rows, token_logps: torch.Tensor) -> PairLogps:
    totals, lengths = rows.totals(token_logps), rows.lengths()
    n = rows.answers // 2
    return PairLogps(SequenceLogps(totals[:n], lengths[:n]), SequenceLogps(totals[n:], lengths[n:]))
