"""From a recipe's source to a checked ``Recipe``, or to all its problems at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from align.errors import ConfigError

from .explain import Problem, leaves, model_problems, nearest
from .iterate import check_groups
from .kinds import EVALS, data_kind, eval_applies, gives_answers, reward_kind
from .losses import check_losses, fill_losses, with_implied_method
from .online import check_online
from .pal import check_pal, is_frozen
from .paths import check_paths, data_problem, model_problem
from .read import parse_mapping, parse_yaml
from .reward import check_reward_model
from .schema import Recipe
from .training import check_training, training_fields

if TYPE_CHECKING:
    from align.rewards.expression import Part
    from align.rewards.named import Reward

# What does not change the result of a run.
NOT_IN_HASH: dict[str, Any] = {
    **dict.fromkeys(("output", "tracking", "resume"), True),
    "data": {"reference_cache"},
    "model": {"gradient_checkpointing"},
    "iterate": {"annotator_seconds", "rounds"},
    "online": {"annotator_seconds"},
}
# Sections of one of several kinds, whose keys do not go with those of another kind.
WHOLE = (("online", "annotator"), ("iterate", "annotator"), ("grpo", "rewards"))
MISMATCHED = "kto scores each prompt with the answer of another row of its batch"
NO_REWARD = (
    "name a function that scores answers, as module:function; align.rewards.rules:everyday_answer is the quickstart's"
)


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    ``base: OTHER`` in a recipe takes every key that it does not set itself from OTHER (a file, looked for beside the
    recipe, or a shipped recipe); sections merge key by key, lists are replaced, and so are an annotator and
    ``grpo.rewards``, which are of another kind with other keys. A base has no base. A top-level key with nothing under
    it counts as not given.

    Args:
        source: path of a YAML file, or the name of a shipped recipe (``align recipes ls``).
        overrides: ``key=value``, with dotted keys (``loss.beta=2``, ``losses.0.weight=0.5``) and YAML values.

    Returns:
        The recipe, with the defaults of its losses filled in.

    Raises:
        ConfigError: with every problem, each under its key.
    """
    data = with_implied_method(_merge(source, overrides))
    problems: list[Problem] = []
    try:
        Recipe.model_validate(data)
    except ValidationError as error:
        problems += model_problems(error, Recipe, data, _known_keys(data))
    problems += check_losses(data)
    if isinstance(training := data.get("training"), dict):
        problems += check_training(training, data.get("method"), gives_answers(data))
    problems += check_paths(data)
    problems += _across(data)
    if problems:
        first_of_each = {where: (where, what) for where, what in reversed(problems)}
        raise ConfigError(source, [*first_of_each.values()][::-1])
    fill_losses(data)
    if data.get("method") == "bco":
        data.setdefault("bco", {})
    if data.get("method") == "pal":
        data["pal"] = {"frozen": is_frozen(data), **(data.get("pal") or {})}
    if reward_kind(data.get("method")) is not None:
        data.setdefault("reward", {})
    return Recipe.model_validate(data)


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with all defaults, as YAML that ``load_recipe`` reads back to an equal recipe."""
    fields = recipe.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def config_hash(recipe: Recipe) -> str:
    """sha256 of everything in the recipe that changes the result: not output, tracking, resume, where the reference's
    log-probs come from, what is computed twice, a time limit and the number of rounds, of which more can be had later.
    """
    written = json.dumps(recipe.model_dump(mode="json", exclude=NOT_IN_HASH))
    numbers_alike = json.loads(written, parse_int=float)  # beta: 2 is beta: 2.0
    return hashlib.sha256(json.dumps(numbers_alike, sort_keys=True).encode()).hexdigest()


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    files = resources.files("align.recipes").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def shipped_text(name: str) -> str:
    """The text of a shipped recipe.

    Raises:
        ConfigError: there is none of that name.
    """
    shipped = shipped_recipes()
    if name not in shipped:
        near = nearest(name, shipped, cutoff=0.6)
        hint = f"did you mean {near}?" if near else f"shipped recipes: {', '.join(shipped)}"
        raise ConfigError(name, [("recipe", f"no such file, and no shipped recipe of this name; {hint}")])
    return resources.files("align.recipes").joinpath(f"{name}.yaml").read_text("utf-8")


def _read(source: str) -> dict[str, Any]:
    path = Path(source).expanduser()
    if path.is_dir():
        raise ConfigError(source, [("recipe", "is a folder; name the YAML file")])
    if not path.is_file():
        return parse_mapping(shipped_text(source), source)
    try:
        return parse_mapping(path.read_text("utf-8"), source)
    except UnicodeDecodeError as error:
        raise ConfigError(source, [("file", f"is not UTF-8 text (byte {error.start})")]) from None


def _merge(source: str, overrides: Sequence[str]) -> dict[str, Any]:
    own = _read(source)
    merged = OmegaConf.create(_named_model(own))
    if "base" in own:
        base = _read(_beside(source, own["base"]))
        if "base" in base:
            raise ConfigError(source, [("base", f"'{own['base']}' has a base itself; one level is the limit")])
        merged = OmegaConf.create(_named_model(base))
        _make_way(merged, own)
        merged.merge_with(_named_model(own))
        del merged["base"]
    problems = [problem for text in overrides if (problem := _override(merged, text))]
    if problems:
        raise ConfigError(source, problems)
    try:
        data = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(source, [(str(error.full_key or "recipe"), str(error).splitlines()[0])]) from None
    return {str(key): value for key, value in dict(data).items() if value is not None}


def _beside(source: str, base: Any) -> str:
    if not isinstance(base, str):
        raise ConfigError(source, [("base", "is not the name of a recipe")])
    path = Path(source).expanduser().parent / Path(base).expanduser()
    return str(path) if path.is_file() else base


def _make_way(recipe: DictConfig, given: dict[str, Any]) -> None:
    """Remove what ``given`` has in another way, of what does not merge key by key."""
    for section, key in WHOLE:
        there, here = recipe.get(section), given.get(section)
        if isinstance(there, DictConfig) and isinstance(here, dict) and key in here:
            there.pop(key, None)


def _named_model(data: dict[str, Any]) -> dict[str, Any]:
    """``model: NAME`` is short for ``model: {name: NAME}``."""
    return {**data, "model": {"name": data["model"]}} if isinstance(data.get("model"), str) else data


def _override(recipe: DictConfig, text: str) -> Problem | None:
    """Set one ``key=value``."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        return (text, "is not key=value, such as loss.beta=2")
    try:
        parsed = parse_yaml(value, "override")
    except ConfigError as error:
        return (key, f"'{value}' is not YAML: {error.problems[0][1]}")
    section, _, inside = key.partition(".")
    _make_way(recipe, {section: {inside: parsed} if inside else parsed})
    try:
        OmegaConf.update(recipe, "model.name" if key == "model" and isinstance(parsed, str) else key, parsed)
    except (OmegaConfBaseException, TypeError, ValueError, IndexError) as error:
        return (key, f"cannot be set: {str(error).splitlines()[0]}")
    return None


