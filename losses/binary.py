"""Losses on single answers with a thumb up or down, and the state that goes with them.

Notation of the formulas: ``S`` is the sum of token log-probs of an answer under the policy and ``R`` under the
reference (nats), ``r = S - R`` the log-ratio, ``sigma`` the logistic function; ``up`` and ``down`` are the answers
with that thumb. Both losses compare an answer with a point that stands for the other answers: BCO with the reward
shift ``delta``, KTO with an estimate of the KL to the reference. Those points come from whole batches, so they are
arguments here; ``RewardShift`` and ``kto_kl`` find them.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .catalogue import thumbs_loss
from .checks import Positive, check_none_negative, check_number, check_shape, log_ratio, wide
from .laws import SINGLE, SUMS, Laws
from .types import LARGEST_DERIVED, LossOutput, SequenceLogps, UnpairedLogps, check_bounded, check_type

ShiftMode = Literal["balanced_ema", "pooled"]


@thumbs_loss(
    "bco",
    reference=True,
    default_beta=0.1,
    paper="arXiv:2404.04656",
    formula="up: -log sigma(beta r - delta); down: -w log sigma(-(beta r - delta))",
    purpose="thumbs alone: a classifier of up against down whose logit is the reward, a bound on DPO's loss",
    laws=Laws(
        fails={
            "prompt_shift": "an answer is compared with the shift, not with another answer of its prompt",
            "duplication": SUMS,
        },
        not_applicable={"swap": SINGLE},
    ),
)
def bco(
    policy: UnpairedLogps, reference: SequenceLogps, shift: Tensor, weight: Tensor | None = None, *, beta: Positive
) -> LossOutput:
    """Binary classifier optimisation (arXiv:2404.04656).

    ``loss = -log sigmoid(beta * r - shift)`` for a thumb up and ``-weight * log sigmoid(-(beta * r - shift))`` for a
    thumb down. For an up and a down answer of one prompt at weight 1, the sum of the two is at least their DPO loss,
    whatever the shift, and nearest to it where the shift is the mean of their two rewards.

    Args:
        policy: totals (nats) and lengths (tokens) with their thumbs, (B,) each.
        reference: of the same completions, (B,).
        shift: delta, a scalar in units of the reward ``beta * r``; a constant to the gradient (``RewardShift``).
        weight: of each answer, (B,), 0 or more; a constant to the gradient. Thumbs down alone are weighted: density
            ratios (``align.rewards.density``) make their prompts look like those of the thumbs up. None: 1.
        beta: strength of the pull to the reference, per nat.

    Returns:
        Unreduced loss (B,), to be averaged over all rows whatever their weights, and the rewards ``beta * r``, (B, 1).

    Raises:
        ValueError: beta is not positive, the shift is not a finite scalar, a weight is negative or not finite, or
            policy and reference score different completions.
    """
    check_type("policy", policy, UnpairedLogps)
    _check_scalar("shift", shift)
    rewards = beta * log_ratio(policy.sequence, reference, "policy.sequence")
    margin = rewards - wide(shift).detach()
    loss = -F.logsigmoid(torch.where(policy.label, margin, -margin))
    if weight is not None:
        check_shape("weight", weight, loss.shape, "one an answer")
        check_bounded("weight", weight)
        check_none_negative("weight", weight)
        loss = torch.where(policy.label, loss, weight.detach().to(loss.dtype) * loss)
    return LossOutput(loss, rewards.detach()[:, None])


@thumbs_loss(
    "kto",
    reference=True,
    default_beta=0.1,
    paper="arXiv:2402.01306",
    formula="up: w_D (1 - sigma(beta (r - KL))); down: w_U (1 - sigma(beta (KL - r)))",
    purpose="thumbs alone, with a value that saturates: answers that are far off, mislabelled ones too, stop pushing",
    laws=Laws(
        fails={
            "prompt_shift": "an answer is compared with the KL, not with another answer of its prompt",
            "duplication": SUMS,
        },
        not_applicable={"swap": SINGLE},
    ),
)
def kto(
    policy: UnpairedLogps,
    reference: SequenceLogps,
    kl: Tensor,
    *,
    beta: Positive,
    desirable_weight: Positive = 1.0,
    undesirable_weight: Positive = 1.0,
) -> LossOutput:
    """Kahneman-Tversky optimisation (arXiv:2402.01306).

    ``loss = desirable_weight * (1 - sigmoid(beta * (r - kl)))`` for a thumb up and
    ``undesirable_weight * (1 - sigmoid(beta * (kl - r)))`` for a thumb down.

    Args:
        policy: totals (nats) and lengths (tokens) with their thumbs, (B,) each.
        reference: of the same completions, (B,).
        kl: estimate of the KL from policy to reference, a scalar in nats, 0 or more; a constant to the gradient
            (``kto_kl``).
        beta: strength of the pull to the reference, per nat.
        desirable_weight, undesirable_weight: the paper's lambda_D and lambda_U. It asks for a ratio of (weight times
            number of thumbs up) to (weight times number of thumbs down) between 1 and 3/2.

    Returns:
        Unreduced loss (B,), between 0 and the weight, and the rewards ``beta * r``, (B, 1).

    Raises:
        ValueError: beta or a weight is not positive, kl is not a finite scalar or is negative, or policy and reference
            score different completions.
    """
    check_type("policy", policy, UnpairedLogps)
    _check_scalar("kl", kl)
    check_none_negative("kl", kl)
    rewards = beta * log_ratio(policy.sequence, reference, "policy.sequence")
    margin = rewards - beta * wide(kl).detach()
    # 1 - sigmoid(z) loses every digit from z = 17 on in float32; sigmoid(-z) is the same and loses none.
    loss = torch.where(
        policy.label, desirable_weight * torch.sigmoid(-margin), undesirable_weight * torch.sigmoid(margin)
    )
    return LossOutput(loss, rewards.detach()[:, None])


def kto_kl(policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
    """KTO's estimate of the KL from policy to reference: ``max(0, mean r)`` over mismatched answers.

    Args:
        policy, reference: of prompts with answers that belong to other prompts, (B,) each; not the answers that the
            loss is computed on. Once ``torch.distributed`` is initialised the mean is over the rows of all processes,
            and all of them call.

    Returns:
        A scalar, nats, 0 or more, detached.

    Raises:
        ValueError: policy and reference score different completions, or there is no row.
    """
    ratio = log_ratio(policy, reference).detach()
    reduced = _over_processes([ratio.cpu().double().sum(), _count(ratio)], ratio.device)
    if not reduced[1]:
        raise ValueError("policy has no row: a mean is of one mismatched answer or more")
    return (reduced[0] / reduced[1]).clamp(min=0).to(ratio)


class RewardShift(nn.Module):
    """BCO's reward shift ``delta``: the point between the rewards of the thumbs up and those of the thumbs down.

    - ``balanced_ema``: ``(E[reward | up] + E[reward | down]) / 2`` as in the paper, each mean a moving average over
      batches, ``m <- decay * m + (1 - decay) * (mean of the class in the batch)``, divided by ``1 - decay^t`` after
      ``t`` batches so that its start at 0 does not pull (the batches of a class are weighted 1, decay, decay^2 ...
      from the last one back). A batch without one of the classes leaves that class as it is. Until both have been
      seen, delta is the mean of the one that has.
    - ``pooled``: the mean of all rewards ever seen, of both classes together, as TRL had it. With nine thumbs up to
      one down it lies at the thumbs up.

    The state is in buffers and comes back with ``load_state_dict``; each mode has buffers of its own, so that the
    state of one does not load into the other. Keep it beside the model and not in it: ``model.to(torch.bfloat16)``
    would round it.

    Args:
        mode: see above.
        decay: of the moving averages, in [0, 1); ``pooled`` does not read it.

    Raises:
        ValueError: an unknown mode, or a decay outside [0, 1).
    """

    weighted: Tensor
    mass: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, mode: ShiftMode = "balanced_ema", decay: float = 0.9) -> None:
        super().__init__()
        if mode not in get_args(ShiftMode):
            raise ValueError(f"mode is {mode!r}: it is one of {', '.join(get_args(ShiftMode))}")
        check_number("decay", decay)
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}: it must be in [0, 1)")
        self.mode, self.decay = mode, decay
        # Of thumbs down and up, in that order; the mean is the first divided by the second.
        for name in ("weighted", "mass") if mode == "balanced_ema" else ("total", "count"):
            self.register_buffer(name, torch.zeros(2, dtype=torch.float64))

    @torch.no_grad()
    def update(self, rewards: Tensor, label: Tensor) -> None:
        """Take in one global batch, before its loss is computed with the new ``value``.

        Once ``torch.distributed`` is initialised, sums and counts are added up over all processes, in float64, and all
        of them call; each brings its share of the batch, which may be empty.

        Args:
            rewards: ``beta * r``, (B,).
            label: True for thumbs up, (B,), Boolean.

        Raises:
            ValueError: the shapes differ, labels are not Boolean, or a reward of any process is NaN, infinite or
                beyond +-1e20 (then every process raises, and the state is as it was: a cumulative mean would never
                forget it).
        """
        check_type("rewards", rewards, Tensor)
        check_type("label", label, Tensor)
        if label.dtype != torch.bool:
            raise ValueError(f"label is {label.dtype}: a thumb is up (True) or down (False)")
        if rewards.ndim != 1 or rewards.shape != label.shape:
            raise ValueError(f"rewards and label have shape (B,), not {tuple(rewards.shape)} and {tuple(label.shape)}")
        values, up = rewards.cpu().double(), label.cpu()
        parts = [f(values[mask]) for mask in (~up, up) for f in (torch.sum, _count)]
        reduced = _over_processes([*parts, (~(values.abs() <= LARGEST_DERIVED)).sum()], rewards.device)
        if reduced[4]:
            check_bounded("rewards", values, LARGEST_DERIVED)
            raise ValueError(f"rewards of another process are NaN, infinite or beyond +-{LARGEST_DERIVED:g}")
        sums, counts = reduced[[0, 2]], reduced[[1, 3]]
        if self.mode == "pooled":
            self.total += sums.to(self.total)
            self.count += counts.to(self.count)
            return
        seen = (counts > 0).to(self.mass.device)
        means = (sums / counts.clamp(min=1)).to(self.mass)
        self.weighted.copy_(torch.where(seen, self.decay * self.weighted + (1 - self.decay) * means, self.weighted))
        self.mass.copy_(torch.where(seen, self.decay * self.mass + (1 - self.decay), self.mass))

    @property
    def value(self) -> Tensor:
        """Delta, a float64 scalar in units of the reward; 0 before any answer was seen."""
        if self.mode == "pooled":
            return self.total.sum() / self.count.sum().clamp(min=1)
        seen = self.mass > 0
        means = torch.where(seen, self.weighted / torch.where(seen, self.mass, 1.0), 0.0)
        return means.sum() / seen.sum().clamp(min=1)


def _count(values: Tensor) -> Tensor:
    return torch.tensor(values.numel())


def _over_processes(parts: list[Tensor], device: torch.device) -> Tensor:
    """The scalars added up over all processes, float64 on the CPU; ``device`` is one that the backend can reach."""
    stacked = torch.stack([part.double() for part in parts])
    if dist.is_available() and dist.is_initialized():
        stacked = stacked.to(device)
        dist.all_reduce(stacked)
    return stacked.cpu()


def _check_scalar(name: str, value: Tensor) -> None:
    check_shape(name, value, (), "one for the whole batch")
    check_bounded(name, value, LARGEST_DERIVED)
