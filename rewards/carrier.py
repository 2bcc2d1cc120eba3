"""The Hugging Face model that carries a reward model, its tokenizer, and the settings saved beside it."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from align.losses.checks import check_positive

from .heads import check_even

logger = logging.getLogger(__name__)

KINDS = ("scalar", "attributes", "gpm", "pal")
FORMAT = 1


@dataclass(frozen=True)
class RewardConfig:
    """What ``reward.json`` holds.

    Args:
        kind: ``scalar``, ``attributes``, ``gpm``, or ``pal``, whose head stands in files of its own.
        width: columns of the head: 1, the number of attributes, or the dimension of the embedding.
        tau: temperature of preference probabilities, ``sigma(score / tau)``.
        unit_norm, gate: of a gpm.
        attributes: their names, in the order of the columns.
        ranking: the weight of each attribute in what ranks answers.
        training: ``full``, ``lora`` or ``frozen``: what training changes besides the head.
        pooling: which hidden state the head reads; ``last_token``, the one that the attention mask says.
        max_length: limit of prompt and answer, in tokens; None is none.
        over_long: what becomes of a longer answer: ``cut`` or ``error``.
        eos_token_id: ends every answer, once.
        backbone: where the backbone came from; an adapter is loaded on it.
        format: of the file.
    """

    kind: str
    width: int
    tau: float
    unit_norm: bool
    gate: bool
    attributes: tuple[str, ...]
    ranking: tuple[float, ...]
    training: str
    max_length: int | None
    over_long: str
    eos_token_id: int
    backbone: str
    pooling: str = "last_token"
    format: int = FORMAT

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, KINDS)
        _one_of("training", self.training, ("full", "lora", "frozen"))
        _one_of("over_long", self.over_long, ("cut", "error"))
        _one_of("pooling", self.pooling, ("last_token",))
        check_positive("tau", self.tau)
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}: an answer and its end token take two")
        if self.kind == "gpm":
            check_even(self.width)
        elif self.gate:
            raise ValueError(f"gate weighs the form of a gpm, and this model is {self.kind}")

    @classmethod
    def of(
        cls,
        *,
        kind: str,
        eos_token_id: int,
        backbone: str,
        dimension: int | None = None,
        attributes: Sequence[str] = (),
        ranking: str | Mapping[str, float] | None = None,
        tau: float | None = None,
        unit_norm: bool = True,
        gate: bool = False,
        training: str = "full",
        max_length: int | None = None,
        over_long: str = "cut",
    ) -> RewardConfig:
        """The settings of a new model; what is None takes its kind's default.

        Raises:
            ValueError: settings that do not fit the kind.
        """
        _one_of("kind", kind, KINDS)
        if (kind == "attributes") is not bool(attributes):
            raise ValueError("attributes are the names of what a model of kind attributes rates: give both or neither")
        if dimension is not None and kind != "gpm":
            raise ValueError(f"dimension is that of a gpm's embedding, and this model is {kind}")
        if ranking is not None and kind != "attributes":
            raise ValueError(f"ranking weighs attributes, and this model is {kind}")
        widths = {"attributes": len(attributes), "gpm": 2 if dimension is None else dimension}
        width = widths.get(kind, 1)
        return cls(
            kind=kind,
            width=width,
            tau=(0.1 if kind == "gpm" else 1.0) if tau is None else tau,
            unit_norm=unit_norm and kind == "gpm",
            gate=gate,
            attributes=tuple(attributes),
            ranking=_ranking(tuple(attributes), ranking),
            training=training,
            max_length=max_length,
            over_long=over_long,
            eos_token_id=eos_token_id,
            backbone=backbone,
        )

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> RewardConfig:
        """What a file says.

        Raises:
            ValueError: keys are missing or unknown, or the file is of a later format.
        """
        known = {field.name for field in fields(cls)}
        if found.get("format") != FORMAT or set(found) != known:
            odd = sorted(set(found) ^ known)
            raise ValueError(f"reward.json of format {found.get('format')}, not {FORMAT}; keys that differ: {odd}")
        settings: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in found.items()
        }
        return cls(**settings)


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}: it is one of {', '.join(known)}")


def _ranking(attributes: tuple[str, ...], ranking: str | Mapping[str, float] | None) -> tuple[float, ...]:
    if len(set(attributes)) < len(attributes):
        raise ValueError(f"attributes {', '.join(attributes)}: a name stands twice")
    if not attributes:
        return ()
    if ranking is None and len(attributes) > 1:
        raise ValueError("several attributes: ranking says by which one, or by which weights, answers rank")
    weights = {ranking or attributes[0]: 1.0} if not isinstance(ranking, Mapping) else dict(ranking)
    unknown = sorted(set(weights) - set(attributes))
    if unknown:
        raise ValueError(f"ranking names {', '.join(unknown)}; the attributes are {', '.join(attributes)}")
    if not all(math.isfinite(weight) for weight in weights.values()) or not any(weights.values()):
        raise ValueError(f"ranking weights {list(weights.values())}: finite numbers, not all of them 0")
    return tuple(float(weights.get(name, 0.0)) for name in attributes)


def with_padding(tokenizer: Any, name: str) -> Any:
    """The tokenizer with a padding token that is not its end token.

    Plain ``AutoModelForSequenceClassification`` reads the last token that is not padding; an answer ends in the end
    token, so any other one will do.

    Raises:
        ValueError: it has no end token, or no other token to pad with.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: its tokenizer has no end token, so an answer could not end; set one and save it")
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    vocabulary = tokenizer.get_vocab()
    others = (tokenizer.unk_token, tokenizer.bos_token, min(vocabulary, key=lambda token: vocabulary[token]))
    for token in others:
        if token is not None and token != tokenizer.eos_token:
            tokenizer.pad_token = token
            return tokenizer
    raise ValueError(f"{name}: its tokenizer has no token to pad with but its end token")


