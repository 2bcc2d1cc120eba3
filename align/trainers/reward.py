"""Training reward and preference models, in TRL's RewardTrainer.

What is TRL's: arguments, checkpoints, logging, the loop. What is ours: the model (``align.rewards.models``, whose head
may be wider than one number), the rows, the loss and its metrics. ``tests/align/trainers/test_trl_contract.py`` names
every private attribute of TRL that is used here.

A loss says by the names of its arguments which model and which labels it takes: ``chosen, rejected`` are scores of a
scalar model, ``chosen_embedding`` vectors of a gpm, ``predictions`` those of a model of attributes, ``delta`` gaps of
a model of annotators (``align.trainers.pal_backbone``); ``margin``, ``strength`` and ``preference`` are columns of the
data. A pair with a preference of 0.5 is a tie, half of a vote for either answer; a loss that takes no soft labels is
averaged over both ways round.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trl import RewardConfig
from trl import RewardTrainer as TrlRewardTrainer

from align.data.load import Row
from align.data.rewards import RewardRules, rating_table, reward_pairs, tokenize_ratings, tokenize_reward_pairs
from align.errors import AlignError
from align.losses import Loss, LossOutput
from align.losses.catalogue import LossFunction
from align.losses.preference import MASKED, centering
from align.losses.rows import PADDING, PROMPT, Rows
from align.losses.soft_labels import expected
from align.rewards.kinds import kind_trained_by
from align.rewards.models import RewardModel, RewardOutput
from align.tracking.progress import progress

from .by_length import LengthGrouped
from .collate import PAIR, RATED, RewardCollator
from .given import check_dataset, tokenized_dataset, untokenized_rows
from .host import Hosted, ranked_right, refuse_what_would_be_dropped

logger = logging.getLogger(__name__)

KEPT_AT_ONCE = 64  # answers
TRAINED = "trained.safetensors"  # in a checkpoint: the weights that training changes
_LABELS = ("strength", "margin", "preference", "ratings")  # what the model does not read of a batch

# RewardConfig's own settings that would be dropped here: (field, value that means "off", what to do instead).
_NOT_TAKEN: list[tuple[str, Any, str]] = [
    ("center_rewards_coefficient", None, "give RewardTrainer(centering=...)"),
    ("pad_to_multiple_of", None, "rows are padded to the widest of their batch"),
]


class RewardTrainer(LengthGrouped, Hosted, TrlRewardTrainer):  # type: ignore[misc]
    """TRL's RewardTrainer for the library's reward models and losses.

    Rows are pairs, or rated answers for ``regression`` (``align.data.rewards``). Rows that are over the limit are cut
    or set aside, and never dropped without a word.

    Args:
        model: from ``RewardModel.create`` or ``from_pretrained``: its backbone is trained whole, by adapters, or not
            at all, as it says.
        args: TRL's ``RewardConfig``. ``max_length`` counts where it is below the model's own.
        loss: ``"bradley_terry"``, ``"margin_bradley_terry"``, ``"scaled_bradley_terry"`` (scalar models),
            ``"regression"`` (attributes), ``"gpm"``, or a reward loss of your own. A gpm is trained with the tau that
            it scores with. With ``normalize_weights``, strengths are divided by their mean over the training data:
            the same number in every batch and process.
        shared_prompt, packing: as in ``PairTrainer``. Of a frozen backbone, whose states are kept, each answer has a
            row.
        centering: weight of ``(r_w + r_l)^2``, which pins the constant that pairs leave free; scalar models alone.
        rules: how rows of text are read; tokenised rows stay as they are.
        kwargs: as in TRL's ``RewardTrainer``, without ``peft_config``: adapters belong to the model.

    Raises:
        ValueError: an argument that this trainer would have to drop, or a loss that does not fit the model.
    """

    needs_reference = False
    starts_at_reference = False

    def __init__(
        self,
        model: RewardModel,
        args: RewardConfig | None = None,
        *,
        loss: str | LossFunction | Loss = "bradley_terry",
        centering: float = 0.0,
        rules: RewardRules | None = None,
        shared_prompt: bool = True,
        packing: bool = True,
        **kwargs: Any,
    ) -> None:
        args = RewardConfig("tmp_trainer") if args is None else copy.copy(args)
        refuse_what_would_be_dropped(args, _NOT_TAKEN, "RewardTrainer")
        for name, instead in (("peft_config", "RewardModel.create(lora=...)"), ("data_collator", "leave it out")):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: {instead}")
        self.reward = model
        self.loss, self.normalize_weights = _fitting(loss, model)
        if centering and model.config.kind != "scalar":
            raise ValueError(f"centering is for scalar models, and this one is {model.config.kind}")
        if not centering >= 0:
            raise ValueError(f"centering is {centering}: it must not be negative")
        self.centering = centering
        takes = inspect.signature(self.loss.info.function).parameters
        self.rules = replace(rules or RewardRules(attributes=model.config.attributes), needs_margin="margin" in takes)
        self.mean_strength = 1.0
        kwargs.setdefault("processing_class", model.tokenizer)
        self._host = _Host(model)
        super().__init__(model=self._host, args=args, **kwargs)
        if model.config.training != "frozen":
            self._choose_rows(model.carrier, shared_prompt, packing, "chosen and rejected answers")
        self.data_collator = RewardCollator(int(model.tokenizer.pad_token_id), **self.layout)

    # --- data ---------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: RewardConfig, dataset_name: str) -> Dataset:
        """Rows of text or messages to token ids, by the rules of ``align.data``; tokenised rows as they are."""
        check_dataset(dataset, dataset_name)
        rated = self.reward.config.kind == "attributes"
        if not set(RATED if rated else PAIR) <= set(dataset.column_names):
            dataset = self._tokenized(dataset, processing_class, args, dataset_name)
        if self.rules.needs_margin:
            margins = dataset["margin"] if "margin" in dataset.column_names else [None] * len(dataset)
            if without := sum(margin is None for margin in margins):
                raise AlignError(
                    f"{dataset_name}: {without:,} pairs have no margin, and {self.loss.info.name} asks for it"
                )
        if dataset_name == "train" and self.normalize_weights:
            self.mean_strength = sum(dataset["strength"]) / len(dataset)
            if not self.mean_strength > 0:
                raise AlignError(f"{dataset_name}: all strengths are 0: there is no weight to normalise")
        return dataset

    def _tokenized(self, dataset: Dataset, tokenizer: Any, args: RewardConfig, name: str) -> Dataset:
        limits = [limit for limit in (args.max_length, self.reward.config.max_length) if limit is not None]
        limit = min(limits, default=None)
        table, tokenized = self._read(untokenized_rows(dataset, name), name, tokenizer, limit)
        if cut := sum(count for key, count in tokenized.counts.items() if key.startswith("truncated_")):
            logger.warning("%s: %d answers were cut at %d tokens with their prompts", name, cut, limit)
        return tokenized_dataset(table, tokenized, name)

    def _read(self, rows: Iterable[Row], name: str, tokenizer: Any, limit: int | None) -> tuple[Any, Any]:
        """The table of rows that can be used, and their token ids."""
        if self.reward.config.kind == "attributes":
            ratings = rating_table(rows, name, self.reward.config.attributes)
            return ratings, tokenize_ratings(ratings.rows, tokenizer, limit, self.rules.over_long)
        pairs = reward_pairs(rows, name, self.rules)
        return pairs, tokenize_reward_pairs(pairs.rows, tokenizer, limit, self.rules.over_long)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = [*PAIR, "strength", "margin", "preference", *RATED[1:]]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's; the states of a frozen backbone are computed before it, each once."""
        if self.reward.config.training == "frozen":
            self._host.keep(self.train_dataset[:])
        return super().train(*args, **kwargs)

    # --- loss ---------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        found: RewardOutput = model(**_without_labels(inputs))
        labels = dict(inputs)
        if "strength" in labels:
            labels["strength"] = labels["strength"] / self.mean_strength
        output = reward_output(self.loss, found, labels)
        loss = output.loss
        if self.centering:
            loss = loss + self.centering * centering(*found.values.chunk(2)).loss
        self._record(inputs, output)
        mean = self.loss.weight * loss.mean()
        return (mean, (mean, found.values)) if return_outputs else mean

    def of_batch(self, inputs: Mapping[str, Tensor]) -> RewardOutput:
        """What the model says of a batch of the collator's."""
        found: RewardOutput = self._host(**_without_labels(inputs))
        return found

    # --- metrics ------------------------------------------------------------------------------------------------

    def _record(self, inputs: Mapping[str, Tensor], output: LossOutput) -> None:
        """Metrics of a batch, summed over processes in one reduction."""
        rated = "ratings" in inputs
        sums = self._rating_sums(inputs, output) if rated else _pair_sums(inputs, output)
        segments = inputs["segments"]
        sums["seen"] = (segments != PADDING).sum().to(torch.float32)
        sums["positions"] = sums["seen"].new_tensor(segments.numel())
        reduced = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").tolist()
        total = dict(zip(sums, reduced, strict=True))
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["perf/padding"].append(1 - total["seen"] / total["positions"])
        if self.model.training:
            self._count_tokens(total["seen"], total["positions"])
        metrics["num_tokens"] = [self._total_train_tokens]
        counts = {name.removeprefix("n "): value for name, value in total.items() if name.startswith("n ")}
        for name, count in counts.items():
            if count:
                metrics[name].append(total[name] / count)

    def _rating_sums(self, inputs: Mapping[str, Tensor], output: LossOutput) -> dict[str, Tensor]:
        labels = inputs["ratings"]
        rated = labels != MASKED
        squares = torch.where(rated, (output.rewards - labels) ** 2, 0.0).sum(0).float()
        sums: dict[str, Tensor] = {}
        for place, name in enumerate(self.reward.config.attributes):
            sums[f"ratings/mse_{name}"] = squares[place]
            sums[f"n ratings/mse_{name}"] = rated[:, place].sum().float()
        return sums

    # --- checkpoints --------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The weights that training changes: not a frozen backbone, which the model's folder has."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in self._trained().items()}, folder / TRAINED)
        self.reward.tokenizer.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / TRAINED
        try:
            weights = load_file(path)
        except (OSError, RuntimeError) as error:
            raise AlignError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
        trained = self._trained()
        if set(weights) != set(trained):
            raise AlignError(f"{path}: other weights than this run trains: go on with the settings that it began with")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(weights[name])

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: weight for name, weight in self.reward.named_parameters() if weight.requires_grad}


