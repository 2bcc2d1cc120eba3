"""KL of a policy to its reference, estimated on answers that were sampled from the policy.

The estimator is the mean of ``log pi(y|x) - log pi_ref(y|x)``, known as k1, one answer per prompt. It is unbiased for
``KL(pi || pi_ref)`` when the answers are drawn from pi itself: at temperature 1, without top-p or top-k. Answers drawn
at another temperature T are not from pi, and the same mean then estimates the log-ratio that readers of such answers
meet, which can be far from the KL. So draw the answers for the KL at temperature 1, apart from those that are judged;
at the price of another round of sampling, the number means what its name says. Answers stop at ``max_new_tokens``: it
is the KL of answers cut there, which is at most that of whole answers. A mean over few answers can be negative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from align.losses.types import SequenceLogps

from .sampling import Sample

Logps = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], SequenceLogps]
"""``(prompt ids, completion ids) -> log-probs of the completions``, at temperature 1, one per row."""


@dataclass(frozen=True)
class LogRatios:
    """``log pi - log pi_ref`` of sampled answers.

    Args:
        nats: one per answer.
        tokens: length of each answer.
        temperature: at which the answers were drawn; the mean of ``nats`` estimates the KL when it is 1.
    """

    nats: list[float]
    tokens: list[int]
    temperature: float


def log_ratios(
    prompts: Sequence[Sequence[int]],
    samples: Sequence[Sample],
    policy: Logps,
    reference: Logps,
    *,
    temperature: float,
    batch_size: int = 16,
) -> LogRatios:
    """Score answers of the policy under the policy and under the reference.

    Args:
        prompts: token ids, one list per answer.
        samples: answers that the policy gave to them.
        policy, reference: log-probs under the two models; they are asked for ``batch_size`` rows at a time.
        temperature: at which ``samples`` were drawn.
        batch_size: rows per call.

    Raises:
        ValueError: counts differ, or a scorer saw another number of tokens than was sampled (it truncated).
    """
    if len(prompts) != len(samples):
        raise ValueError(f"{len(prompts)} prompts and {len(samples)} answers")
    nats: list[float] = []
    for start in range(0, len(samples), batch_size):
        part = slice(start, start + batch_size)
        completions = [answer.tokens for answer in samples[part]]
        scored = [logps(prompts[part], completions) for logps in (policy, reference)]
        for one in scored:
            if one.length.tolist() != [len(tokens) for tokens in completions]:
                raise ValueError(
                    f"answers {start} and on: scored and sampled token counts differ; were they truncated?"
                )
        change = scored[0].total.detach().double().cpu() - scored[1].total.detach().double().cpu()
        nats.extend(change.tolist())
    return LogRatios(nats, [len(answer.tokens) for answer in samples], temperature)