def _known_keys(data: dict[str, Any]) -> dict[str, str]:
    """Where each key belongs, for those that stand in the wrong section."""
    training = training_fields(data.get("method"), gives_answers(data)) if data.get("training") else {}
    return {**{key: f"training.{key}" for key in training}, **leaves(Recipe)}


def _across(data: dict[str, Any]) -> list[Problem]:
    """Keys that do not go together."""
    problems = []
    model, source = data.get("model"), data.get("data")
    if isinstance(model, dict) and model.get("lora") and model.get("adapter"):
        problems.append(("model.lora", "an adapter brings its own settings; give model.adapter or model.lora"))
    if data.get("evals") and isinstance(source, dict) and not source.get("eval"):
        problems.append(("evals", "need held-out data; set data.eval, or evals: []"))
    if isinstance(source, dict) and source.get("eval") and source["eval"] == source.get("train"):
        problems.append(("data.eval", "the same as data.train; held-out data must be other data"))
    if isinstance(evals := data.get("evals"), list):
        problems += _unfit_evals(data.get("method"), evals, gives_answers(data))
    problems += _rows(data) + check_online(data) + check_groups(data)
    return problems + _thumbs(data) + _grpo(data) + check_reward_model(data) + check_pal(data) + _reward(data)


def _rows(data: dict[str, Any]) -> list[Problem]:
    """Switches of how rows are laid out that are off where there is nothing to switch off."""
    source, method, gives = data.get("data"), data.get("method"), gives_answers(data)
    if not isinstance(source, dict) or not isinstance(method, str):
        return []
    kind = data_kind(method, gives)
    alone = kind in ("completions", "thumbs") or (kind == "prompts" and not gives)
    idle = {"shared_prompt": alone, "packing": alone, "reference_cache": kind != "pairs"}
    what = "changes nothing for method: {}, {}; remove it"
    why = {"reference_cache": "whose reference is not kept"}
    return [
        (f"data.{key}", what.format(method, why.get(key, "each row of which is an answer with its prompt")))
        for key, is_idle in idle.items()
        if is_idle and source.get(key) is False
    ]


