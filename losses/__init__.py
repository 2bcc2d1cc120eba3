"""Losses: preference objectives as pure tensor functions, and the log-probs that they stand on. Torch alone.

- ``types``      the carriers: ``SequenceLogps``, ``PairLogps``, ``LossOutput``.
- ``pairwise``   on pairs, with soft labels (``soft_labels``): DPO and its kin (``dpo_family``: length-normalised, robust
  and positive DPO, R-DPO), IPO (the paper's and the per-token form), SLiC, SLiC-HF, SimPO, CPO, ORPO, the SFT term.
- ``listwise``   Plackett-Luce on rankings.
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
from .listwise import plackett_luce
from .pairwise import cpo, dpo, dpop, ipo, ipo_per_token, ln_dpo, orpo, r_dpo, robust_dpo, sft, simpo, slic, slic_hf
from .types import LossOutput, PairLogps, SequenceLogps

__all__ = [
    "LOSSES",
    "Loss",
    "LossInfo",
    "LossOutput",
    "PairLogps",
    "SequenceLogps",
    "combine",
    "cpo",
    "dpo",
    "dpop",
    "find_loss",
    "ipo",
    "ipo_per_token",
    "ln_dpo",
    "orpo",
    "pairwise_loss",
    "plackett_luce",
    "r_dpo",
    "robust_dpo",
    "sft",
    "simpo",
    "slic",
    "slic_hf",
]
