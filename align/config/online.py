"""Section ``online`` and what it asks of the other sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from .explain import Problem
from .paths import model_problem
from .section import Section


class OnlineSpec(Section):
    """Training on answers that the policy gives as it learns."""

    annotator: str | dict[str, Any]
    """Who compares the answers (``align.rewards.annotators``): ``module:function``, the folder of a reward model, an
    expression of several, or {reward, temperature}, {gpm}, {pal, annotators}, {compare}, {judge}."""
    labels: Literal["soft", "drawn", "argmax"] = "soft"
    """What the loss learns from: the probabilities, 0 or 1 drawn by them, or the likelier one: another game."""
    answers: int = Field(default=2, ge=2)
    """Answers to a prompt; pair losses learn from all pairs of them."""
    mixture: float = Field(default=0.0, ge=0, le=1)
    """Weight of the reference in the token-level mixture that answers are drawn from: over 0 it is IPO-MD with ipo,
    and the opponent of nash_md_pg."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest answer, tokens."""
    inner_steps: int = Field(default=1, ge=1)
    """Optimiser steps on the same answers; mdpo wants several."""
    reference: Literal["fixed", "ema", "previous"] = "fixed"
    """What the policy is compared and mixed with: the model before training, a moving average of the policy, or the
    policy of some steps ago."""
    decay: float = Field(default=0.99, ge=0, lt=1)
    """Of ema, per optimiser step."""
    every: int = Field(default=50, ge=1)
    """Optimiser steps between copies of the policy, of previous."""
    kl_penalty: float = Field(default=0.0, ge=0)
    """mdpo: weight of the log-ratio to the reference in the advantage, in win rate per nat."""
    cut_penalty: float = Field(default=0.0, ge=0)
    """Log-odds that an answer which max_new_tokens cut loses against one that has ended; the annotator reads its text
    alone."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What draws the policy's answers; a mixture is drawn by transformers."""
    annotator_seconds: float = Field(default=600.0, gt=0)
    """How long the annotator may take for the answers of a step."""
    eval_prompts: int = Field(default=32, ge=2)
    """Held-out prompts (the first ones) that the policy and the model before training answer whenever
    training.eval_strategy says so."""


def check_online(recipe: Mapping[str, Any]) -> list[Problem]:
    """Problems of section ``online``, or of a method that cannot do without it."""
    from align.losses import LOSSES

    spec, method = recipe.get("online"), recipe.get("method")
    info = LOSSES.get(method) if isinstance(method, str) else None
    if spec is None:
        return []
    if not isinstance(spec, Mapping):
        return []  # told already
    if info is None or not (info.kind == "selfplay" or (info.kind == "pair" and info.soft)):
        fitting = [name for name, one in LOSSES.items() if one.kind == "selfplay"]
        what = f"{method} does not learn" if method else "no method, and a sum of losses does not learn"
        what += " from answers of its own; a pair loss with soft labels does (ipo, dpo, slic), and "
        return [("method", what + ", ".join(fitting))]
    problems = annotator_problems("online.annotator", spec.get("annotator")) + _unread(str(method), spec)
    model = recipe.get("model")
    if spec.get("engine") == "vllm" and (spec.get("mixture") or 0) > 0:
        problems.append(("online.engine", "vllm draws from one model; a mixture takes engine: transformers"))
    if spec.get("engine") == "vllm" and isinstance(model, Mapping) and model.get("trust_remote_code"):
        problems.append(("online.engine", "vllm does not run code that comes with a model; use transformers"))
    return problems


def _unread(method: str, spec: Mapping[str, Any]) -> list[Problem]:
    """Settings that the method, or another setting, makes meaningless."""
    problems = []
    if method == "nash_md_pg" and spec.get("answers", 2) != 2:
        problems.append(("online.answers", f"is {spec['answers']}; nash_md_pg takes 2, one of them from the mixture"))
    if method == "nash_md_pg" and spec.get("inner_steps", 1) != 1:
        what = "a policy gradient is of answers of the policy as it is; remove it"
        problems.append(("online.inner_steps", f"is {spec['inner_steps']}; {what}"))
    if method == "mdpo" and spec.get("mixture"):
        problems.append(("online.mixture", "mdpo's ratios are to the policy that drew the answers; remove it"))
    if method != "mdpo" and spec.get("kl_penalty"):
        problems.append(("online.kl_penalty", f"belongs to mdpo; {method} has its pull to the reference in loss.beta"))
    if method.startswith("gpo") and spec.get("labels", "soft") != "soft":
        problems.append(("online.labels", f"{method} learns from scores, which have no hard labels; remove it"))
    if "decay" in spec and spec.get("reference") != "ema":
        problems.append(("online.decay", "belongs to online.reference: ema"))
    if "every" in spec and spec.get("reference") != "previous":
        problems.append(("online.every", "belongs to online.reference: previous"))
    return problems


def annotator_problems(at: str, given: Any) -> list[Problem]:
    """What is wrong with the annotator that the recipe names at ``at``."""
    from align.rewards.annotators import parse_annotator
    from align.rewards.expression import ExpressionError

    if given is None:
        return []  # told already: it has no default
    try:
        parsed = parse_annotator(given)
    except ExpressionError as error:
        return [(f"{at}.{error.where}".rstrip("."), error.problem)]
    return [
        (f"{at}.{where}".rstrip("."), what) for where, name in parsed.models.items() if (what := model_problem(name))
    ]
