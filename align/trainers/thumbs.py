"""Training on answers with a thumb up or down (BCO, KTO), in TRL's KTOTrainer.

What is TRL's: arguments, PEFT, reference model, checkpoints, logging, the loop. What is ours: the rows, the log-probs
(completion tokens only), the loss with the state that it needs, its metrics, and the check at the first step that
policy and reference agree. ``tests/align/trainers/test_trl_contract.py`` names every private attribute of TRL that is
used here.

A loss says by the names of its arguments what it needs beside the log-probs:

- ``shift`` (bco): the reward shift. It takes in the whole batch of an optimiser step before it is used, over all
  processes and micro-batches, in training alone; evaluation finds it as training left it. It lies in every checkpoint.
  With gradient accumulation the micro-batches are scored once more, without gradient, before the first of them is
  trained on: one more forward pass of the policy, none of the reference.
- ``kl`` (kto): the mean log-ratio of mismatched answers of the batch in hand. As in TRL, an answer goes to the next
  prompt of its batch, and the pairs are made once: batches have two rows or more, and rows keep their order.
- ``weight`` (bco): weights of thumbs down, where ``match_prompts`` asks for them.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import KTOConfig, KTOTrainer

from align.data.thumbs import check_both_thumbs, thumb_table, tokenize_thumbs
from align.errors import AlignError
from align.losses import Loss, SequenceLogps
from align.losses.binary import RewardShift, ShiftMode, kto_kl
from align.losses.catalogue import KINDS, LossFunction
from align.losses.checks import check_whole
from align.losses.types import LARGEST, UnpairedLogps
from align.models.scoring import score
from align.rewards.density import DensityRatio

from .by_length import LengthGrouped
from .given import check_dataset, tokenized_dataset, untokenized_rows
from .host import Hosted, loss_with_beta, refuse_what_would_be_dropped
from .matching import (
    DENSITY,
    Embed,
    Encoder,
    fit_density,
    hidden_state_encoder,
    load_density,
    text_encoder,
    with_weights,
)
from .thumbs_collate import ThumbsCollator, rows_of, with_mismatched
from .thumbs_loss import sequences, thumbs_output, thumbs_rewards, warn_of_unequal_thumbs
from .thumbs_metrics import batch_sums, named_means

logger = logging.getLogger(__name__)

SHIFT = "reward_shift.safetensors"  # in a checkpoint
_ROW = ("prompt_ids", "completion_ids", "label")

# KTOConfig's own settings that would be dropped here: (field, value that means "off", what to do instead).
_NOT_TAKEN: list[tuple[str, Any, str]] = [
    ("loss_type", "kto", "name the loss: ThumbsTrainer(loss=...)"),
    ("desirable_weight", 1.0, 'give it with the loss: Loss.of("kto", desirable_weight=...)'),
    ("undesirable_weight", 1.0, 'give it with the loss: Loss.of("kto", undesirable_weight=...)'),
    ("precompute_ref_log_probs", False, "the reference is scored with each batch"),
    ("pad_to_multiple_of", None, "rows are padded to the widest of their batch"),
]


class ThumbsTrainer(LengthGrouped, Hosted, KTOTrainer):  # type: ignore[misc]
    """TRL's KTOTrainer with the library's losses on thumbs; it stands where ``KTOTrainer(...)`` stood.

    Rows are ``prompt, completion, label`` or pairs, which are unpaired. A batch may hold one thumb alone.

    Args:
        model, ref_model: as in ``PairTrainer``.
        args: TRL's ``KTOConfig``. A ``beta`` that is not KTOConfig's own default counts for a loss given by name or
            function. ``train_sampling_strategy`` is "sequential" there; give "random" or
            "group_by_length" (``by_length``) for bco, which needs no order.
        loss: ``"bco"``, ``"kto"``, ``Loss.of("bco", beta=0.2)``, or a loss on thumbs of your own.
        shift, decay: of bco's ``RewardShift``.
        match_prompts: weigh thumbs down by how likely their prompts are among the thumbs up. True embeds prompts by
            the reference's last hidden states (mean over the prompt's tokens); a function of texts embeds them itself.
            Fitted once, when training starts, and kept as ``density.json`` in ``output_dir``; a resumed run reads it
            there. Evaluation without training fits for itself and keeps nothing.
        density_ratio: least and largest weight.
        density_prompts: prompts of each thumb, at most, that the weights are fitted on.
        starts_at_reference: as in ``PairTrainer``.
        kwargs: as in ``KTOTrainer``.

    Raises:
        ValueError: an argument that this trainer would have to drop, or a loss that is not one on thumbs.
        AlignError: the training data has thumbs of one kind alone.
    """

    # Set by TRL's trainer.
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: KTOConfig | None = None,
        *,
        loss: str | LossFunction | Loss = "bco",
        shift: ShiftMode = "balanced_ema",
        decay: float = 0.9,
        match_prompts: bool | Encoder = False,
        density_ratio: tuple[float, float] = (0.5, 10.0),
        density_prompts: int = 1024,
        starts_at_reference: bool = True,
        **kwargs: Any,
    ) -> None:
        default = KTOConfig.__dataclass_fields__["beta"].default
        self.loss = loss_with_beta(loss, default if args is None else args.beta, default)
        if self.loss.info.kind != "thumbs":
            raise ValueError(f"{self.loss.info.name} is not a loss on thumbs: it takes {KINDS[self.loss.info.kind]}")
        takes = inspect.signature(self.loss.info.function).parameters
        self.needs_kl = "kl" in takes
        args = KTOConfig("tmp_trainer") if args is None else copy.copy(args)
        refuse_what_would_be_dropped(args, _NOT_TAKEN, "ThumbsTrainer")
        if kwargs.get("data_collator") is not None:
            raise ValueError("data_collator: the rows of an answer are laid out here; leave it out")
        if match_prompts and "weight" not in takes:
            raise ValueError(f"match_prompts: {self.loss.info.name} takes no weights; bco does")
        _check_density(density_ratio, density_prompts)
        if shift not in get_args(ShiftMode):
            raise ValueError(f"shift is {shift!r}: it must be {' or '.join(get_args(ShiftMode))}")
        self._order(args)
        self.needs_reference = self.loss.reference
        self.starts_at_reference = starts_at_reference
        self.shift = RewardShift(shift, decay) if "shift" in takes else None
        self.density: DensityRatio | None = None
        self.match_prompts = match_prompts
        self._density_settings = (density_prompts, density_ratio)

        adapted = isinstance(model, PeftModel) or kwargs.get("peft_config") is not None
        ref_model = self._reference_to_give(model, ref_model, args, adapted)
        super().__init__(model=model, ref_model=ref_model, args=args, **kwargs)
        self._attach_scoring()
        self.data_collator = ThumbsCollator(self._tokenizer.pad_token_id)

    def _order(self, args: KTOConfig) -> None:
        """Hold KTO to batches of two and a fixed order; leave the others free of both."""
        name = self.loss.info.name
        if not self.needs_kl:
            args.loss_type = "apo_zero_unpaired"  # of KTOTrainer's two, the one that makes no mismatched answers
            if args.train_sampling_strategy == "sequential":
                logger.warning(
                    "rows are taken in their order (KTOConfig's train_sampling_strategy='sequential'), which %s does "
                    "not need; 'random' shuffles them",
                    name,
                )
            return
        rule = f"{name} scores each prompt with the answer of another row of its batch"
        if args.per_device_train_batch_size < 2:
            raise ValueError(
                f"per_device_train_batch_size is {args.per_device_train_batch_size}: {rule}, so 2 or more"
            )
        if args.train_sampling_strategy != "sequential":
            raise ValueError(
                f"train_sampling_strategy is {args.train_sampling_strategy!r}: {rule}, and these are made once: "
                "'sequential' keeps rows together; shuffle the data set before"
            )

    # --- data ---------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: KTOConfig, dataset_name: str) -> Dataset:
        """Rows of text or messages to token ids, by the rules of ``align.data``; tokenised rows as they are."""
        check_dataset(dataset, dataset_name)
        if not set(_ROW) <= set(dataset.column_names):
            table = thumb_table(untokenized_rows(dataset, dataset_name), dataset_name)
            tokenized = tokenize_thumbs(table.rows, processing_class, args.max_length)
            dataset = tokenized_dataset(table, tokenized, dataset_name)
            if self.needs_kl and table.counts["unpaired"]:
                # The two answers of a pair stand side by side, and neither is a mismatched answer to their prompt.
                dataset = dataset.shuffle(seed=args.seed)
        if "weight" in dataset.column_names and "weight" not in inspect.signature(self.loss.info.function).parameters:
            raise ValueError(f"{dataset_name}: a column weight, and {self.loss.info.name} takes no weights; bco does")
        wrong = [number for number, label in enumerate(dataset["label"]) if label not in (True, False)]
        if wrong:
            raise ValueError(f"{dataset_name}: label[{wrong[0]}] is {dataset['label'][wrong[0]]!r}: true or false")
        if dataset_name == "train":
            check_both_thumbs(dataset["label"], "train_dataset")
            warn_of_unequal_thumbs(self.loss, dataset["label"])
        if self.needs_kl and "KL_completion_ids" not in dataset.column_names:
            dataset = with_mismatched(dataset, args.per_device_train_batch_size, args.max_length)
        return dataset if self.density is None else self._with_weights(dataset)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = [*_ROW, "KL_completion_ids", "weight"]

    # --- weights ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        path = Path(self.args.output_dir) / DENSITY
        if self.match_prompts and resume_from_checkpoint:
            self._weigh(load_density(path, self._density_settings[1]))
        elif self.match_prompts:
            density = self._fitted()
            if self.is_world_process_zero():
                path.parent.mkdir(parents=True, exist_ok=True)
                density.save(path)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.match_prompts:
            self._fitted()
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def _fitted(self) -> DensityRatio:
        """The density ratio of this trainer's data, fitted at the first call, with its weights beside the rows."""
        if self.density is None:
            sample, bounds = self._density_settings
            main, seed = self.is_world_process_zero(), int(self.args.seed)
            with self._embedding() as embed:
                density = fit_density(self.train_dataset, embed, sample=sample, seed=seed, bounds=bounds, main=main)
            logger.info(
                "prompts of thumbs up and down are told apart with accuracy %.3f (%.3f on prompts left out; 0.5 is "
                "chance)",
                density.accuracy,
                density.held_out_accuracy,
            )
            found = self._metrics["train"]
            found["bco/density_accuracy"].append(density.accuracy)
            found["bco/density_accuracy_held_out"].append(density.held_out_accuracy)
            self._weigh(density)
            return density
        return self.density

    def _weigh(self, density: DensityRatio) -> None:
        """Put the weights of a density ratio beside the rows."""
        self.density = density
        self.train_dataset = self._with_weights(self.train_dataset)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._with_weights(part) for name, part in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = self._with_weights(self.eval_dataset)

    def _with_weights(self, dataset: Dataset) -> Dataset:
        assert self.density is not None
        with self._embedding() as embed:
            return with_weights(dataset, self.density, embed)

    @contextlib.contextmanager
    def _embedding(self) -> Iterator[Embed]:
        if callable(self.match_prompts):
            yield text_encoder(self.match_prompts, self._tokenizer)
            return
        with self._as_reference() as reference:
            inner = self.accelerator.unwrap_model(reference)
            yield hidden_state_encoder(inner, int(self._tokenizer.pad_token_id))

    # --- loss ---------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        if return_outputs:
            raise ValueError("compute_metrics would need logits, and none are built; evaluate with align.evals")
        rows = rows_of(inputs)
        tokens = score(model, rows)
        policy = UnpairedLogps(sequences(rows, tokens.logps), inputs["label"])
        reference: SequenceLogps | None = None
        if self.needs_reference:
            reference_logps = self._reference_logps(inputs)
            self._check_step_zero(tokens, reference_logps)
            reference = sequences(rows, reference_logps)
        if self.shift is not None and self.model.training and "observed" not in inputs:
            rewards = thumbs_rewards(self.loss, policy, reference)
            self.shift.update(rewards, policy.label)
        kl = self._kl(model, inputs) if self.needs_kl else None
        shift = None if self.shift is None else self.shift.value
        output = thumbs_output(self.loss, policy, reference, shift=shift, kl=kl, weight=inputs.get("weight"))
        threshold = 0.0 if shift is None else float(shift)
        rewards, weight = output.rewards[:, 0], inputs.get("weight")
        self._record(batch_sums(rows, tokens, policy, reference, rewards, weight, threshold), kl)
        # Over all rows, whatever their weights: a weight that grows counts, and does not shrink the others.
        return self.loss.weight * output.loss.mean()

    def _reference_logps(self, inputs: Mapping[str, Tensor], prefix: str = "") -> Tensor:
        """Token log-probs of the reference; kept with a batch that `_observe` has seen."""
        if not prefix and "reference_logps" in inputs:
            return inputs["reference_logps"]
        with self._as_reference() as reference:
            return score(reference, rows_of(inputs, prefix)).logps

    def _kl(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        rows = rows_of(inputs, "KL_")
        with torch.no_grad():
            policy = sequences(rows, score(model, rows).logps)
        return kto_kl(policy, sequences(rows, self._reference_logps(inputs, "KL_")))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The micro-batches of a step; the reward shift takes them all in before the first is trained on."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self.shift is not None and len(batches) > 1:
            self._observe(self.shift, batches)
        return batches, items

    @torch.no_grad()
    def _observe(self, shift: RewardShift, batches: list[dict[str, Tensor]]) -> None:
        training = self.model.training
        self.model.eval()  # the rewards of the model itself: no dropout, and no random number drawn
        rewards, labels = [], []
        for batch in batches:
            inputs = self._prepare_inputs(batch)
            rows = rows_of(inputs)
            with self.accelerator.autocast():
                tokens = score(self.model, rows)
            policy = UnpairedLogps(sequences(rows, tokens.logps), inputs["label"])
            reference: SequenceLogps | None = None
            if self.needs_reference:
                batch["reference_logps"] = self._reference_logps(inputs)
                reference = sequences(rows, batch["reference_logps"])
            rewards.append(thumbs_rewards(self.loss, policy, reference))
            labels.append(policy.label)
            batch["observed"] = torch.ones(())
        self.model.train(training)
        shift.update(torch.cat(rewards), torch.cat(labels))

    # --- metrics ------------------------------------------------------------------------------------------------

    def _record(self, sums: Mapping[str, Tensor], kl: Tensor | None) -> None:
        """Metrics of a batch, summed over processes in one reduction."""
        reduced = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").tolist()
        total = dict(zip(sums, reduced, strict=True))
        found = named_means(total)
        if kl is not None:
            found["kl"] = float(kl)
        if self.shift is not None:
            found["bco/shift"] = float(self.shift.value)
            # Its two buffers: sums and what they are divided by, of thumbs down and up.
            above, below = (buffer.tolist() for buffer in self.shift.buffers())
            for name, one, other in zip(("bco/mean_down", "bco/mean_up"), above, below, strict=True):
                if other:
                    found[name] = one / other
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in found.items():
            metrics[name].append(value)
        if self.model.training:
            self._total_train_tokens += int(total["seen"])
        metrics["num_tokens"] = [self._total_train_tokens]

    # --- checkpoints --------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """With the reward shift, written first: a folder that has ``trainer_state.json`` is a whole checkpoint."""
        if self.shift is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            save_file(self.shift.state_dict(), folder / SHIFT)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_shift(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_shift(self.state.best_model_checkpoint)

    def _load_shift(self, checkpoint: str) -> None:
        if self.shift is None:
            return
        path = Path(checkpoint) / SHIFT
        try:
            self.shift.load_state_dict(load_file(path))
        except (OSError, RuntimeError) as error:
            raise AlignError(
                f"{path}: no reward shift of mode {self.shift.mode} ({str(error).splitlines()[0]}): go on with the "
                "settings that the run was started with"
            ) from error


def _check_density(ratio: Any, prompts: Any) -> None:
    numbers = isinstance(ratio, list | tuple) and len(ratio) == 2 and all(isinstance(x, int | float) for x in ratio)
    if not numbers or not 0 < ratio[0] <= ratio[1] <= LARGEST:
        raise ValueError(f"density_ratio is {ratio!r}: it is (least, most), with 0 < least <= most <= {LARGEST:g}")
    check_whole("density_prompts", prompts)
    if prompts < 2:
        raise ValueError(f"density_prompts is {prompts}: a fit needs two prompts of each thumb or more")