def _unfit_evals(method: Any, evals: list[Any], gives: bool) -> list[Problem]:
    """Evaluations of another kind of data than the method's."""
    method = method if isinstance(method, str) else None
    wants = {
        "thumbs": "tells thumbs up from thumbs down",
        "preference": "compares pairs",
        "displacement": "compares pairs",
        "goals": "judges answers by grpo.rewards",
        "reward": "judges a reward model",
        "cycles": "judges a reward model on pairs that run in a circle",
        "pal": "judges the rewards of annotators",
        "generation": "judges answers that the model writes",
    }
    reads = {"pairs": "the losses read pairs", "thumbs": f"method: {method} reads single answers with a thumb"}
    reads["completions"] = "method: sft reads single answers"
    reads["prompts"] = "the policy answers prompts itself" if gives else "method: grpo reads prompts"
    reads["groups"] = f"method: {method} reads groups of answers"
    reads["judgements"] = "method: pal trains a reward an annotator"
    trains = (
        reads[data_kind(method, gives)] if reward_kind(method) is None else f"method: {method} trains a reward model"
    )
    fitting = ", ".join(name for name in EVALS if eval_applies(name, method, gives))
    return [
        (f"evals.{index}", f"{name} {wants[name]}, and {trains}; leave {fitting}")
        for index, name in enumerate(evals)
        if name in EVALS and not eval_applies(name, method, gives)
    ]


def _thumbs(data: dict[str, Any]) -> list[Problem]:
    """What losses on thumbs ask of the other sections."""
    method = data.get("method")
    problems = []
    if data.get("bco") is not None and method != "bco":
        problems.append(("bco", "belongs to method: bco; remove it"))
    elif isinstance(spec := data.get("bco"), dict) and isinstance(encoder := spec.get("encoder"), str):
        from align.rewards.named import load_function

        if not spec.get("match_prompts"):
            problems.append(("bco.encoder", "embeds prompts for match_prompts: true, which is not set"))
        try:
            load_function(encoder, "encoder", "a list of texts")
        except ValueError as error:
            problems.append(("bco.encoder", str(error)))
    if isinstance(terms := data.get("losses"), list):
        problems += [
            (f"losses.{index}.name", f"{term['name']} reads thumbs and stands alone; write method: {term['name']}")
            for index, term in enumerate(terms)
            if isinstance(term, dict) and isinstance(term.get("name"), str) and data_kind(term["name"]) == "thumbs"
        ]
    training = data.get("training")
    if method == "kto" and isinstance(training, dict):
        batch, order = training.get("per_device_train_batch_size"), training.get("train_sampling_strategy")
        if batch == 1:
            problems.append(("training.per_device_train_batch_size", f"is 1; {MISMATCHED}, so it must be at least 2"))
        if order not in (None, "sequential"):
            what = f"is '{order}'; {MISMATCHED}, which needs rows in order (they are shuffled once, by the seed)"
            problems.append(("training.train_sampling_strategy", what))
    return problems


