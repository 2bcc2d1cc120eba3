"""Losses: preference objectives as pure tensor functions, and the log-probs that they stand on. Torch alone.

- ``types``      the carriers: ``SequenceLogps``, ``PairLogps``, ``UnpairedLogps``, ``LossOutput``.
- ``pairwise``   on pairs, with soft labels: IPO (the paper's and the per-token form), SLiC, SLiC-HF, SimPO, CPO, ORPO,
  and the SFT term; ``dpo_family`` DPO and its kin (length-normalised, robust and positive DPO, R-DPO);
  ``soft_labels`` what a loss is under a soft label, ``complement`` ``log(1 - P)``.
- ``listwise``   Plackett-Luce on rankings.
- ``binary``     BCO and KTO on single answers with a thumb up or down; BCO's reward shift, a module with a state.
- ``selfplay``   on answers that the policy gave: Nash-MD-PG, GPO, SPPO; labels and mixtures for online IPO, DPO, SLiC
  and IPO-MD; ``groups`` their pairs, ``mirror_descent`` MDPO.
- ``preference`` what trains reward models: Bradley-Terry and its kin, regression; ``general_preference`` GPM; ``pal``.
- ``logic``      losses from logical formulas: ``LogicLoss``.
- ``catalogue``  the table of losses, fed by a decorator beside each: does it need a reference, its default beta, its
  paper, its formula. Recipes, ``align recipes methods`` and the trainer read it.
- ``laws``       what a loss may obey, and how each declares where it stands.
- ``combine``    weighted sums of losses.
- ``rows``       token ids of pairs as tensors: prompts shared by their answers, several pairs packed into a row, or a
  row an answer; ``layouts`` which of these a model takes, and the mask that it is given.
- ``checks``     what is refused, by name: NaN, empty answers, settings out of range.
- ``similarity`` CHES, its length-normalised form and their baselines: how alike a model sees the answers of a pair.
- ``logprobs``   log-probs of completion tokens from hidden states and the head's weight, without the logits of every
  position, with their own backward.

A loss takes log-probs and returns an unreduced ``LossOutput``:

    from align.losses import PairLogps, SequenceLogps, ln_dpo

    policy = PairLogps(chosen=SequenceLogps(total=lw, length=nw), rejected=SequenceLogps(total=ll, length=nl))
    out = ln_dpo(policy, reference, beta=5.0)   # out.loss: (B,), out.chosen_rewards: (B,)
"""

from .binary import RewardShift, bco, kto, kto_kl
from .catalogue import (
    LOSSES,
    Loss,
    LossInfo,
    find_loss,
    pairwise_loss,
    ranking_loss,
    reward_loss,
    selfplay_loss,
    thumbs_loss,
)
from .combine import combine
from .laws import LAWS, Laws
from .listwise import plackett_luce
from .logic import FormulaError, LogicLoss
from .pairwise import cpo, dpo, dpop, ipo, ipo_per_token, ln_dpo, orpo, r_dpo, robust_dpo, sft, simpo, slic, slic_hf
from .preference import (
    bradley_terry,
    centering,
    chosen_by_strength,
    gpm,
    gpm_scale,
    gpm_score,
    margin_bradley_terry,
    pal_cross_entropy,
    pal_delta,
    pal_hinge,
    pal_logistic,
    pal_logits,
    regression,
    scaled_bradley_terry,
    token_weighted,
    unit_norm,
)
from .selfplay import (
    all_pair_values,
    all_pairs,
    argmax_labels,
    draw_labels,
    gpo,
    gpo_pointwise,
    mdpo,
    mean_scores,
    mixture_logps,
    nash_md_pg,
    sppo,
    sppo_pointwise,
)
from .types import LossOutput, PairLogps, SequenceLogps, UnpairedLogps

__all__ = [
    "LAWS",
    "LOSSES",
    "FormulaError",
    "Laws",
    "LogicLoss",
    "Loss",
    "LossInfo",
    "LossOutput",
    "PairLogps",
    "RewardShift",
    "SequenceLogps",
    "UnpairedLogps",
    "all_pair_values",
    "all_pairs",
    "argmax_labels",
    "bco",
    "bradley_terry",
    "centering",
    "chosen_by_strength",
    "combine",
    "cpo",
    "dpo",
    "dpop",
    "draw_labels",
    "find_loss",
    "gpm",
    "gpm_scale",
    "gpm_score",
    "gpo",
    "gpo_pointwise",
    "ipo",
    "ipo_per_token",
    "kto",
    "kto_kl",
    "ln_dpo",
    "margin_bradley_terry",
    "mdpo",
    "mean_scores",
    "mixture_logps",
    "nash_md_pg",
    "orpo",
    "pairwise_loss",
    "pal_cross_entropy",
    "pal_delta",
    "pal_hinge",
    "pal_logistic",
    "pal_logits",
    "plackett_luce",
    "r_dpo",
    "ranking_loss",
    "regression",
    "reward_loss",
    "robust_dpo",
    "scaled_bradley_terry",
    "selfplay_loss",
    "sft",
    "simpo",
    "slic",
    "slic_hf",
    "sppo",
    "sppo_pointwise",
    "thumbs_loss",
    "token_weighted",
    "unit_norm",
]
