"""Training on K answers to each prompt and on what they are worth against each other.

The answers and their verdicts are in the batch: drawn and judged by ``online`` as the policy learns, or read from data
(``align.data.groups``). What the loss is computed on:

- a pair loss with soft labels (``ipo``, ``dpo``, ``slic``, ...): all K (K - 1)/2 pairs, with the probability that the
  first is preferred;
- ``gpo`` and ``sppo``: the group, with each answer's mean score, or win rate, against all K of it, the 0 or 1/2
  against itself counted (``Group.share``); their pointwise forms: against the K - 1 others;
- ``nash_md_pg``: the first answer, the policy's, with its probability of beating the second, the mixture's;
- ``mdpo``: the tokens of all answers, with their answer's advantage, which is its win rate over 1/2 less
  ``kl_penalty`` times its log-ratio to the reference over the mean one of the others.

A step's loss is the mean over all its pairs, groups or tokens, however they are spread over micro-batches and
processes, and whatever an annotator has set aside.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from align.losses import Loss, LossOutput, PairLogps, SequenceLogps
from align.losses.catalogue import KINDS, LossFunction
from align.losses.groups import all_pair_values, all_pairs
from align.losses.logprobs import TokenLogps
from align.losses.rows import PADDING, Rows, group_rows
from align.models.scoring import score

from .host import Hosted
from .moving import MovingReference

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """K answers to a prompt.

    Args:
        prompt_ids, answer_ids: token ids; answers with their end token where they have ended.
        preference: probability that answer i is preferred to j, (K, K); NaN where nobody said. None where only scores
            are known.
        scores: mean log-odds of each answer against the others, (K,); NaN where nobody said.
        win_rates: mean probability of beating the others, (K,), likewise.
        behaviour: log-probs of each answer's tokens under the policy that drew it, nats; for mdpo.
        compared: how many answers were compared, where these are the chosen ones of more; None: these alone.
    """

    prompt_ids: Sequence[int]
    answer_ids: Sequence[Sequence[int]]
    preference: Tensor | None
    scores: Tensor
    win_rates: Tensor
    behaviour: Sequence[Sequence[float]] | None = None
    compared: int | None = None

    @property
    def share(self) -> float:
        """(K - 1)/K, which takes a mean over the others to one over all K, itself counted.

        Regression on differences wants the latter: means over the others hold what two answers are worth against each
        other twice, and of answers of one policy make the step K/(K - 1) times as long. With it ``sppo`` has, pair by
        pair, the gradient of IPO with soft labels.
        """
        count = self.compared or len(self.answer_ids)
        return (count - 1) / count

    @classmethod
    def of(
        cls, prompt_ids: Sequence[int], answer_ids: Sequence[Sequence[int]], preference: Tensor, scores: Tensor
    ) -> Group:
        """From the tables of an annotator, (K, K) each; an answer with a pair that was set aside has no mean."""
        others = len(preference) - 1
        return cls(prompt_ids, answer_ids, preference, scores.sum(1) / others, (preference.sum(1) - 0.5) / others)


class GroupedTrainer(Hosted, Trainer):  # type: ignore[misc]
    """transformers' Trainer on groups of answers.

    Args:
        model: policy, a causal model, PEFT or not.
        args: transformers' ``TrainingArguments``.
        loss: a pair loss with soft labels or a self-play loss, by name, function, or with its settings.
        tokenizer: pads rows and decodes answers.
        peft_config: adapter to add to the model.
        reference: ``fixed``, the model before training; ``ema`` or ``previous``, see ``MovingReference``.
        decay: of ``ema``, per optimiser step.
        every: optimiser steps between copies of the policy, of ``previous``.
        shared_prompt: the prompt once for all its answers, where the architecture allows it.
        packing: several groups in a row, where prompts are shared.
        kl_penalty: of ``mdpo``, in win rate per nat.
        kwargs: as in ``Trainer``.

    Attributes:
        fresh_adapter: ``peft_config`` was given: with its adapter off the model is what training started from.

    Raises:
        ValueError: a loss of another kind, or a setting out of range.
    """

    needs_reference = True  # for the KL that is logged, whatever the loss is
    starts_at_reference = True
    aux_loss_enabled = False

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: TrainingArguments,
        *,
        loss: str | LossFunction | Loss,
        tokenizer: PreTrainedTokenizerBase,
        peft_config: LoraConfig | None = None,
        reference: str = "fixed",
        decay: float = 0.99,
        every: int = 1,
        shared_prompt: bool = True,
        packing: bool = True,
        kl_penalty: float = 0.0,
        train_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        self.group_loss = check_loss(Loss.of(loss))
        self.takes = inspect.signature(self.group_loss.info.function).parameters
        self.kl_penalty = kl_penalty
        continued = isinstance(model, PeftModel)
        self.fresh_adapter = peft_config is not None
        self.ref_model: Any = None
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        self.moving = MovingReference(reference, decay, every)
        if isinstance(model, PeftModel) and (continued or self.moving):
            self.moving.add_adapter(model)
        _without_dropout(model)  # the reference's adapter too, and a copy has none
        if not isinstance(model, PeftModel):
            self.ref_model = copy.deepcopy(model).requires_grad_(False).eval()
        args = copy.copy(args)
        args.remove_unused_columns = False
        super().__init__(model=model, args=args, train_dataset=train_dataset, processing_class=tokenizer, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "FSDP and DeepSpeed: answers are drawn from, and references kept of, whole models; train without"
            )
        self.model_accepts_loss_kwargs = True  # a step's loss is divided by its pairs, here, and not by micro-batches
        if self.ref_model is not None:
            self.ref_model.to(self.args.device)
        self.tokenizer = tokenizer
        self._sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._total_train_tokens = 0
        self._attach_scoring()
        self._choose_rows(self._inner(), shared_prompt, packing, "the answers to a prompt")

    def _inner(self) -> Any:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    # --- batches ------------------------------------------------------------------------------------------------

    def lay_out(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """The tensors of one forward pass."""
        kept = 1 if self._against else len(groups[0].answer_ids)  # the second answer is an opponent, and not learnt
        shares = torch.tensor([group.share if self._on_differences else 1.0 for group in groups])[:, None]
        scores = torch.stack([group.scores[:kept] for group in groups]).float()
        win_rates = torch.stack([group.win_rates[:kept] for group in groups]).float()
        # Win rates come first: the Trainer reads the size of a batch off its first tensor.
        batch = {
            "win_rates": 0.5 + (win_rates - 0.5) * shares,
            "scores": scores * shares,
            **self.rows([group.prompt_ids for group in groups], [g.answer_ids[:kept] for g in groups]).tensors(),
        }
        if all(group.preference is not None for group in groups):
            batch["preference"] = torch.stack([group.preference for group in groups if group.preference is not None])
        if "advantage" in self.takes:
            # As the rows' tokens: answer by answer after a shared prompt, else all first answers first.
            in_order = (
                [own for group in groups for own in group.behaviour or ()]
                if self.layout["shared_prompt"]
                else [(group.behaviour or ())[k] for k in range(kept) for group in groups]
            )
            batch["behaviour"] = torch.tensor([logp for own in in_order for logp in own])
        return batch

    def rows(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]) -> Rows:
        """Prompts and their answers, laid out as this model takes them."""
        return group_rows(prompts, answers, pad_token_id=int(self.tokenizer.pad_token_id), **self.layout)

    @property
    def _against(self) -> bool:
        """Whether the loss is on the first answer, against the second."""
        return self.group_loss.info.kind == "selfplay" and "preference" in self.takes

    @property
    def _on_differences(self) -> bool:
        """Whether differences of log-ratios are regressed on those of scores or win rates."""
        regresses = bool({"scores", "win_rates"} & self.takes.keys())
        return regresses and not self.group_loss.info.name.endswith("_pointwise")

    def units(self, batch: Mapping[str, Tensor]) -> int:
        """Pairs, groups, answers or tokens of a batch that the loss has a value of."""
        if "advantage" in self.takes:
            answers = self._complete(batch).T.flatten()
            return int(answers[batch["answer"]].sum())
        if "preference" in self.takes:
            values = batch["preference"][:, 0, 1] if self._against else all_pair_values(batch["preference"])
            return int((~values.isnan()).sum())
        pointwise = self.group_loss.info.name.endswith("_pointwise")
        judged = self._complete(batch)
        return int(judged.sum() if pointwise else judged.all(1).sum())

    def _complete(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Which groups have a number of every answer, as a mask of their answers, (B, K)."""
        values = batch["scores" if "scores" in self.takes else "win_rates"]
        return (~values.isnan().any(1, keepdim=True)).expand_as(values)

    # --- loss ---------------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The micro-batches of a step, and over how many units of all processes its loss is a mean."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        batches = self.judged(batches) if batches else batches
        units = torch.tensor(sum(self.units(batch) for batch in batches), device=self.args.device)
        return batches, max(1, int(self.accelerator.reduce(units, reduction="sum")))

    def judged(self, batches: list[Any]) -> list[dict[str, Tensor]]:
        """Batches as the data has them to those that the loss is computed on."""
        return [self.lay_out(batch) for batch in batches]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Any:
        if return_outputs:
            raise ValueError("compute_metrics would need logits, and none are built")
        rows = Rows.of(inputs, inputs["win_rates"].numel())
        tokens = score(model, rows)
        with self._as_reference() as reference_model:
            reference = score(reference_model, rows)
        self._check_step_zero(tokens, reference.logps)
        output = self._output(rows, tokens, reference, inputs)
        self._record(rows, tokens, reference, output, inputs)
        total = output.loss.sum() if output is not None else 0.0 * tokens.logps.sum()
        # Gradients are averaged over processes, of which each has its own part of the sum.
        return total * (self.accelerator.num_processes / (num_items_in_batch or 1))

    def _output(
        self, rows: Rows, tokens: TokenLogps, reference: TokenLogps, inputs: Mapping[str, Tensor]
    ) -> LossOutput | None:
        """The loss of the batch's units; None where it has none."""
        shape = inputs["win_rates"].shape
        policy, base = _grouped(rows, tokens.logps, shape), _grouped(rows, reference.logps, shape)
        info, settings = self.group_loss.info, self.group_loss.settings
        judged = self._complete(inputs)
        if "advantage" in self.takes:
            penalty = self.kl_penalty * (policy.total - base.total).detach()
            advantage = inputs["win_rates"] - 0.5 - _over_others(penalty)
            kept = judged.T.flatten()[rows.answer]
            own = advantage.T.flatten()[rows.answer]
            if not bool(kept.any()):
                return None
            return info.function(tokens.logps[kept], inputs["behaviour"][kept], own[kept], **settings)
        if self._against:
            kept = ~inputs["preference"][:, 0, 1].isnan()
            first = [SequenceLogps(one.total[:, 0][kept], one.length[:, 0][kept]) for one in (policy, base)]
            if not bool(kept.any()):
                return None
            return info.function(*first, inputs["preference"][:, 0, 1][kept], **settings)
        if "preference" in self.takes:
            labels = all_pair_values(inputs["preference"])
            kept = ~labels.isnan()
            if not bool(kept.any()):
                return None
            both = [_of(all_pairs(one), kept) for one in (policy, base)]
            return self.group_loss(both[0], both[1] if self.group_loss.reference else None, labels[kept])
        kept = judged.all(1)
        if not bool(kept.any()):
            return None
        groups = [SequenceLogps(one.total[kept], one.length[kept]) for one in (policy, base)]
        values = inputs["scores" if "scores" in self.takes else "win_rates"][kept]
        return info.function(*groups, values, **settings)

    # --- metrics ------------------------------------------------------------------------------------------------

    def _record(
        self,
        rows: Rows,
        tokens: TokenLogps,
        reference: TokenLogps,
        output: LossOutput | None,
        inputs: Mapping[str, Tensor],
    ) -> None:
        """Add a batch to what is logged next, as sums and what they are divided by."""
        log_ratio = (tokens.logps.detach() - reference.logps).float()
        per_token = {"kl/k1": log_ratio, "kl/k3": torch.expm1(-log_ratio) + log_ratio}
        for name, values in per_token.items():
            self.count(name, rows.totals(values).sum(), rows.answers)
        self.count("entropy", tokens.entropy.float().sum(), len(rows.answer))
        self.count("length/tokens", rows.lengths().sum(), rows.answers)
        if output is not None and self.group_loss.info.kind == "pair":
            labels = all_pair_values(inputs["preference"])
            labels = labels[~labels.isnan()]
            margins = output.chosen_rewards - output.rejected_rewards
            decided = labels != 0.5
            right = torch.where(labels > 0.5, margins > 0, margins < 0) & decided
            self.count("rewards/margins", (margins * (2 * labels - 1).sign()).sum(), len(labels))
            self.count("rewards/accuracies", right.sum(), int(decided.sum()))
        for name, values in output.metrics.items() if output is not None else ():
            self.count(name, values.sum(), values.numel())
        self.count(_TOKENS, (rows.segments != PADDING).sum(), rows.segments.numel())

    def count(self, name: str, total: Tensor | float, of: int) -> None:
        """Add to a mean that is logged next."""
        sums = self._sums[name]
        sums[0] += float(total)
        sums[1] += of

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums:
            names = sorted(self._sums)
            sums = torch.tensor([self._sums[name] for name in names], dtype=torch.float64, device=self.args.device)
            reduced = dict(zip(names, self.accelerator.reduce(sums, reduction="sum").tolist(), strict=True))
            seen, positions = reduced.pop(_TOKENS)
            self._count_tokens(seen, positions)
            logs |= {name: total / of for name, (total, of) in reduced.items() if of}
            logs["perf/padding"] = 1 - seen / positions
            logs["num_tokens"] = float(self._total_train_tokens)
            self._sums.clear()
        super().log(logs, start_time)