class _Host(nn.Module):
    """What transformers' Trainer asks of a model, around a RewardModel."""

    def __init__(self, reward: RewardModel) -> None:
        super().__init__()
        self.reward = reward
        self.config = copy.deepcopy(reward.carrier.config)
        self.config.num_labels = 1  # TRL insists; the head is as wide as it is
        self.kept: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def keep(self, rows: Mapping[str, Any]) -> None:
        """Compute the states of all rows of a data set once: a frozen backbone gives the same ones in every epoch."""
        sides = [rows[name] for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in rows]
        answers = {
            (len(prompt), *prompt, *answer): (prompt, answer)
            for side in sides
            for prompt, answer in zip(rows["prompt_ids"], side, strict=True)
        }
        order = sorted(answers, key=lambda key: (-len(key), key))
        with progress("states of the frozen backbone", len(order)) as advance:
            for start in range(0, len(order), KEPT_AT_ONCE):
                part = order[start : start + KEPT_AT_ONCE]
                states = self.reward.embed_ids([answers[key][0] for key in part], [answers[key][1] for key in part])
                self.kept |= zip(part, zip(*states, strict=True), strict=True)
                advance(len(part))

    def forward(self, **batch: Tensor) -> RewardOutput:
        rows = Rows.of(batch, int(batch["answer"].max()) + 1)
        found = [self.kept.get(key) for key in _keys(rows)] if self.kept else [None]
        if None in found:
            return self.reward.read(*self.reward.states_of(rows), batch.get("users"))
        device = rows.input_ids.device
        answer, prompt = (torch.stack(states).to(device) for states in zip(*found, strict=True))
        return self.reward.read(answer, prompt)

    def add_model_tags(self, tags: Any) -> None:
        """Nothing: the tags are TRL's, and a run writes its own card."""

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        self.reward.carrier.gradient_checkpointing_enable(**settings)
        if self.reward.config.training == "lora":
            self.reward.carrier.enable_input_require_grads()  # or nothing before the first adapter asks for gradients


