"""A trainer on pairs that reads the reference's log-probs where they are kept, and keeps what it has computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from align.losses.rows import Rows
from align.models.scoring import score

from .collate import by_answer, rows_of
from .host import Hosted
from .logp_shards import Answers, LogpShards
from .reference_cache import KeepScored, ReferenceCache, context_of, sees_half


class ReadsReferences(Hosted):
    """Goes before ``DPOTrainer`` in the bases of a trainer; ``align.trainers.reference_cache`` says how it works.

    Attributes:
        references: what was read and computed; None without a cache, or where no loss needs a reference.
    """

    references: ReferenceCache | None = None
    # Set by TRL's trainer.
    train_dataset: Any
    eval_dataset: Any

    _all_cached = False

    @property
    def keeps_no_reference(self) -> bool:
        """Whether the reference is there as log-probs alone."""
        kept = self.ref_model is not None or isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
        return self.needs_reference and not kept

    @property
    def speed_facts(self) -> dict[str, Any]:
        """With where the reference's log-probs came from, and what that took before the first step."""
        facts: dict[str, Any] = super().speed_facts
        if self.references is None:
            return facts
        seconds = round(self.references.seconds, 1)
        return {**facts, "reference": {**self.references.rows, "seconds": seconds}}

    def _plan_references(self, args: Any, rows: int) -> None:
        """Decide, before ``super().__init__``, whether all log-probs are to be there before the first step.

        Args:
            rows: of training.
        """
        if args.sync_ref_model:
            raise ValueError("reference_cache is of a reference that stays as it is: leave it out, or sync_ref_model")
        self._all_cached = sees_half(args, rows)

    def _read_references(self, folder: Path) -> None:
        """Give the data sets the columns of ``reference_cache``; the policy still is what training starts from."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("FSDP and DeepSpeed: reference_cache reads and scores whole models; leave it out")
        model = self.accelerator.unwrap_model(self.model if self.ref_model is None else self.ref_model)
        adapters = list(model.active_adapters) if isinstance(model, PeftModel) else []
        if self.ref_model is None and adapters:
            adapters = [name for name in ("ref",) if name in model.peft_config]
        context = context_of(
            model,
            adapters,
            rows="shared prompt" if self.layout["shared_prompt"] else "separate",
            autocast=self.accelerator.mixed_precision,
        )
        batch_size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        cache = ReferenceCache(LogpShards(folder, context), self._scored_by_reference, batch_size, self.accelerator)
        self.train_dataset = cache.filled(self.train_dataset, "train", complete=self._all_cached)
        evaluates = self.args.eval_strategy != "no" or self.args.eval_on_start or self.keeps_no_reference
        if isinstance(self.eval_dataset, dict):
            named = self.eval_dataset.items()
            self.eval_dataset = {name: cache.filled(rows, name, complete=evaluates) for name, rows in named}
        elif self.eval_dataset is not None:
            self.eval_dataset = cache.filled(self.eval_dataset, "eval", complete=evaluates)
        self.references = cache
        self.add_callback(KeepScored(cache))

    def _scored_by_reference(self, examples: Sequence[Mapping[str, Any]]) -> list[Answers]:
        rows = rows_of(self.data_collator(examples)).to(self.args.device)
        training = self.model.training
        self.model.eval()
        with self._as_reference() as reference_model:
            logps = score(reference_model, rows).logps.float().cpu()
        self.model.train(training)
        parts = by_answer(rows.answer.cpu(), logps)
        return list(zip(parts[: len(examples)], parts[len(examples) :], strict=True))

    def _reference_logps(self, rows: Rows, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """From the batch where its rows have them, else by the reference; what is in the cache is taken as it is."""
        known, keys = inputs.get("reference_logps"), inputs.get("reference_keys")
        pairs = rows.answers // 2
        if known is not None and keys is None:
            fresh, logps = [], known
        else:
            with self._as_reference() as reference_model:
                logps = score(reference_model, rows).logps
            fresh = list(range(pairs))
            if known is not None:
                fresh = [pair for pair in fresh if bool(known[rows.answer == pair][0].isnan())]
                logps = torch.where(known.isnan(), logps, known)
        if self.references is None:
            return logps
        if keys is not None and fresh:
            parts = by_answer(rows.answer.cpu(), logps.float().cpu())
            self.references.keep({bytes(keys[pair].tolist()): (parts[pair], parts[pairs + pair]) for pair in fresh})
        if self.model.training and not self._all_cached:
            self.references.rows.update(cached=pairs - len(fresh), computed=len(fresh))
        return logps
