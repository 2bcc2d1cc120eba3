"""What a suite is asked: which models, on what data, against what, with which settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from align.config.explain import model_problems, nearest
from align.config.load import load_recipe, shipped_recipes
from align.config.read import parse_yaml
from align.config.section import Section
from align.data.report import fault_report, write_rejected
from align.data.rows import Fault
from align.errors import AlignError, ConfigError
from align.rewards.named import is_rule, reward_folder

RESOLVED = "config.resolved.yaml"
S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Asked:
    """What all suites are asked.

    Args:
        models: run folders, checkpoints, adapters, model folders, packaged names or hub ids, as they were given; a
            recipe stands for its run.
        data: what ``--data`` names, else the held-out data of the first run.
        reference: the model that the others are compared with; None: what all of them were trained from.
        max_length: limit of prompt and answer, tokens; None: the reference's own.
        output: where the result goes; ``rejected`` and ``kept`` stand beside it.
        recipes: the resolved recipe of each model that is a run, by name.
    """

    models: tuple[str, ...]
    data: str | None
    reference: str | None
    max_length: int | None
    output: Path
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def rejected(self) -> Path:
        """Where to write rows that cannot be used, if there are any."""
        return self.output.with_suffix(".rejected_rows.jsonl")

    @property
    def kept(self) -> Path:
        """Where to keep what took long to make, so that an interrupted command goes on."""
        return self.output.with_suffix(".answers.jsonl")

    def require_models(self, suite: str) -> None:
        """Stop where a suite that asks models is given none.

        Raises:
            ConfigError: there are none.
        """
        if not self.models:
            raise ConfigError("align eval", [("MODEL", f"is missing: --suite {suite} asks models")])

    def require_policies(self, suite: str) -> None:
        """Stop where a suite whose models write answers is given none, or one that only scores them.

        Raises:
            ConfigError: which.
        """
        self.require_models(suite)
        scores = {name: "is a rule" for name in self.models if is_rule(name)}
        scores |= {name: "is a reward model" for name in self.models if name not in scores and is_reward_folder(name)}
        if scores:
            what = f", and --suite {suite} asks models that write answers"
            raise ConfigError("align eval", [(name, kind + what) for name, kind in scores.items()])

    def refuse_models(self, suite: str, reads: str) -> None:
        """Stop where a suite that asks no model is given one.

        Args:
            reads: what it reads instead.

        Raises:
            ConfigError: there are some.
        """
        if self.models:
            raise ConfigError("align eval", [("MODEL", f"is not asked by --suite {suite}, which reads {reads}")])

    @property
    def source(self) -> str:
        """The data.

        Raises:
            ConfigError: none are named, and no run has held-out data.
        """
        if self.data is None:
            raise ConfigError("align eval", [("--data", "is missing: none of the models is a run with held-out data")])
        return self.data


def asked_of(
    models: Sequence[str], data: str | None, reference: str | None, max_length: int | None, output: Path
) -> Asked:
    """What is asked of models; recipes among them are replaced by their runs.

    Raises:
        ConfigError: a recipe cannot be read, or has not been run.
    """
    names = tuple(dict.fromkeys(map(_run_of, models)))
    recipes = {name: recipe for name in names if (recipe := _resolved(name)) is not None}
    held_out = (recipe["data"].get("eval") for recipe in recipes.values())
    return Asked(names, data or next(filter(None, held_out), None), reference, max_length, output, recipes)


def settings_of(
    suites: Mapping[str, ModuleType], given: Sequence[str], recipes: Mapping[str, Mapping[str, Any]]
) -> dict[str, Section]:
    """Each suite's settings: what is given, then what the first run's ``generation`` section says, then defaults.

    Args:
        suites: their modules, by name; a key goes to every one that has it.
        given: ``key=value``, with dotted keys and YAML values.
        recipes: of the runs.

    Raises:
        ConfigError: with every problem, each under its key.
    """
    tree = OmegaConf.create({})
    for text in given:
        _set(tree, text)
    typed: dict[str, Any] = OmegaConf.to_container(tree)
    known = {name: set(module.Settings.model_fields) for name, module in suites.items()}
    every = sorted(set().union(*known.values()))
    problems = []
    for key in typed:
        if key not in every:
            near = nearest(key, every, cutoff=0.6)
            hint = (
                f"; did you mean {near}?" if near else f"; it takes {', '.join(every)}" if every else "; it takes none"
            )
            problems.append((key, f"is no setting of {' or '.join(suites)}{hint}"))
    if problems:
        raise ConfigError("align eval", problems)
    from_run: Mapping[str, Any] = next(iter(recipes.values()), {}).get("generation") or {}
    found: dict[str, Section] = {}
    for name, module in suites.items():
        values = {key: value for key, value in {**from_run, **typed}.items() if key in known[name]}
        try:
            found[name] = module.Settings.model_validate(values)
        except ValidationError as error:
            problems += model_problems(error, module.Settings, values, {})
    if problems:
        raise ConfigError("align eval", list(dict.fromkeys(problems)))
    return found


def tell_faults(faults: Sequence[Fault], rows: int, rejected: Path) -> None:
    """Write rows that cannot be used to a file and say so; a file of an earlier command under this name goes.

    Args:
        rows: how many were read.
        rejected: the file.
    """
    rejected.unlink(missing_ok=True)
    if faults:
        write_rejected(rejected, faults)
        print(fault_report(faults, rows, rejected))


def is_reward_folder(name: str) -> bool:
    """Whether a model is a folder that holds a reward or preference model."""
    try:
        return Path((reward_folder(name) or "").partition("@")[0]).is_dir()
    except ValueError:
        return False


def _set(tree: DictConfig, text: str) -> None:
    key, _, value = text.partition("=")
    try:
        OmegaConf.update(tree, key, parse_yaml(value, "setting"), force_add=True)
    except (ConfigError, TypeError, ValueError) as error:
        raise ConfigError("align eval", [(key, f"'{value}' cannot be read: {error}")]) from error


def _run_of(model: str) -> str:
    """The run of a recipe that is named by its file or, where no folder is called so, as a shipped one."""
    path = Path(model).expanduser()
    if path.suffix not in (".yaml", ".yml") and (path.exists() or model not in shipped_recipes()):
        return model
    output = load_recipe(model).output
    if not (Path(output).expanduser() / RESOLVED).is_file():
        raise ConfigError("align eval", [(model, f"its run {output} is not there: align train {model} first")])
    return output


def _resolved(model: str) -> dict[str, Any] | None:
    path = Path(model).expanduser() / RESOLVED
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise AlignError(f"{path} cannot be read: {error}") from error
    return found
