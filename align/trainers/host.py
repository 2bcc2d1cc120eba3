"""What the trainers on pairs and on thumbs do alike on top of TRL's: rows, the reference, its check, resuming."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers import PreTrainedModel, Trainer
from trl.trainer.utils import use_adapter

from align.errors import AlignError
from align.losses import Loss
from align.losses.layouts import SEPARATE, Layout, layout_of, why_not_shared_prompt
from align.losses.logprobs import TokenLogps
from align.models.scoring import attach_scoring
from align.tracking.run_folder import peak_rss_gb

logger = logging.getLogger(__name__)

# Largest |log pi - log pi_ref| of a token at the first step, nats. In bf16 the two passes differ by their rounding.
STEP_ZERO_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}

NotTaken = Sequence[tuple[str, Any, str]]
"""``(field of the arguments, value that means "off", what to do instead)``."""


class Hosted(Trainer):  # type: ignore[misc]
    """Goes before ``DPOTrainer`` or ``KTOTrainer`` in the bases of a trainer of ours.

    Attributes:
        needs_reference: whether the policy is compared with a reference. Set before ``super().__init__``.
        starts_at_reference: whether both are the same model at the first step, which is then checked. Set likewise.
        samples: answers are drawn within a training step, which TRL does outside autocast.
        layout: how rows are laid out.
        rows_said: that in words, for the manifest; None where TRL lays rows out.
        positions: how many positions of the rows trained on since the run was started, or gone on with, held a
            token, and how many there were.
    """

    needs_reference: bool
    starts_at_reference: bool
    samples = False
    layout: Layout = SEPARATE
    rows_said: str | None = None
    positions: tuple[int, int] = (0, 0)
    # Set by TRL's trainer.
    _signature_columns: list[str] | None
    _total_train_tokens: int

    _checked_step_zero = False
    _clock: tuple[float, int] | None = None

    def _reference_to_give(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None,
        args: Any,
        adapted: bool,
        known: bool = False,
    ) -> PreTrainedModel | None:
        """``ref_model`` for TRL's trainer; sets ``args`` so that none is loaded where none is needed.

        Args:
            known: all of its log-probs are there before the first step.
        """
        if not self.needs_reference or (known and ref_model is None and not adapted):
            # The one way to keep TRL from loading a reference; `_precompute_ref_logps` below computes nothing.
            args.precompute_ref_log_probs = True
        elif ref_model is None and not adapted and isinstance(model, nn.Module):
            # TRL would load it anew from the name in the config, whatever weights the model has by now.
            ref_model = copy.deepcopy(model).requires_grad_(False).eval()
        return ref_model

    def _attach_scoring(self) -> None:
        """Let policy and reference score tokens (``align.models.scoring``)."""
        if self.aux_loss_enabled:
            raise ValueError("mixture-of-experts auxiliary losses are not added here: pass router_aux_loss_coef=0")
        for scored in filter(None, (self.model, self.ref_model)):
            attach_scoring(scored.get_base_model() if isinstance(scored, PeftModel) else scored)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return dataset

    # --- rows ---------------------------------------------------------------------------------------------------

    def _choose_rows(self, model: nn.Module, shared_prompt: bool, packing: bool, answers: str) -> None:
        """Shared prompts and packing where they are wanted and the architecture allows them.

        Args:
            answers: to a prompt, in words, for the log.
        """
        reason = why_not_shared_prompt(model)
        if shared_prompt and reason:
            logger.warning("separate rows for %s: %s", answers, reason)
        self.layout = layout_of(model, shared_prompt=shared_prompt, packing=packing)
        if self.layout["row_tokens"] is not None:
            self.rows_said = "packed"
        elif self.layout["shared_prompt"]:
            self.rows_said = "shared prompt: packing is off"
        else:
            self.rows_said = f"separate: {reason if shared_prompt else 'shared_prompt is off'}"

    def _count_tokens(self, seen: float, positions: float) -> None:
        """Add the rows of a training batch, over all processes, to what is trained on."""
        self._total_train_tokens += int(seen)
        held, of = self.positions
        self.positions = held + int(seen), of + int(positions)

    @property
    def speed_facts(self) -> dict[str, Any]:
        """What section ``speed`` of the manifest says of the rows trained on."""
        if self.rows_said is None:
            return {}
        held, of = self.positions
        return {"rows": self.rows_said, **({"padding": round(1 - held / of, 4)} if of else {})}

    # --- reference ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[nn.Module]:
        """The reference: its own model, or the policy with its adapters off (or set to the frozen copy), or, before
        the first step of full training that keeps no copy, the policy itself.

        Raises:
            AlignError: nothing of it is left.
        """
        with torch.no_grad(), self.accelerator.autocast():
            if self.ref_model is not None:
                yield self.ref_model
                return
            inner = self.accelerator.unwrap_model(self.model)
            if not isinstance(inner, PeftModel):
                if self.state.global_step > 0:
                    raise AlignError(
                        "full training with reference_cache keeps no copy of the reference, and these rows were not "
                        "there when the trainer was made: give them as eval_dataset then, or leave reference_cache out"
                    )
                yield inner
                return
            with use_adapter(inner, "ref" if "ref" in inner.peft_config else None):
                yield self.model

    def _check_step_zero(self, policy: TokenLogps, reference_logps: torch.Tensor, kept_in: Path | None = None) -> None:
        """At the first step of a fresh run the policy is the reference, token by token.

        Args:
            kept_in: where the reference's log-probs are from, if they were not computed with this batch. They were
                then rounded in another one, by up to a tenth of a nat in bf16: in half precision the mean is checked.
        """
        if self._checked_step_zero or not self.model.training:
            return
        self._checked_step_zero = True
        if not self.starts_at_reference or self.state.global_step > 0:
            return
        gaps = (policy.logps.detach() - reference_logps).abs()
        computed_in = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else self.model.dtype
        rounded = kept_in is not None and computed_in.itemsize == 2
        gap = float(gaps.mean() if rounded else gaps.max())
        tolerance = STEP_ZERO_TOLERANCE[computed_in]
        if not gap <= tolerance:
            dropped = [
                f"{name} {value:g}"
                for name, value in self.model.config.to_dict().items()
                if "drop" in name and isinstance(value, float) and value > 0
            ]
            far = f"{gap:.3g}" if rounded else f"up to {gap:.3g}"
            kind = str(computed_in).removeprefix("torch.")
            raise AlignError(
                f"before the first step, policy and reference differ by {far} nats a token{' on average' * rounded} "
                f"(at most {tolerance:g} in {kind}): the reference is not the model that "
                "training starts from. Check the adapter and the reference weights"
                + f", and the dropout of the model's config ({', '.join(dropped)}): set it to 0" * bool(dropped)
                + f"; where the reference was read from {kept_in}, delete that" * bool(kept_in)
                + "; if another reference is meant, say starts_at_reference=False"
            )

    # --- checkpoints --------------------------------------------------------------------------------------------

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: TRL's card names its own method, whatever the loss is. A run writes its own."""

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
        with disable_input_dtype_casting(self.model, active=autocast and not self.samples):
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