def _keys(rows: Rows) -> Iterator[tuple[int, ...]]:
    """The tokens of each of separate rows, after the length of its prompt."""
    lengths, prompts = (kind.sum(1).tolist() for kind in (rows.segments != PADDING, rows.segments == PROMPT))
    for ids, length, prompt in zip(rows.input_ids.tolist(), lengths, prompts, strict=True):
        yield (prompt, *ids[:length])


def _without_labels(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name not in _LABELS}


def reward_output(loss: Loss, found: RewardOutput, labels: Mapping[str, Tensor]) -> LossOutput:
    """A reward loss of what a model says of a batch (chosen answers first), with the labels that it takes.

    Raises:
        ValueError: as the loss itself.
    """
    takes = inspect.signature(loss.info.function).parameters
    function, settings = loss.info.function, loss.settings
    if "predictions" in takes:
        return function(found.values, labels["ratings"], **settings)
    chosen, rejected = found.values.chunk(2)
    if "delta" in takes:  # the preferred answer is the right one
        return function(chosen - rejected, torch.ones_like(chosen), **settings)
    given = {name: labels[name] for name in ("margin", "strength", "preference") if name in takes and name in labels}
    if "scale" in takes and found.scale is not None:
        one, other = found.scale.chunk(2)
        given["scale"] = (one + other) / 2  # both rows have one prompt, and two roundings of it
    output = function(chosen, rejected, **given, **settings)
    if "preference" in takes or "preference" not in labels:
        return output
    exchanged = function(rejected, chosen, **given, **settings)
    return replace(output, loss=expected(output.loss, exchanged.loss, labels["preference"]))