def _grpo(data: dict[str, Any]) -> list[Problem]:
    """Section ``grpo``: there for method grpo alone, with rewards that can be had."""
    spec = data.get("grpo")
    if data.get("method") != "grpo":
        return [("grpo", "belongs to method: grpo; remove it")] if spec is not None else []
    if not isinstance(spec, dict) or spec.get("rewards") is None:
        return [("grpo.rewards", "is missing: a reward, or an expression of several")]
    return _rewards(data, spec["rewards"]) + _groups(data, spec)


def _rewards(data: dict[str, Any], given: Any) -> list[Problem]:
    from align.rewards.expression import ExpressionError, PredictedReference, parse_expression
    from align.rewards.named import is_gpm, is_rule, load_reward, reward_folder, split_choice

    try:
        expression = parse_expression(given)
    except ExpressionError as error:
        return [(f"grpo.rewards.{error.where}".rstrip("."), error.problem)]
    problems = []
    for part in expression.parts:
        where = f"grpo.rewards.{part.where}.reward"
        if isinstance(part.reference, PredictedReference) and (what := data_problem(part.reference.source)):
            problems.append((f"grpo.rewards.{part.where}.reference.regression", what))
        if not is_rule(part.reward) and (what := model_problem(split_choice(part.reward)[0])):
            problems.append((where, what))
            continue
        try:
            if reward_folder(part.reward) is None:
                problems += [(where, what) for what in _asked_of_trl(data, part, load_reward(part.reward))]
            part.check_reference(is_gpm(part.reward))
        except ExpressionError as error:
            problems.append((f"grpo.rewards.{error.where}", error.problem))
        except ValueError as error:
            problems.append((where, str(error)))
    return problems


def _asked_of_trl(data: dict[str, Any], part: Part, rule: Reward) -> list[str]:
    """What a rule cannot do without and is not given, of what TRL gives of the answers that it samples."""
    from align.rewards.expression import CannedReference, SampledReference
    from align.rewards.named import OF_TRL
    from align.rewards.scorers import RuleReward

    asked = [name for name, needed in RuleReward(rule).columns.items() if needed and name in OF_TRL]
    source, evals, elsewhere = data.get("data"), data.get("evals", EVALS), ""
    goals = isinstance(evals, list | tuple) and "goals" in evals and isinstance(source, dict) and source.get("eval")
    if isinstance(part.reference, SampledReference | CannedReference):
        elsewhere = "its reference is made"
    elif goals:
        elsewhere = "evals: [goals] judges answers"
    why = {name: f"TRL gives it in training alone, and not where {elsewhere}" for name in asked if elsewhere}
    if "environments" in asked:
        why["environments"] = "TRL gives it with an environment_factory, which a recipe cannot name"
    return [f"the rule asks for {name}: {what}; give the argument a default" for name, what in why.items()]


def _groups(data: dict[str, Any], spec: dict[str, Any]) -> list[Problem]:
    """Whole groups of answers in a batch, where the recipe alone decides it."""
    training, answers = data.get("training") or {}, spec.get("num_generations", 8)
    if not isinstance(training, dict) or {"generation_batch_size", "steps_per_generation"} & training.keys():
        return []
    batch = training.get("per_device_train_batch_size", 8)
    accumulated = training.get("gradient_accumulation_steps", 1)
    sizes = (batch, accumulated, answers)
    if not all(isinstance(size, int) and size > 0 for size in sizes) or batch * accumulated % answers == 0:
        return []
    what = f"{batch} (times {accumulated} accumulated) answers are no whole groups of grpo.num_generations, {answers}"
    return [("training.per_device_train_batch_size", what)]


def _reward(data: dict[str, Any]) -> list[Problem]:
    """Whether a reward is named and can be imported, where the generation evaluation runs."""
    generation = data.get("generation")
    reward = generation.get("reward") if isinstance(generation, dict) else None
    evals = data.get("evals", EVALS)
    runs = isinstance(evals, list | tuple) and "generation" in evals
    if runs and "evals" in data and reward is None:
        return [("generation.reward", NO_REWARD)]
    if not runs or not isinstance(reward, str) or ":" not in reward:
        return []
    from align.rewards.named import load_reward

    try:
        load_reward(reward)
    except ValueError as error:
        return [("generation.reward", str(error))]
    return []
