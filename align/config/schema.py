"""The keys of a recipe. Everything is strict: an unknown key or another type is a problem, never a guess."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from .iterate import GroupsSpec, IterateSpec
from .kinds import EVALS, WITHOUT_LOSSES, Eval, data_kind, eval_applies, gives_answers, group_column
from .online import OnlineSpec
from .section import Section, Text

if TYPE_CHECKING:
    from align.data.groups import GroupRules
    from align.data.prompts import PromptRules
    from align.data.rewards import RewardRules
    from align.data.splits import DataKind

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"]


class LossTerm(Section):
    """One term of ``losses``: a loss of the table and its weight, with its own settings (``beta``) beside them."""

    model_config = ConfigDict(extra="allow")

    name: str
    """Loss of the table: see ``align recipes methods``."""
    weight: float = Field(default=1.0, ge=1e-12, le=1e12)
    """Factor of this term in the sum."""

    @property
    def settings(self) -> dict[str, Any]:
        """The loss's own settings."""
        return dict(self.model_extra or {})


class LoraSpec(Section):
    """Low-rank adapters (peft)."""

    r: int = Field(default=16, ge=1)
    """Rank."""
    alpha: int | None = Field(default=None, ge=1)
    """Scale; 2 r when not given."""
    target_modules: str | list[str] = "all-linear"
    """Which layers: ``all-linear`` or module names."""


class ModelSpec(Section):
    """The model to train."""

    name: Text
    """Packaged name (``smollm2-135m-instruct``), folder or hub id."""
    dtype: Dtype = "auto"
    """Type of the weights; auto: bfloat16 where the hardware computes in it, else float32."""
    attention: Attention = "auto"
    """Attention back-end of transformers. flash_attention_2 takes separate rows, flex_attention (CUDA) long packed
    ones."""
    lora: LoraSpec | None = None
    """Train a low-rank adapter; without it all weights are trained."""
    adapter: Text | None = None
    """Folder of a trained adapter to go on from."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass: about half the memory for a third more time. auto: where the memory
    that is free would not do without it, as ``align train --dry-run`` estimates."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model: only for a source that you trust."""


def _quantiles(value: list[float] | None) -> list[float] | None:
    if value is not None and (len(value) != 2 or not 0 <= value[0] < value[1] <= 1):
        raise ValueError(f"is {value}; it must be [from, to], with 0 <= from < to <= 1")
    return value


class FilterRule(Section):
    """Which rows stay, by their values in one column: one of keep, window, below and above, or the last two."""

    keep: float | None = Field(default=None, gt=0, le=1)
    """The share with the lowest values: floor(keep N) rows, at least one; of equal values, those that come first."""
    window: Annotated[list[float] | None, AfterValidator(_quantiles)] = None
    """[from, to]: the rows between two quantiles; [0.5, 1] is the half with the highest values."""
    below: float | None = None
    """Rows under this value."""
    above: float | None = None
    """Rows over this value."""
    group: Text | None = None
    """Column of the data, such as a language or a task: keep and window then hold within each group."""
    quotas: dict[str, Annotated[float, Field(gt=0, le=1)]] | None = None
    """keep for some of the groups, by name."""

    @model_validator(mode="after")
    def _one_rule(self) -> FilterRule:
        given = [name for name in ("keep", "window", "below", "above") if getattr(self, name) is not None]
        if len(given) != 1 and given != ["below", "above"]:
            raise ValueError(f"has {' and '.join(given) or 'no rule'}; give one of keep, window, below, above")
        if self.below is not None and self.above is not None and self.below <= self.above:
            raise ValueError(f"below is {self.below:g} and above is {self.above:g}: nothing lies between")
        if self.group is not None and given[0] in ("below", "above"):
            raise ValueError(f"group goes with keep and window: {given[0]} is one value for all")
        if self.quotas and (self.group is None or given != ["keep"]):
            raise ValueError("quotas go with keep, for the other groups, and with group")
        return self