def start_at_mean_ratings(model: RewardModel, dataset: Dataset) -> None:
    """Let a new model of attributes say the mean of each at first, where a drawn head would have to be unlearnt."""
    labels = torch.tensor(dataset["ratings"])
    rated = labels != MASKED
    means = torch.where(rated, labels, 0.0).sum(0) / rated.sum(0).clamp(min=1)
    assert model.bias is not None
    with torch.no_grad():
        model.bias.copy_(means)
        model.carrier.score.weight.zero_()


def _fitting(given: str | LossFunction | Loss, model: RewardModel) -> tuple[Loss, bool]:
    """The loss for this model, and whether strengths are to be divided by their mean."""
    loss = Loss.of(given)
    takes = inspect.signature(loss.info.function).parameters
    wanted = "pal" if "delta" in takes else kind_trained_by(loss.info)
    if wanted is None:
        raise ValueError(f"{loss.info.name} trains no reward model from pairs or ratings")
    if wanted != model.config.kind:
        raise ValueError(f"{loss.info.name} is for models of kind {wanted}, and this one is {model.config.kind}")
    settings = dict(loss.settings)
    if "tau" in takes:
        if not isinstance(given, Loss):
            settings["tau"] = model.config.tau
        elif settings.get("tau", takes["tau"].default) != model.config.tau:
            raise ValueError(
                f"tau is {settings.get('tau', takes['tau'].default)} in the loss and {model.config.tau} in the model: "
                "train with the tau that scores"
            )
    normalize = bool(settings.pop("normalize_weights", False))
    return replace(loss, settings=settings), normalize


def _pair_sums(inputs: Mapping[str, Tensor], output: LossOutput) -> dict[str, Tensor]:
    chosen, rejected = output.chosen_rewards.float(), output.rejected_rewards.float()
    margins = chosen - rejected
    right, decided = ranked_right(margins, inputs.get("preference"))
    pairs = margins.new_tensor(len(margins))
    sums = {
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/margins": margins.sum(),
        "rewards/accuracies": right.float().sum(),
    }
    counts = {f"n {name}": pairs for name in sums}
    return {**sums, **counts, "n rewards/accuracies": decided.float().sum()}
