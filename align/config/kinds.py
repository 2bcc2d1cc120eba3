"""What methods learn from, and which evaluations go with them."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from align.data.splits import DataKind
    from align.rewards.kinds import Kind

Eval = Literal["thumbs", "preference", "generation", "displacement", "goals", "reward", "cycles", "pal"]
EVALS: tuple[Eval, ...] = ("thumbs", "preference", "generation", "displacement", "goals", "reward", "cycles", "pal")
WITHOUT_LOSSES = ("sft", "grpo", "pal")
"""Methods that are no loss of the table."""


def gives_answers(recipe: Mapping[str, Any]) -> bool:
    """Whether the policy gives the answers that it learns from, in an order of its own: sections online, iterate."""
    return any(recipe.get(section) is not None for section in ("online", "iterate"))


def group_column(method: str | None) -> Literal["scores", "win_rates"] | None:
    """What a method learns of groups of answers; None for one that learns from something else."""
    from align.losses import LOSSES  # torch: not for `align --help`

    if method not in LOSSES or LOSSES[method].kind != "selfplay":
        return None
    takes = signature(LOSSES[method].function).parameters
    return "scores" if "scores" in takes else "win_rates" if "win_rates" in takes else None


def data_kind(method: str | None, gives: bool = False) -> DataKind:
    """What a method learns from; pairs for losses that are not in the table.

    Args:
        gives: ``gives_answers``.
    """
    if gives:
        return "prompts"
    if method == "sft":
        return "completions"
    if method == "grpo":
        return "prompts"
    if method == "pal":
        return "judgements"
    if method is None:
        return "pairs"
    from align.losses import LOSSES

    if reward_kind(method) == "attributes":
        return "ratings"
    if group_column(method) is not None:
        return "groups"
    return "thumbs" if method in LOSSES and LOSSES[method].kind == "thumbs" else "pairs"


def reward_kind(method: str | None) -> Kind | None:
    """The kind of reward model that a method trains; None for a method that trains a policy."""
    if method is None or method in WITHOUT_LOSSES:
        return None
    from align.losses import LOSSES
    from align.rewards.kinds import kind_trained_by

    return kind_trained_by(LOSSES[method]) if method in LOSSES else None


def eval_applies(name: Eval, method: str | None, gives: bool = False) -> bool:
    """Whether an evaluation can run on what a method trains, with held-out data of its kind."""
    if gives:
        return name == "generation"
    trained = reward_kind(method)
    if name in ("reward", "cycles") or trained is not None:
        return trained is not None if name == "reward" else name == "cycles" and trained in ("scalar", "gpm")
    kind = data_kind(method)
    if name == "pal" or kind == "judgements":
        return name == "pal" and kind == "judgements"
    return name == "generation" or kind == {"thumbs": "thumbs", "goals": "prompts"}.get(name, "pairs")