class DataSpec(Section):
    """What to learn from."""

    train: Text
    """JSONL, JSON, CSV or Parquet file, a folder of them, a hub id, or ``align:NAME/SPLIT``."""
    eval: Text | None = None
    """Held-out data, never trained on."""
    max_length: int = Field(default=1024, ge=2)
    """Tokens of a prompt and one answer together; longer answers are cut."""
    max_bad_fraction: float = Field(default=0.05, ge=0, le=1)
    """Stop when more than this fraction of the rows cannot be used."""
    shared_prompt: bool = True
    """Compute the prompt once for both answers, where the model's layers allow it."""
    packing: bool = True
    """Put several pairs into a row, where prompts are shared."""
    reference_cache: bool = True
    """Of losses on pairs: keep the reference's log-probs in Align's cache folder, and read what another run has put
    there, for the same rows and the same reference."""
    filter: dict[str, FilterRule] | None = None
    """Which rows of data.train are trained on, by columns of the data (align score makes them), or by what the model
    scores before training: ches_ln, ches, last_inner, edit. Several rules each look at all rows; those stay that
    every rule keeps."""


class GenerationSpec(Section):
    """How the ``generation`` evaluation samples and scores, before and after training."""

    reward: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """Python function that scores answers, as ``module:function``; the evaluation runs only with one."""
    prompts: int = Field(default=160, ge=2)
    """Held-out prompts to answer (the first ones)."""
    max_new_tokens: int = Field(default=96, ge=1)
    """Longest answer, tokens."""
    temperature: float = Field(default=0.7, ge=0)
    """0 takes the likeliest token."""
    seed: int = Field(default=0, ge=0)
    """Seed of the samples."""


class WandbSpec(Section):
    """Mirror of the run in Weights & Biases."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    """offline writes to the disk only; online needs an account."""
    project: Text = "align"
    """Project."""
    group: str | None = None
    """Group of the run and of its evaluations, which are W&B runs of their own; the output folder's name when not
    given."""
    name: str | None = None
    """Name of the run; the output folder's when not given."""


INTEGRATIONS = {"tensorboard": ("tensorboard", "tensorboardX"), "mlflow": ("mlflow",)}
"""Packages that each needs one of."""


def _installed(value: list[str]) -> list[str]:
    missing = [name for name in value if not any(map(find_spec, INTEGRATIONS[name]))]
    if missing:
        raise ValueError(f"needs the package {missing[0]}, which is not installed: pip install {missing[0]}")
    return value


class TrackingSpec(Section):
    """Where metrics go besides the run folder's own metrics.jsonl."""

    wandb: WandbSpec | None = None
    """Weights & Biases; not used when not given."""
    integrations: Annotated[list[Literal["tensorboard", "mlflow"]], AfterValidator(_installed)] = Field(default=[])
    """Others that transformers writes training metrics to: tensorboard, in the folder runs/ of the run's own folder;
    mlflow, where MLFLOW_TRACKING_URI says."""


def _two_bounds(value: list[float]) -> list[float]:
    if len(value) != 2 or not 0 < value[0] <= value[1] <= 1e6:
        raise ValueError(f"is {value}; it must be [least, most], with 0 < least <= most <= 1e6")
    return value


class BcoSpec(Section):
    """What method bco keeps and weighs besides its loss."""

    shift: Literal["balanced_ema", "pooled"] = "balanced_ema"
    """The point between thumbs up and down: the middle of their moving averages, or the mean of all rewards so far."""
    decay: float = Field(default=0.9, ge=0, lt=1)
    """Of the moving averages, per optimiser step."""
    match_prompts: bool = False
    """Weigh thumbs down by how likely their prompt is among the thumbs up (underlying distribution matching)."""
    encoder: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """Function of a list of texts that embeds prompts for match_prompts, as ``module:function``, giving a tensor
    (N, D); when not given, the mean of the model's own last hidden states over the prompt."""
    density_ratio: Annotated[list[float], AfterValidator(_two_bounds)] = Field(default=[0.5, 10.0])
    """Least and largest of these weights."""
    density_prompts: int = Field(default=1024, ge=2)
    """Prompts of each thumb, at most, that the weights are fitted on."""


