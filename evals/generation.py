"""Generation suite: answers before and after, side by side, judged by a reward."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.rewards.named import Reward
from align.rewards.scorers import RuleReward

from .kl import LogRatios
from .result import suite_result
from .sampling import Sample
from .statistics import Estimate, Z, bootstrap_interval, finite_vector, share_interval, win_rate


def compare(
    prompts: Sequence[str],
    before: Sequence[Sample],
    after: Sequence[Sample],
    reward: Reward,
    *,
    kl: LogRatios | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What changed in the answers to N prompts.

    Args:
        prompts: as the reward is to see them.
        before, after: answers of the reference and of the policy to the same prompts, in their order, drawn with the
            same seed and settings.
        reward: scores each answer; higher is better.
        kl: log-ratios of answers drawn from the policy for the first K <= N prompts, at temperature 1 for an unbiased
            KL; see :mod:`align.evals.kl`.
        settings: how the answers were drawn and the reward's name, kept in the result.

    Returns:
        Metrics, intervals by prompt: ``win_rate`` (a tie is half) and ``ties`` (share of prompts);
        ``reward_before``, ``reward_after`` and ``reward_change`` (paired); ``length_*`` (tokens, end token counted);
        ``unfinished_*`` (share that ``max_new_tokens`` cut); ``repetition_*`` (share of an answer's 3-grams of tokens
        that it has said before, mean over answers); ``distinct_*`` (different 2-grams of tokens as a share of all,
        over all answers together: low when the answers are alike; it also falls as text gets longer, so compare at
        similar length; its interval is ``distinct_estimate``'s). With ``kl``: ``kl_to_reference`` (nats per answer)
        and ``kl_to_reference_per_token`` (all nats over all tokens).
        Rows ``{prompt, before, after, kl}``, answers as ``{text, reward, tokens, finished, repetition}``; ``kl`` in
        nats is of the answer drawn for the KL and not of the one shown, unless they are the same; None where there is
        none.

    Raises:
        ValueError: counts that differ, or a reward that is not one finite number per answer.
    """
    if not len(prompts) == len(before) == len(after):
        raise ValueError(
            f"{len(prompts)} prompts, {len(before)} answers before, {len(after)} after: one each per prompt"
        )
    if kl is not None and not 0 < len(kl.nats) <= len(prompts):
        raise ValueError(f"{len(kl.nats)} log-ratios for {len(prompts)} prompts")
    old, new = _scores(reward, prompts, before), _scores(reward, prompts, after)
    metrics = {
        "win_rate": win_rate(old, new),
        "ties": share_interval(old == new),
        "reward_change": bootstrap_interval(new - old),
        **_side(before, old, "before"),
        **_side(after, new, "after"),
    }
    ratios: list[float | None] = [None] * len(prompts)
    about_kl: dict[str, Any] = {}
    if kl is not None:
        metrics["kl_to_reference"] = bootstrap_interval(kl.nats)
        metrics["kl_to_reference_per_token"] = bootstrap_interval(kl.nats, per=kl.tokens)
        ratios[: len(kl.nats)] = kl.nats
        about_kl = {
            "kl_estimator": "mean of log pi - log pi_ref over sampled answers (k1)",
            "kl_temperature": kl.temperature,
            "kl_unbiased": kl.temperature == 1.0,
        }
    rows = [
        {"prompt": prompt, "before": _answer(was, low), "after": _answer(now, high), "kl": ratio}
        for prompt, was, low, now, high, ratio in zip(prompts, before, old, after, new, ratios, strict=True)
    ]
    return suite_result("generation", metrics, rows, {**(settings or {}), **about_kl})


def repetition(tokens: Sequence[int]) -> float:
    """Share of the 3-grams of ``tokens`` that occurred before in it; 0 for fewer than three tokens."""
    grams = _ngrams(tokens, 3)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(answers: Sequence[Sequence[int]], n: int = 2) -> float:
    """Different n-grams as a share of all n-grams of all answers (distinct-n, arXiv 1510.03055); 1 where none are."""
    grams = [gram for tokens in answers for gram in _ngrams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else 1.0


def distinct_estimate(answers: Sequence[Sequence[int]], n: int = 2) -> Estimate:
    """``distinct`` with an interval, for as many answers as there are.

    The bootstrap would draw answers twice, whose n-grams are not different. So each answer is left out in turn (the
    jackknife): ``v = (N - 1)/N sum (d_i - mean d)^2``, which is too large rather than too small in the mean (Efron and
    Stein, Annals of Statistics 9, 1981), and the interval is ``d -+ 1.96 sqrt(v)``, within [0, 1]. Where v is 0, as
    where all n-grams differ, it would be a point, and there is none.
    """
    value, count = distinct(answers, n), len(answers)
    several = [Counter(_ngrams(tokens, n)) for tokens in answers]
    every = sum(several, Counter[tuple[int, ...]]())
    total = every.total()
    if count == 1 or total == 0:
        return Estimate(value, None, None, count)
    left_out = [
        (len(every) - sum(every[gram] == times for gram, times in own.items())) / (total - own.total())
        for own in several
        if own.total() < total
    ]
    if len(left_out) < count:  # all n-grams are of one answer
        return Estimate(value, None, None, count)
    reach = Z * math.sqrt((count - 1) * float(np.var(left_out)))
    if reach == 0:
        return Estimate(value, None, None, count)
    return Estimate(value, max(0.0, value - reach), min(1.0, value + reach), count)


def _ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def _scores(reward: Reward, prompts: Sequence[str], answers: Sequence[Sample]) -> NDArray[np.float64]:
    found = RuleReward(reward)(prompts, [answer.text for answer in answers])
    scores = [score for score in found if score is not None]
    if len(scores) < len(answers):
        raise ValueError(f"the reward gave None for answer {found.index(None)}: a win rate takes a number for each")
    return finite_vector(scores, "reward")


def _side(answers: Sequence[Sample], scores: NDArray[np.float64], when: str) -> dict[str, Estimate]:
    return {
        f"reward_{when}": bootstrap_interval(scores),
        f"length_{when}": bootstrap_interval([len(answer.tokens) for answer in answers]),
        f"unfinished_{when}": share_interval([not answer.finished for answer in answers]),
        f"repetition_{when}": bootstrap_interval([repetition(answer.tokens) for answer in answers]),
        f"distinct_{when}": distinct_estimate([answer.tokens for answer in answers]),
    }


def _answer(answer: Sample, score: float) -> dict[str, Any]:
    about = {"tokens": len(answer.tokens), "finished": answer.finished, "repetition": repetition(answer.tokens)}
    return {"text": answer.text, "reward": float(score), **about}
