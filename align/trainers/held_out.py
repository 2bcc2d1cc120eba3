"""How an online run does on held-out prompts: its answers against those of the model before training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from trl.trainer.utils import use_adapter

from align.data.tokenize import encode_prompt
from align.evals.sampling import Sample
from align.losses import SequenceLogps
from align.losses.rows import answer_rows
from align.models.memory import release_freed
from align.models.scoring import score

if TYPE_CHECKING:
    from .online import OnlineTrainer


class HeldOut:
    """What ``OnlineTrainer.evaluate`` measures.

    Args:
        trainer: its trainer.
    """

    def __init__(self, trainer: OnlineTrainer) -> None:
        self.trainer = trainer
        self._answers: tuple[list[list[int]], list[Sample]] | None = None

    @property
    def has_start(self) -> bool:
        """Whether the model before training can be had: a fresh adapter switched off, or a reference that stays."""
        return self.trainer.fresh_adapter or not self.trainer.moving

    def check(self) -> None:
        """Raise a ValueError where the model before training cannot be had."""
        if not self.has_start:
            raise ValueError(
                "held-out answers are compared with the model before training, of which nothing is kept where the "
                "reference moves: train a fresh adapter, or keep that model and compare with it after training, as "
                "a recipe's evals: [generation] does"
            )

    @contextlib.contextmanager
    def _start(self) -> Iterator[Any]:
        trainer = self.trainer
        inner = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.fresh_adapter and isinstance(inner, PeftModel):
            with torch.no_grad(), trainer.accelerator.autocast(), use_adapter(inner, None):
                yield trainer.model
        else:
            with trainer._as_reference() as reference:
                yield reference

    def measure(self, rows: list[Mapping[str, Any]]) -> dict[str, float]:
        """Answers of the policy to the prompts, and those of the model before training, compared by the annotator.

        Returns:
            ``win_rate`` with its standard error, ``kl`` (k1, nats an answer), ``entropy`` (nats a token), ``length``
            (tokens) and ``truncated``, the share of answers that were cut.

        Raises:
            ValueError: the model before training cannot be had. AlignError: the annotator fails.
        """
        self.check()
        trainer = self.trainer
        prompts = [encode_prompt(row["prompt"], trainer.tokenizer) for row in rows]
        own = trainer.sampled(prompts, trainer.args.seed)
        if self._answers is None or self._answers[0] != prompts:
            with self._start() as start:
                self._answers = prompts, trainer.by_transformers(start, prompts, trainer.args.seed + 1)
        both = [[mine.text, theirs.text] for mine, theirs in zip(own, self._answers[1], strict=True)]
        wins = trainer.jury.of_evaluation(rows, both).preference[:, 0, 1]
        wins = wins[~wins.isnan()]
        logps, base, entropy = self._scored(prompts, own)
        release_freed()
        return {
            "win_rate": float(wins.mean()),
            "win_rate_se": float(wins.std() / math.sqrt(len(wins))) if len(wins) > 1 else math.nan,
            "kl": float((logps.total - base.total).mean()),
            "entropy": entropy,
            "length": float(logps.length.float().mean()),
            "truncated": sum(not answer.finished for answer in own) / len(own),
        }

    @torch.no_grad()
    def _scored(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sample]
    ) -> tuple[SequenceLogps, SequenceLogps, float]:
        """Log-probs of answers under the policy and under the start, and the policy's mean entropy a token."""
        trainer = self.trainer
        pad, size = int(trainer.tokenizer.pad_token_id), trainer.args.per_device_eval_batch_size
        policy, base, entropies = [], [], []
        training = trainer.model.training
        trainer.model.eval()
        for at in range(0, len(prompts), size):
            ids = [answer.tokens for answer in answers[at : at + size]]
            packed = trainer.layout["row_tokens"]
            rows = answer_rows(prompts[at : at + size], ids, pad_token_id=pad, row_tokens=packed)
            rows = rows.to(trainer.args.device)
            with trainer.accelerator.autocast():
                tokens = score(trainer.model, rows)
            policy.append((rows.totals(tokens.logps), rows.lengths()))
            entropies.append(tokens.entropy.float())
            with self._start() as start:
                base.append((rows.totals(score(start, rows).logps), rows.lengths()))
        trainer.model.train(training)
        own, theirs = (
            SequenceLogps(torch.cat([total for total, _ in parts]), torch.cat([length for _, length in parts]))
            for parts in (policy, base)
        )
        return own, theirs, float(torch.cat(entropies).mean())