class RewardSpec(Section):
    """The model of bradley_terry, margin_bradley_terry, scaled_bradley_terry, regression and gpm."""

    frozen: bool = False
    """Train the head alone; without it and without model.lora, the whole backbone."""
    over_long: Literal["cut", "set_aside"] = "cut"
    """Answers over data.max_length: keep their first tokens and the end token, or set their rows aside, counted."""
    gap_of: Text | None = None
    """NAME of a judge whose scores stand beside both answers (chosen_NAME, rejected_NAME): their difference is the
    margin, and over the largest of the data the strength."""
    centering: float = Field(default=0.0, ge=0)
    """Weight of (r_w + r_l)^2, which pins the constant that pairs leave free; 0.01 is usual. Scalar models alone."""
    dimension: int | None = Field(default=None, ge=2)
    """gpm: numbers of an embedding, even; 2 when not given."""
    unit_norm: bool = True
    """gpm: embeddings of length 1, so that scores lie in [-1, 1] without a gate."""
    gate: bool = False
    """gpm: weigh the planes of the form by the prompt."""
    attributes: list[Text] = Field(default_factory=list)
    """regression: the columns of ratings."""
    ranking: str | dict[str, float] | None = None
    """regression: the attribute that ranks answers, or weights by name; not needed where there is one attribute."""


class GrpoSpec(Section):
    """What method grpo rewards, and how it draws the answers that it learns from."""

    rewards: str | dict[str, Any]
    """``module:function``, folder of a reward model, or an expression of several (``align.rewards.expression``)."""
    num_generations: int = Field(default=8, ge=2)
    """Answers to a prompt, which are compared with each other."""
    max_completion_length: int = Field(default=256, ge=1)
    """Longest answer, tokens."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL to the model before training; 0 leaves it out."""


def _counts(value: list[int]) -> list[int]:
    if not value or min(value) < 1 or sorted(set(value)) != value:
        raise ValueError(f"is {value}; it must be whole numbers from 1, each larger than the one before")
    return value


class PalSpec(Section):
    """The model of method pal, a reward an annotator, and its training."""

    frozen: bool = True
    """Leave the backbone as it is. When not given, true without model.lora; false without model.lora trains it whole.
    In either case the model is fitted to embeddings of the backbone as it was, and trained on with it as section
    training says."""
    variant: Literal["a", "b"] = "a"
    """a: ideal points, whatever the prompt; b: directions that depend on the prompt, which takes many prompts."""
    groups: int = Field(default=2, ge=1)
    """Prototypes that all annotators share; what each has of their own is this many weights."""
    dimension: int = Field(default=64, ge=1)
    """Of the space in which answers meet what an annotator wants."""
    depth: int = Field(default=2, ge=0)
    """Layers of the maps into it; 0 is a linear map."""
    loss: Literal["logistic", "hinge"] = "logistic"
    """On the difference of two answers' rewards, in training and for new annotators; of variant b logistic alone."""
    epochs: int = Field(default=20, ge=1)
    """Passes over the judgements, on embeddings."""
    batch_size: int = Field(default=256, ge=1)
    """Judgements a step, on embeddings."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Of the maps, on embeddings."""
    users_learning_rate: float = Field(default=5e-2, gt=0)
    """Of annotators' weights and of prototypes, on embeddings."""
    shots: Annotated[list[int], AfterValidator(_counts)] = Field(default=[2, 5, 10])
    """Judgements of a new annotator that their weights are fitted to, for the report; new are those of data.eval who
    are not in data.train. Those who judged no more than the largest count are left out; the others' rest is tested."""
    baselines: bool = True
    """Compare with one reward for all: a PAL model of one group, and Bradley-Terry. Where the backbone is trained each
    is trained alike on a backbone of its own, which takes as long as the run again, twice."""
    cache: Text | None = None
    """Folder that keeps embeddings; when not given, one in Align's cache that all runs share."""


def _evals_of(fields: dict[str, Any]) -> list[Eval]:
    data, generation = fields.get("data"), fields.get("generation")
    if data is None or not data.eval:
        return []
    asked_for = {"cycles"}  # few data sets have any
    if generation is None or generation.reward is None:
        asked_for.add("generation")
    method, gives = fields.get("method"), gives_answers(fields)
    return [name for name in EVALS if eval_applies(name, method, gives) and name not in asked_for]