def load_carrier(name: str, width: int | None, pad_token_id: int, **options: Any) -> Any:
    """Backbone and head of ``name``, a causal model or a sequence classifier.

    Args:
        width: columns of the head; None takes the classifier as it is, which then has one label.

    Raises:
        ValueError: no causal model, no classifier with one label where one is asked for, or one of another width.
    """
    trust = {key: options[key] for key in ("trust_remote_code",) if key in options}
    config = AutoConfig.from_pretrained(name, **trust)
    architectures = getattr(config, "architectures", None) or ["none"]
    classifies = architectures[0].endswith("ForSequenceClassification")
    if width is None:
        if not classifies or config.num_labels != 1:
            raise ValueError(f"{name}: no reward.json, and no sequence classifier with one label: not a reward model")
    elif classifies and config.num_labels != width:
        raise ValueError(
            f"{name}: its head, of a sequence classifier, has {config.num_labels} columns, where {width} are asked "
            "for: name the causal model that it was made of"
        )
    else:
        config.num_labels = width
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or trust:
        family: Any = AutoModelForSequenceClassification
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        family = _classifier_of(type(config))
    else:
        raise ValueError(f"{name}: {config.model_type} is not a causal language model")
    with contextlib.nullcontext() if width is None else _no_report_of_the_head():
        carrier = family.from_pretrained(name, config=config, **options)
    if not isinstance(getattr(carrier, "score", None), nn.Linear):
        raise ValueError(f"{name}: {type(carrier).__name__} has no linear head named score, as causal families have")
    carrier.config.pad_token_id = carrier.config.get_text_config().pad_token_id = pad_token_id
    return carrier


@contextlib.contextmanager
def _no_report_of_the_head() -> Iterator[None]:
    """Without transformers' report of a checkpoint that has no head, or another: the head is ours to fill.

    Where the backbone lacks something too, the report is shown.
    """

    def speaks_of_more(record: logging.LogRecord) -> bool:
        table = [line for line in record.getMessage().splitlines() if "|" in line]
        keys = {line.partition("|")[0].strip() for line in table[1:]}  # below the heading
        return not keys or not keys <= {"score.weight", "lm_head.weight"}

    theirs = logging.getLogger(PreTrainedModel.__module__)
    theirs.addFilter(speaks_of_more)
    try:
        yield
    finally:
        theirs.removeFilter(speaks_of_more)


def _classifier_of(config: type) -> Any:
    """A sequence classifier for a causal family to which transformers has none; plain transformers cannot load it."""
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[config]
    base = next(parent for parent in causal.__mro__ if parent.__name__.endswith("PreTrainedModel"))
    name = causal.__name__.replace("ForCausalLM", "ForSequenceClassification")
    return type(name, (GenericForSequenceClassification, base), {"base_model_prefix": causal.base_model_prefix})


def with_lora(backbone: Any, lora: Any) -> Any:
    """The backbone with new adapters, by a peft ``LoraConfig``."""
    from peft import get_peft_model

    settings = copy.deepcopy(lora)
    settings.task_type = None  # the head is ours: peft would look for one inside the backbone
    return get_peft_model(backbone, settings)