def _without_dropout(model: nn.Module) -> None:
    """Turn it off: policy and reference are compared token by token, and dropout would be most of the difference."""
    found = False
    for module in model.modules():
        numbers = {name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)}
        for name in numbers | ({"p"} if isinstance(module, nn.Dropout) else set()):
            found |= getattr(module, name) > 0
            setattr(module, name, 0.0)
    if found:
        logger.warning("dropout is switched off: policy and reference are compared token by token")


_TOKENS = "num_tokens"


def check_loss(loss: Loss) -> Loss:
    """The loss, where it can be trained on groups.

    Raises:
        ValueError: it cannot.
    """
    if loss.info.kind == "selfplay" or (loss.info.kind == "pair" and loss.info.soft):
        return loss
    why = "takes sure labels alone" if loss.info.kind == "pair" else f"takes {KINDS[loss.info.kind]}"
    raise ValueError(
        f"loss: {loss.info.name} {why}; on groups of answers train self-play losses, or pair losses with soft labels"
    )


def _grouped(rows: Rows, token_logps: Tensor, shape: torch.Size) -> SequenceLogps:
    """Totals and lengths, (B, K)."""
    b, k = shape
    return SequenceLogps(rows.totals(token_logps).reshape(k, b).T, rows.lengths().reshape(k, b).T)


def _over_others(values: Tensor) -> Tensor:
    """Each value less the mean of the others in its group, (B, K). With its own in that mean it would count less."""
    others = (values.sum(1, keepdim=True) - values) / (values.shape[1] - 1)
    return values - others


def _of(pairs: PairLogps, kept: Tensor) -> PairLogps:
    chosen, rejected = (SequenceLogps(one.total[kept], one.length[kept]) for one in (pairs.chosen, pairs.rejected))
    return PairLogps(chosen, rejected)
