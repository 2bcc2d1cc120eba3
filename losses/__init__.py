"""Losses: preference objectives as pure tensor functions, and the log-probs that they stand on. Torch alone.

- ``types``      the carriers: ``SequenceLogps``, ``PairLogps``, ``LossOutput``.
- ``pairwise``   DPO, LN-DPO, IPO (the paper's and the per-token form), SLiC, SimPO, and the SFT term.
- ``catalogue``  the table of losses, fed by a decorator beside each: does it need a reference, its default beta, its
  paper, its formula. Recipes, ``align recipes methods`` and the trainer read it.
- ``combine``    weighted sums of losses.
- ``rows``       token ids of pairs as tensors: one row a pair with a shared prompt, or one row an answer.
- ``logprobs``   log-probs of completion tokens from hidden states and the head's weight, without the logits of every
  position, with their own backward.

A loss takes log-probs and returns an unreduced ``LossOutput``:

    from align.losses import PairLogps, SequenceLogps, ln_dpo

    policy = PairLogps(chosen=SequenceLogps(total=lw, length=nw), rejected=SequenceLogps(total=ll, length=nl))
    out = ln_dpo(policy, reference, beta=5.0)   # out.loss: (B,), out.chosen_rewards: (B,)
"""

from .catalogue import LOSSES, Loss, LossInfo, find_loss, pairwise_loss
from .combine import combine
from .pairwise import dpo, ipo, ipo_per_token, ln_dpo, sft, simpo, slic
from .types import LossOutput, PairLogps, SequenceLogps

__all__ = [
    "LOSSES",
    "Loss",
    "LossInfo",
    "LossOutput",
    "PairLogps",
    "SequenceLogps",
    "combine",
    "dpo",
    "find_loss",
    "ipo",
    "ipo_per_token",
    "ln_dpo",
    "pairwise_loss",
    "sft",
    "simpo",
    "slic",
]
