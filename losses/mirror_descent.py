"""Mirror descent policy optimisation: a policy gradient with a trust region in place of clipping."""

from __future__ import annotations

import torch
from torch import Tensor

from .catalogue import selfplay_loss
from .checks import Positive, check_reference, check_shape, wide
from .laws import SUMS, Laws
from .types import LossOutput, check_bounded, check_type


@selfplay_loss(
    "mdpo",
    reference=True,
    default_beta=None,
    paper="arXiv:2005.09814",
    formula="-e^d A + (d e^d - e^d + 1)/t",
    purpose="mirror descent on advantages: a trust region by KL to the policy that gave the answers, without clipping",
    laws=Laws(
        fails={
            "prompt_shift": "a constant in A adds -c e^d, which is without gradient in expectation alone",
            "duplication": SUMS,
        },
        not_applicable={
            "swap": "one element at a time: nothing is ranked",
            "small_beta": "no beta",
            "large_beta": "no beta",
            "padding": "its elements are chosen by the caller: no padding comes here",
        },
    ),
)
def mdpo(logps: Tensor, previous: Tensor, advantage: Tensor, *, step_size: Positive = 1.0) -> LossOutput:
    """Mirror descent policy optimisation (arXiv:2005.09814, on policy, with the KL estimated from samples).

    ``loss = -e^d A + (d e^d - e^d + 1) / t`` with ``d = log pi - log pi_k``, for elements drawn from ``pi_k``. In
    expectation it is ``-E_pi[A] + KL(pi || pi_k) / t``, whose minimum is ``pi_k exp(t A) / Z``. At ``pi = pi_k`` its
    gradient is the plain policy gradient: one step on a batch is no mirror descent, take several. ``d`` is clamped to
    [-20, 20] nats, and an element beyond that gives no gradient.

    Args:
        logps: log-probs of the elements (tokens, or whole answers) under the policy, nats, (N,).
        previous: the same under the policy that gave them, detached here, (N,).
        advantage: how much better than average each element is, detached here, (N,).
        step_size: the paper's t, in nats per advantage.

    Returns:
        Unreduced loss (N,), and the rewards ``d / t`` (N, 1), at the minimum the advantages up to a constant.

    Raises:
        ValueError: step_size is not positive, sizes that differ, or a number that is not finite.
    """
    check_type("logps", logps, Tensor)
    check_reference("previous", previous, Tensor)
    if logps.ndim != 1:
        raise ValueError(f"logps has shape {tuple(logps.shape)} and must have (N,): one an element")
    check_shape("previous", previous, logps.shape, "one an element")
    check_shape("advantage", advantage, logps.shape, "one an element")
    for name, values in (("logps", logps), ("previous", previous), ("advantage", advantage)):
        check_bounded(name, values)
    d = (wide(logps) - wide(previous).detach()).clamp(-20, 20)
    ratio = d.exp()
    # expm1: near d = 0 the term is d^2 / 2, and exp(d) - 1 would have lost it.
    kl = d * ratio - torch.expm1(d)
    loss = -ratio * wide(advantage).detach() + kl / step_size
    return LossOutput(loss, (d / step_size).detach()[:, None])
