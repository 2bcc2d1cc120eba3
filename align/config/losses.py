"""``method``, ``losses`` and ``loss`` against the table of losses."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any

from .explain import Problem, nearest, type_problem, unknown_name
from .kinds import WITHOUT_LOSSES, gives_answers, group_column, reward_kind

if TYPE_CHECKING:
    from align.losses import Loss

logger = logging.getLogger(__name__)

LISTING = "align recipes methods"
OF_THE_MODEL = {("gpm", "tau")}
"""Settings that a model to go on from has already: where the recipe is silent, they stay what they are."""


def check_losses(recipe: Mapping[str, Any]) -> list[Problem]:
    """Problems of a recipe's losses: names, settings, their types and ranges."""
    method, terms, loss = recipe.get("method"), recipe.get("losses"), recipe.get("loss") or {}
    if (method is None) == (terms is None):
        what = "both are given" if method is not None else "neither is given"
        return [("method, losses", f"{what}; a recipe has one method, or a list of losses")]
    if isinstance(method, str) and isinstance(loss, Mapping):
        return _check_method(method, loss, gives_answers(recipe))
    if isinstance(terms, list):
        problems = [("loss", "belongs to method; with losses, each term holds its own settings")] if loss else []
        for index, term in enumerate(terms):
            if isinstance(term, Mapping) and isinstance(term.get("name"), str):
                problems += _check_term(term, f"losses.{index}")
        return problems
    return []