class Recipe(Section):
    """One run. ``align.config.load.load_recipe`` reads it and makes the checks that cross sections."""

    method: str | None = None
    """Loss of the table by name (``align recipes methods``), ``sft``, ``grpo`` or ``pal``. Exactly one of method
    and losses."""
    losses: list[LossTerm] | None = Field(default=None, min_length=1)
    """A weighted sum of losses, in place of method."""
    model: ModelSpec
    """The model; its name alone is enough."""
    data: DataSpec
    """What to learn from."""
    loss: dict[str, Any] = Field(default_factory=dict)
    """Settings of method's loss, such as beta."""
    bco: BcoSpec | None = None
    """State and weights of method bco; its defaults when not given."""
    reward: RewardSpec | None = None
    """The model of a method that trains a reward model; its defaults when not given."""
    grpo: GrpoSpec | None = None
    """Rewards and sampling of method grpo."""
    online: OnlineSpec | None = None
    """Train method on answers that the policy gives as it learns: who compares them, and how they are drawn."""
    groups: GroupsSpec | None = None
    """What methods gpo and sppo, and their pointwise forms, take of groups of answers; its defaults when not given."""
    iterate: IterateSpec | None = None
    """Train such a method in rounds: answers of the policy to all prompts, compared, and learnt from."""
    pal: PalSpec | None = None
    """The model of method pal and its training; its defaults when not given."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Fields of TRL's DPOConfig, such as learning_rate and max_steps (SFTConfig for sft, KTOConfig for bco, kto,
    GRPOConfig for grpo, RewardConfig for reward models and pal, transformers' TrainingArguments for online training
    and for groups of answers); of pal.frozen the seed alone; of iterate for each round."""
    generation: GenerationSpec = Field(default_factory=GenerationSpec)
    """Settings of the generation evaluation."""
    evals: list[Eval] = Field(default_factory=_evals_of)
    """Evaluations before and after training. When not given, all that apply: none without data.eval, generation with
    generation.reward, thumbs for bco and kto, goals for grpo, reward for reward models, pal for pal, preference
    and displacement for other pairs. cycles is never among them: it judges held-out pairs that run in a circle."""
    tracking: TrackingSpec = Field(default_factory=TrackingSpec)
    """Where metrics go."""
    output: Text
    """Run folder."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the last checkpoint where the run folder holds the same configuration."""

    @property
    def data_kind(self) -> DataKind:
        """What the run learns from."""
        return data_kind(self.method, gives_answers(vars(self)))

    @property
    def held_out(self) -> tuple[DataKind, PromptRules | RewardRules | GroupRules | None]:
        """What data.eval holds, and what is asked of it: as data.train, but prompts alone beside groups of answers."""
        from align.data.prompts import PromptRules

        if self.data_kind == "groups":
            return "prompts", PromptRules((), self.generation.max_new_tokens)
        return self.data_kind, self.data_rules

    @property
    def data_rules(self) -> PromptRules | RewardRules | GroupRules | None:
        """What it asks of prompts, of groups of answers, or, for a reward model, of pairs and ratings."""
        if self.reward is not None:
            from align.data.rewards import RewardRules

            return RewardRules(
                attributes=tuple(self.reward.attributes),
                gap_of=self.reward.gap_of,
                needs_margin=self.method == "margin_bradley_terry",
                over_long=self.reward.over_long,
            )
        if spec := self.online or self.iterate:
            from align.data.prompts import PromptRules
            from align.rewards.annotators import parse_annotator
            from align.rewards.scorers import asked_columns

            parsed = parse_annotator(spec.annotator)
            columns, every = asked_columns(parsed.rules)
            return PromptRules(parsed.data_columns, spec.max_new_tokens, columns, every)
        if column := group_column(self.method):
            from align.data.groups import GroupRules

            return GroupRules(column, (self.groups or GroupsSpec()).use)
        if self.grpo is None:
            return None
        from align.data.prompts import PromptRules
        from align.rewards.expression import parse_expression
        from align.rewards.scorers import asked_columns

        expression = parse_expression(self.grpo.rewards)
        columns, every = asked_columns(part.reward for part in expression.parts)
        return PromptRules(expression.data_columns, self.grpo.max_completion_length, columns, every)

    @property
    def terms(self) -> list[LossTerm]:
        """The losses of the run: those of ``losses``, or ``method`` as the only one; none for sft, grpo and pal."""
        if self.losses is not None:
            return list(self.losses)
        if self.method is None or self.method in WITHOUT_LOSSES:
            return []
        return [LossTerm(name=self.method, **self.loss)]