def refuse_what_would_be_dropped(args: Any, not_taken: NotTaken, trainer: str) -> None:
    """Raise a ValueError that lists the arguments which say something that the trainer does not read."""
    problems = [
        f"{field}={getattr(args, field)!r}: {instead}"
        for field, off, instead in not_taken
        if getattr(args, field) != off
    ]
    if problems:
        kind = next(c.__name__ for c in type(args).__mro__ if c.__module__.startswith("trl."))
        raise ValueError(f"arguments of {kind} that {trainer} does not take:\n  " + "\n  ".join(problems))


def loss_with_beta(given: Any, beta: float, default: float) -> Loss:
    """A loss by name or function, with the arguments' ``beta`` where that is not their default; a Loss as it is."""
    loss = Loss.of(given)
    if not isinstance(given, Loss) and "beta" in loss.info.parameters:
        if beta != default:
            loss = Loss(loss.info, {**loss.settings, "beta": beta})
        logger.info("%s with beta %g", loss.info.name, loss.settings["beta"])
    return loss


def ranked_right(margins: torch.Tensor, preference: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pairs are ranked as their labels say, and which labels say anything, (B,) each.

    As in TRL, a tie of the model is not a win. A tie of the label, 0.5, can be neither right nor wrong.
    """
    if preference is None:
        return margins > 0, torch.ones_like(margins, dtype=torch.bool)
    decided = preference != 0.5
    return torch.where(preference > 0.5, margins > 0, margins < 0) & decided, decided