def with_implied_method(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with a formula under ``loss`` and neither method nor losses has ``method: logic``."""
    loss = recipe.get("loss")
    if isinstance(loss, Mapping) and "logic" in loss and recipe.keys().isdisjoint({"method", "losses"}):
        return {"method": "logic", **recipe}
    return recipe


def fill_losses(recipe: dict[str, Any]) -> None:
    """Write the settings that the user left to the table into a recipe without problems, in place."""
    if recipe.get("method") not in (None, *WITHOUT_LOSSES):
        recipe["loss"] = _settings(recipe["method"], recipe.get("loss") or {})
    for term in recipe.get("losses") or []:
        given = {key: value for key, value in term.items() if key not in ("name", "weight")}
        term.update(_settings(term["name"], given))


def _check_method(method: str, loss: Mapping[str, Any], gives: bool) -> list[Problem]:
    from align.losses import LOSSES

    if method in WITHOUT_LOSSES:
        return [(f"loss.{key}", f"method {method} has no such setting; remove it") for key in loss]
    if method not in LOSSES:
        trained = [name for name, info in LOSSES.items() if info.kind in ("pair", "thumbs") or reward_kind(name)]
        return [("method", unknown_name(method, [*trained, *WITHOUT_LOSSES], "method", LISTING))]
    used = LOSSES[method].kind == "selfplay" and (gives or group_column(method) is not None)
    if (what := _not_in_recipes(method)) and not used:
        return [("method", what)]
    return _check_settings(method, loss, "loss")


def _check_term(term: Mapping[str, Any], where: str) -> list[Problem]:
    from align.losses import LOSSES

    if term["name"] not in LOSSES:
        pairs = [name for name, info in LOSSES.items() if info.kind == "pair"]
        return [(f"{where}.name", unknown_name(term["name"], pairs, "loss", LISTING))]
    if reward_kind(term["name"]) is not None:
        return []  # told with section reward
    if LOSSES[term["name"]].kind == "selfplay":
        name = term["name"]
        return [(f"{where}.name", f"{name} learns from groups of answers and stands alone; write method: {name}")]
    if what := _not_in_recipes(term["name"]):
        return [(f"{where}.name", what)]
    settings = {key: value for key, value in term.items() if key not in ("name", "weight")}
    return _check_settings(term["name"], settings, where)


def _not_in_recipes(name: str) -> str | None:
    """Where a loss is used that no recipe trains with, or None."""
    from align.losses import LOSSES

    used = {
        "ranking": "reads K ranked answers to a prompt, and recipes train on pairs or thumbs; call it from Python "
        f"(align.losses.{name})",
        "selfplay": "learns from answers that the policy gives as it learns: it takes section online",
        "reward": "is a part of training a reward or preference model, and no method by itself; call it from Python "
        f"(align.losses.{name})",
    }
    what = used.get(LOSSES[name].kind) if reward_kind(name) is None else None
    return what and f"{name} {what}"


def _check_settings(name: str, settings: Mapping[str, Any], where: str) -> list[Problem]:
    from align.losses import LOSSES
    from align.losses.checks import setting_hints

    info, problems = LOSSES[name], []
    hints = setting_hints(info.function)
    for key, value in settings.items():
        if key in info.parameters:
            what = type_problem(value, hints[key])
        else:
            near, has = nearest(key, info.parameters), ", ".join(info.parameters)
            what = f"unknown key; did you mean {where}.{near}?" if near else f"{name} has no such setting"
            what += f"; it has: {has}" if has and not near else ""
        if what:
            problems.append((f"{where}.{key}", what))
    for key, parameter in info.parameters.items():
        if parameter.default is parameter.empty and key not in settings and key != "beta":
            problems.append((f"{where}.{key}", "is missing"))
    return problems or _out_of_range(name, settings, where)


def _out_of_range(name: str, settings: Mapping[str, Any], where: str) -> list[Problem]:
    """Ask the loss itself, on one row of one token, whether it takes these settings; what it warns of is logged."""
    import torch

    from align.losses import LOSSES, Loss, PairLogps, SequenceLogps
    from align.losses.logic import FormulaError
    from align.losses.types import UnpairedLogps

    one = SequenceLogps(total=torch.zeros(1), length=torch.ones(1))
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            loss = Loss(LOSSES[name], settings)
            if loss.info.kind == "pair":
                pair = PairLogps(chosen=one, rejected=one)
                loss(pair, pair)
            elif loss.info.kind == "reward":
                _ask_reward_loss(loss)
            elif loss.info.kind == "selfplay":
                _ask_selfplay_loss(loss)
            else:  # thumbs: the third argument is the shift or KL that the trainer keeps
                loss.info.function(UnpairedLogps(one, torch.tensor([True])), one, torch.zeros(()), **loss.settings)
    except FormulaError as error:
        return [(f"{where}.{error.argument}", error.problem)]
    except ValueError as error:
        return [(where, str(error))]
    for warning in warned:  # a formula's, for a reader of recipes: without the line of code that it comes from
        logger.warning("%s: %s", where, warning.message)
    return []


def _ask_reward_loss(loss: Loss) -> None:
    import torch

    one, takes = torch.ones(1), signature(loss.info.function).parameters
    columns = one[:, None].expand(1, 2)
    if "chosen" in takes:
        labels = {name: one for name in ("margin", "strength") if name in takes}
        loss.info.function(one, one, **labels, **loss.settings)
    else:
        loss.info.function(columns, columns, **loss.settings)


def _ask_selfplay_loss(loss: Loss) -> None:
    import torch

    from align.losses import SequenceLogps

    takes = signature(loss.info.function).parameters
    if "advantage" in takes:
        loss.info.function(*[torch.zeros(1)] * 3, **loss.settings)
        return
    shape = (1,) if "preference" in takes else (1, 2)
    group = SequenceLogps(total=torch.zeros(shape), length=torch.ones(shape))
    loss.info.function(group, group, torch.full(shape, 0.5), **loss.settings)


def _settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    from align.losses import LOSSES, Loss

    info = LOSSES[name]
    left = {key: p for key, p in info.parameters.items() if (name, key) not in OF_THE_MODEL}
    defaults = {key: p.default for key, p in left.items() if p.default is not p.empty}
    return {**defaults, **Loss(info, given).settings}
