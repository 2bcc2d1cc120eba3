"""The ``training:`` section against the fields of TRL's configs.

The fields pass through to ``trl.DPOConfig`` (``trl.SFTConfig`` for sft, ``trl.KTOConfig`` for bco and kto,
``trl.GRPOConfig`` for grpo, ``transformers.TrainingArguments`` for online training and for groups of answers), whose
own checks come late or never: a dataclass takes any type. So each value is held against its field's annotation here,
before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, Field

from .explain import Problem, nearest, type_problem
from .kinds import data_kind, reward_kind

# Keys of TRL that another key of the recipe sets.
ELSEWHERE = {
    "beta": "set it as loss.beta",
    "loss_type": "set method or losses",
    "loss_weights": "set losses, with a weight in each term",
    "desirable_weight": "set it as loss.desirable_weight",
    "undesirable_weight": "set it as loss.undesirable_weight",
    "label_smoothing": "set it as loss.label_smoothing, with method dpo (cDPO) or robust_dpo",
    "ld_alpha": "TRL's own losses read it; choose a loss of the table with method",
    "f_divergence_type": "TRL's own losses read it; choose a loss of the table with method",
    "f_alpha_divergence_coef": "TRL's own losses read it; choose a loss of the table with method",
    "discopop_tau": "TRL's own losses read it; choose a loss of the table with method",
    "center_rewards_coefficient": "set it as reward.centering",
    "use_weighting": "TRL's own losses read it; give strength in the data to weigh pairs",
    "output_dir": "set output",
    "max_length": "set data.max_length",
    "truncation_mode": "answers are cut at data.max_length, on the right, on both sides alike",
    "gradient_checkpointing": "set model.gradient_checkpointing",
    "trust_remote_code": "set model.trust_remote_code",
    "model_init_kwargs": "set model (dtype, attention)",
    "report_to": "set tracking",
    "run_name": "set tracking.wandb.name",
    "project": "set tracking.wandb.project",
    "resume_from_checkpoint": "set resume",
    "precompute_ref_log_probs": "data.reference_cache does it, for losses on pairs; remove it",
    "precompute_ref_batch_size": "how the reference is computed is not an option; remove it",
    "sync_ref_model": "the reference stays as it is for the whole run; remove it",
    "ref_model_mixup_alpha": "the reference stays as it is for the whole run; remove it",
    "ref_model_sync_steps": "the reference stays as it is for the whole run; remove it",
    "bf16": "set model.dtype",
    "fp16": "set model.dtype",
    "use_cpu": "a GPU is used where torch sees one; CUDA_VISIBLE_DEVICES= in the environment hides it",
    "pad_to_multiple_of": "rows are padded to the longest of their batch; remove it",
    "pad_token": "it belongs to the tokenizer; set it there",
    "eos_token": "it belongs to the tokenizer; set it there",
    "chat_template_path": "it belongs to the tokenizer; set it there",
    "dataset_num_proc": "how many processes tokenise follows from the data and the machine; remove it",
    "dataset_text_field": "the columns are known (align validate shows them); remove it",
    "dataset_kwargs": "rows are tokenised by the library's own rules; remove it",
    "shuffle_dataset": "rows are drawn in random order already (train_sampling_strategy); remove it",
    "packing": "set data.packing, for pairs and groups; other rows are not packed",
    "packing_strategy": "rows are not packed; remove it",
    "eval_packing": "rows are not packed; remove it",
    "completion_only_loss": "answers are learnt and prompts are not; remove it",
    "assistant_only_loss": "answers are learnt and prompts are not; remove it",
    "save_only_model": "a checkpoint without its optimizer cannot be gone on from; remove it",
    "hub_token": "a secret does not belong in a file; set HF_TOKEN, or log in with `hf auth login`",
    "remove_unused_columns": "the trainer knows its columns; remove it",
    "padding_free": "off in TRL, where it does nothing; data.packing is what saves padding here",
    "do_train": "align train trains; remove it",
    "do_eval": "set evals",
    "do_predict": "set evals",
}
# The same for grpo, where TRL's loss is its own; None is a field that it does read.
GRPO_ELSEWHERE: dict[str, str | None] = {
    "beta": "set it as grpo.beta",
    "num_generations": "set it as grpo.num_generations",
    "max_completion_length": "set it as grpo.max_completion_length",
    "reward_weights": "set grpo.rewards, with weighted or raw_sum",
    "multi_objective_aggregation": "grpo.rewards says how rewards are put together; remove it",
    "chat_template_kwargs": "it belongs to the tokenizer's chat template; set it there",
    "log_completions_hub_repo": "set tracking",
    "train_sampling_strategy": "each prompt stands as often as it has answers, in random order; remove it",
    "loss_type": None,
    "pad_to_multiple_of": None,
}
PLAIN = "TrainingArguments"
# The same for our own loops.
PLAIN_ELSEWHERE: dict[str, str | None] = {
    "train_sampling_strategy": "the order of prompts is the loop's own; remove it",
    "max_length": None,
    "load_best_model_at_end": "the last model is kept; choose a checkpoint by its eval_win_rate",
    "neftune_noise_alpha": "log-probs are compared between policy and reference; remove it",
    "label_smoothing_factor": "answers are compared, not imitated; remove it",
}
# Keys of older releases of TRL and transformers.
RETIRED = {
    "max_prompt_length": "gone from TRL; data.max_length limits a prompt and its answer together",
    "max_completion_length": "gone from TRL; data.max_length limits a prompt and its answer together",
    "rpo_alpha": "gone from TRL; write losses: [{name: dpo}, {name: sft, weight: ...}]",
    "reference_free": "gone from TRL; method: simpo needs no reference",
    "generate_during_eval": "gone from TRL; evals: [generation] samples before and after training",
    "use_logits_to_keep": "gone from TRL; only completion tokens are scored here; remove it",
    "use_liger_loss": "gone from TRL; only completion tokens are scored here; remove it",
    "label_pad_token_id": "gone from TRL; remove it",
    "force_use_ref_model": "gone from TRL; the loss says whether there is a reference; remove it",
    "evaluation_strategy": "its name is eval_strategy now",
    "warmup_ratio": "gone from transformers; a warmup_steps below 1 is a fraction of all steps",
    "group_by_length": "gone from transformers; set train_sampling_strategy: group_by_length",
    "no_cuda": "its name is use_cpu now",
}


def _steps(value: int) -> int:
    if value < 1 and value != -1:  # TRL would train num_train_epochs without a word
        raise ValueError(f"is {value}; it must be at least 1, or -1 to train num_train_epochs")
    return value


# Ranges that the dataclasses do not state.
AT_LEAST_ONE = Annotated[int, Field(ge=1)]
NOT_NEGATIVE = Annotated[float, Field(ge=0)]
RANGES: dict[str, Any] = {
    "per_device_train_batch_size": AT_LEAST_ONE,
    "per_device_eval_batch_size": AT_LEAST_ONE,
    "gradient_accumulation_steps": AT_LEAST_ONE,
    "max_steps": Annotated[int, AfterValidator(_steps)],
    "num_train_epochs": Annotated[float, Field(gt=0)],
    "learning_rate": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "seed": Annotated[int, Field(ge=0, lt=2**32)],
}


def training_fields(method: str | None, gives: bool = False) -> dict[str, Any]:
    """What a recipe of this method may set under ``training:``, with the type of each. Imports TRL: seconds.

    Args:
        gives: ``kinds.gives_answers``.
    """
    return _fields(_config_name(method, gives))


def _elsewhere(name: str) -> dict[str, str | None]:
    own = {"GRPOConfig": GRPO_ELSEWHERE, PLAIN: PLAIN_ELSEWHERE}
    return {**RETIRED, **ELSEWHERE, **own.get(name, {})}


@cache
def _fields(name: str) -> dict[str, Any]:
    import transformers
    import trl

    config = getattr(transformers if name == PLAIN else trl, name)
    hints = get_type_hints(config)
    elsewhere = _elsewhere(name)
    return {
        field.name: RANGES.get(field.name, _narrow(hints[field.name], field))
        for field in dataclasses.fields(config)
        if field.init and elsewhere.get(field.name) is None
    }


def check_training(training: Mapping[str, Any], method: str | None, gives: bool = False) -> list[Problem]:
    """Problems of the ``training:`` section."""
    if not training or (method == "pal" and training.keys() <= {"seed"}):
        return []
    name = _config_name(method, gives)
    fields, elsewhere = _fields(name), _elsewhere(name)
    problems = []
    for key, value in training.items():
        if what := elsewhere.get(key):
            problems.append((f"training.{key}", what))
        elif key not in fields:
            near = nearest(key, fields)
            of = "transformers" if name == PLAIN else "trl"
            hint = f"did you mean training.{near}?" if near else f"not a field of {of}.{name}"
            problems.append((f"training.{key}", f"unknown key; {hint}"))
        elif what := type_problem(value, fields[key]):
            problems.append((f"training.{key}", what))
    return problems


def _config_name(method: str | None, gives: bool) -> str:
    if gives or data_kind(method) == "groups":
        return PLAIN
    if reward_kind(method) is not None:
        return "RewardConfig"
    configs = {"completions": "SFTConfig", "thumbs": "KTOConfig", "pairs": "DPOConfig", "prompts": "GRPOConfig"}
    configs["judgements"] = "RewardConfig"
    return configs[data_kind(method)]


def _narrow(hint: Any, field: dataclasses.Field[Any]) -> Any:
    """The choices that transformers checks at the start of a run, where its annotation says ``Enum | str``."""
    if choices := field.metadata.get("choices"):
        return Literal[tuple(choices)]
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    enums = [a for a in get_args(hint) if isinstance(a, type) and issubclass(a, enum.Enum)]
    return Literal[tuple(str(member.value) for member in enums[0])] if enums else hint
