"""Training on pairs with any loss of the library, in TRL's DPOTrainer.

What is TRL's: arguments, PEFT, reference model, checkpoints, logging, the loop. What is ours: the rows (the prompt is
computed once), the log-probs (completion tokens only), the loss, its metrics in its own units, and the check at the
first step that policy and reference agree. ``tests/align/trainers/test_trl_contract.py`` names every private attribute
of TRL that is used here.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import use_adapter

from align.data.pairs import pair_table
from align.data.report import fault_report
from align.data.tokenize import tokenize_pairs
from align.errors import AlignError
from align.losses import Loss, LossOutput, PairLogps, SequenceLogps, combine
from align.losses.catalogue import LossFunction
from align.losses.logprobs import TokenLogps
from align.losses.rows import PADDING, Rows
from align.models.scoring import attach_scoring, score, why_not_shared_prompt
from align.tracking.run_folder import peak_rss_gb

from .collate import PairCollator, rows_of

logger = logging.getLogger(__name__)

# Largest |log pi - log pi_ref| of a token at the first step, nats. In bf16 the two passes differ by their rounding.
STEP_ZERO_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}

# DPOConfig's own loss settings that would be dropped here: (field, value that means "off", what to do instead).
_NOT_TAKEN: list[tuple[str, Any, str]] = [
    ("loss_type", ["sigmoid"], "name the loss: PairTrainer(loss=...)"),
    ("loss_weights", None, "give weights with the losses: Loss.of(name, weight=...)"),
    ("label_smoothing", 0.0, "no loss here smooths labels"),
    ("ld_alpha", None, "ln_dpo normalises by length"),
    ("use_weighting", False, "WPO's weights are not available"),
    ("f_divergence_type", "reverse_kl", "only the reverse KL is available"),
    ("precompute_ref_log_probs", False, "the reference is scored with each batch"),
    ("padding_free", False, "rows are padded"),
    ("pad_to_multiple_of", None, "rows are padded to the widest of their batch"),
    ("truncation_mode", "keep_start", "answers are cut at the end, both at the same length"),
]


class PairTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's DPOTrainer with the library's losses; it stands where ``DPOTrainer(...)`` stood.

    Args:
        model: policy, as a path or a causal model, PEFT or not.
        ref_model: reference. None: the adapters switched off for a fresh adapter, a frozen copy of the adapter for one
            that has been trained before, a frozen copy of the model for full training, nothing for losses that need
            none.
        args: TRL's ``DPOConfig``. A ``beta`` that is not DPOConfig's own default counts for losses given by name or
            function; left at that default, each loss has its own (``align recipes methods``). Other loss settings of
            DPOConfig are refused, because they would be dropped.
        loss: a loss by name (``"ln_dpo"``), by function (``ln_dpo``), with settings (``Loss.of("ln_dpo", beta=5.0)``),
            or several of these to add up.
        shared_prompt: one row a pair where the architecture allows it.
        starts_at_reference: policy and reference are the same model at the first step, which is then checked. Say
            False when a reference other than the starting point is meant.
        kwargs: as in ``DPOTrainer``.

    Raises:
        ValueError: an argument of ``DPOConfig`` that this trainer would have to drop, or a loss that does not exist.
    """

    # Set by DPOTrainer.
    _signature_columns: list[str] | None
    _total_train_tokens: int

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        *,
        loss: str | LossFunction | Loss | Sequence[str | LossFunction | Loss] = "dpo",
        shared_prompt: bool = True,
        starts_at_reference: bool = True,
        **kwargs: Any,
    ) -> None:
        args = DPOConfig("tmp_trainer") if args is None else copy.copy(args)
        self._refuse_what_would_be_dropped(args)
        if kwargs.get("data_collator") is not None:
            raise ValueError("data_collator: the rows of a pair are laid out here; leave it out")
        self.losses = _losses(loss, args)
        self.needs_reference = any(term.reference for term in self.losses)
        self.starts_at_reference = starts_at_reference
        self._checked_step_zero = False
        self._clock: tuple[float, int] | None = None

        adapted = isinstance(model, PeftModel) or kwargs.get("peft_config") is not None
        if not self.needs_reference:
            # The one way to keep DPOTrainer from loading a reference; `_precompute_ref_logps` below computes nothing.
            args.precompute_ref_log_probs = True
        elif ref_model is None and not adapted and isinstance(model, nn.Module):
            # DPOTrainer would load it anew from the name in the config, whatever weights the model has by now.
            ref_model = copy.deepcopy(model).requires_grad_(False).eval()
        super().__init__(model=model, ref_model=ref_model, args=args, **kwargs)
        if self.aux_loss_enabled:
            raise ValueError("mixture-of-experts auxiliary losses are not added here: pass router_aux_loss_coef=0")

        for scored in filter(None, (self.model, self.ref_model)):
            attach_scoring(scored.get_base_model() if isinstance(scored, PeftModel) else scored)
        reason = why_not_shared_prompt(self.model)
        if shared_prompt and reason:
            logger.warning("separate rows for chosen and rejected answers: %s", reason)
        self.shared_prompt = shared_prompt and reason is None
        self.data_collator = PairCollator(self._tokenizer.pad_token_id, self.shared_prompt)

    @staticmethod
    def _refuse_what_would_be_dropped(args: DPOConfig) -> None:
        problems = [
            f"{field}={getattr(args, field)!r}: {instead}"
            for field, off, instead in _NOT_TAKEN
            if getattr(args, field) != off
        ]
        if problems:
            raise ValueError("arguments of DPOConfig that PairTrainer does not take:\n  " + "\n  ".join(problems))

    # --- data ---------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str) -> Dataset:
        """Rows of text or messages to token ids, by the rules of ``align.data``; tokenised rows as they are."""
        if not isinstance(dataset, Dataset):
            raise ValueError(f"{dataset_name}: a map-style datasets.Dataset is needed, not {type(dataset).__name__}")
        if {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(dataset.column_names):
            return dataset
        unread = sorted({"tools", "chat_template_kwargs", "image", "images"} & set(dataset.column_names))
        if unread:
            raise ValueError(f"{dataset_name}: columns that are not read here: {', '.join(unread)}")
        table = pair_table(((dataset_name, number, row) for number, row in enumerate(dataset, 1)), dataset_name)
        tokenized = tokenize_pairs(table.rows, processing_class, args.max_length)
        faults = [*table.faults, *tokenized.faults]
        if faults:
            logger.warning("%s", fault_report(faults, len(dataset)))
        if not tokenized.rows:
            raise AlignError(f"{dataset_name}: no row can be used")
        return tokenized.dataset()

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["prompt_ids", "chosen_ids", "rejected_ids", "strength"]

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        return dataset

    # --- log-probs ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[nn.Module]:
        """The reference: its own model, or the policy with its adapters off (or set to the frozen copy)."""
        with torch.no_grad(), self.accelerator.autocast():
            if self.ref_model is not None:
                yield self.ref_model
                return
            inner = self.accelerator.unwrap_model(self.model)
            with use_adapter(inner, "ref" if "ref" in inner.peft_config else None):
                yield self.model

    # --- loss ---------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool) -> Any:
        if return_outputs:
            raise ValueError("compute_metrics would need logits, and none are built; evaluate with align.evals")
        rows = rows_of(inputs)
        tokens = score(model, rows)
        policy = _pair_logps(rows, tokens.logps)
        reference: PairLogps | None = None
        if self.needs_reference:
            with self._as_reference() as reference_model:
                reference_tokens = score(reference_model, rows)
            self._check_step_zero(tokens, reference_tokens)
            reference = _pair_logps(rows, reference_tokens.logps)
        output = combine(self.losses, policy, reference)
        self._record(rows, tokens, policy, reference, output)
        return (inputs["strength"] * output.loss).mean()

    def _check_step_zero(self, policy: TokenLogps, reference: TokenLogps) -> None:
        """At the first step of a fresh run the policy is the reference, token by token."""
        if self._checked_step_zero or not self.model.training:
            return
        self._checked_step_zero = True
        if not self.starts_at_reference or self.state.global_step > 0:
            return
        gap = float((policy.logps.detach() - reference.logps).abs().max())
        computed_in = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else self.model.dtype
        tolerance = STEP_ZERO_TOLERANCE[computed_in]
        if not gap <= tolerance:
            raise AlignError(
                f"before the first step, policy and reference differ by up to {gap:.3g} nats a token (at most "
                f"{tolerance:g} in {str(computed_in).removeprefix('torch.')}): the reference is not the model that "
                "training starts from. Check the adapter and the reference weights; if another reference is meant, "
                "say starts_at_reference=False"
            )

    def _record(
        self,
        rows: Rows,
        tokens: TokenLogps,
        policy: PairLogps,
        reference: PairLogps | None,
        output: LossOutput,
    ) -> None:
        """Metrics of a batch, summed over processes in one reduction."""
        chosen_tokens = rows.answer < rows.answers // 2
        margins = output.chosen_rewards - output.rejected_rewards
        by_pair = {
            "rewards/chosen": output.chosen_rewards,
            "rewards/rejected": output.rejected_rewards,
            # As in TRL: a tie is not a win.
            "rewards/accuracies": (margins > 0).float(),
            "rewards/margins": margins,
            "logps/chosen": policy.chosen.total,
            "logps/rejected": policy.rejected.total,
            "length/chosen_tokens": policy.chosen.length,
            "length/rejected_tokens": policy.rejected.length,
            **output.metrics,
        }
        if reference is not None:
            chosen = policy.chosen.total - reference.chosen.total
            by_pair |= {
                "displacement/chosen_delta": chosen,
                "displacement/chosen_delta_per_token": chosen / policy.chosen.length,
                "displacement/rejected_delta": policy.rejected.total - reference.rejected.total,
                "displacement/frac_chosen_down": (chosen < 0).float(),
            }
        sums = {name: value.detach().float().sum() for name, value in by_pair.items()}
        sums |= {
            "entropy": tokens.entropy.float().sum(),
            "mean_token_accuracy": tokens.top[chosen_tokens].float().sum(),
            "scored": tokens.logps.new_tensor(len(chosen_tokens), dtype=torch.float32),
            "chosen": chosen_tokens.float().sum(),
            "seen": (rows.segments != PADDING).float().sum(),
            "pairs": tokens.logps.new_tensor(rows.answers // 2, dtype=torch.float32),
        }
        reduced = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").tolist()
        total = dict(zip(sums, reduced, strict=True))

        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in by_pair:
            metrics[name].append(total[name] / total["pairs"])
        metrics["entropy"].append(total["entropy"] / total["scored"])
        metrics["mean_token_accuracy"].append(total["mean_token_accuracy"] / total["chosen"])
        if self.model.training:
            self._total_train_tokens += int(total["seen"])
        metrics["num_tokens"] = [self._total_train_tokens]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: TRL's card names DPO as the method, whatever the loss is. A run writes its own."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The checkpoint's weights; of a continued adapter, the trained one too.

        transformers loads the adapters in the checkpoint's subfolders, which is the frozen copy alone: the adapter in
        training lies at the root.
        """
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        inner = self.accelerator.unwrap_model(self.model if model is None else model)
        if isinstance(inner, PeftModel) and "ref" in inner.peft_config:
            inner.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
            inner.set_adapter("default")

    # --- logging ------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._total_train_tokens == 0 and self.state.global_step > 0:
            # A resumed run goes on counting; TRL's counter is not in the checkpoint, its log is.
            logged = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
            self._total_train_tokens = int(logged[-1]) if logged else 0
        if self._clock is None:
            self._clock = (time.perf_counter(), self._total_train_tokens)
        # Under autocast an adapter's float32 weights meet bf16 inputs anyway; peft would first copy those to float32.
        autocast = self.accelerator.mixed_precision in ("bf16", "fp16")
        with disable_input_dtype_casting(self.model, active=autocast):
            loss: torch.Tensor = super().training_step(*args, **kwargs)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log with speed (tokens in the rows, prompts counted once where they are shared) and peak memory."""
        if "loss" in logs and self._clock is not None:
            began, tokens = self._clock
            logs["perf/tokens_per_s"] = (self._total_train_tokens - tokens) / (time.perf_counter() - began)
            logs["perf/peak_rss_gb"] = peak_rss_gb()
            self._clock = None
        super().log(logs, start_time)


def _losses(given: Any, args: DPOConfig) -> list[Loss]:
    terms = list(given) if isinstance(given, (list, tuple)) else [given]
    losses = []
    for term in terms:
        loss = Loss.of(term)
        if not isinstance(term, Loss) and "beta" in loss.info.parameters:
            default = DPOConfig.__dataclass_fields__["beta"].default
            if args.beta != default:
                loss = Loss(loss.info, {**loss.settings, "beta": args.beta})
            logger.info("%s with beta %g", loss.info.name, loss.settings["beta"])
        losses.append(loss)
    return losses


def _pair_logps(rows: Rows, token_logps: torch.Tensor) -> PairLogps:
    totals, lengths = rows.totals(token_logps), rows.lengths()
    n = rows.answers // 2
    return PairLogps(SequenceLogps(totals[:n], lengths[:n]), SequenceLogps(totals[n:], lengths[n:]))
