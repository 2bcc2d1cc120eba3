"""Trainers: thin subclasses of TRL's, and what a recipe needs to build one.

- ``pair``       ``PairTrainer``: TRL's ``DPOTrainer`` with any loss of the table, packed rows, log-probs of
  completion tokens alone, loss-true metrics, and the check at the first step that policy and reference agree.
- ``thumbs``     ``ThumbsTrainer``: TRL's ``KTOTrainer`` with BCO or KTO, their state and their metrics.
- ``grpo``       ``GroupTrainer``: TRL's ``GRPOTrainer`` on any reward or combination; references made before.
- ``online``     ``OnlineTrainer``: answers of the policy as it learns, compared by an annotator. ``grouped`` is a loss
  on groups of answers, ``rated`` training on groups of the data; ``windows`` the order of prompts, ``judging`` the
  annotator and the labels, ``moving`` a reference that follows, ``kept`` what is on disk, ``pushed`` answers by vLLM.
- ``references`` what answers have to beat, by the starting policy; ``align score`` makes its columns so, too.
- ``reward``     ``RewardTrainer``: TRL's, with the heads of ``align.rewards.models`` and any reward loss.
- ``pal``        PAL on embeddings that were made once; ``pal_backbone`` together with its backbone.
- ``host``       what they do alike: the layout of rows, the reference, its check, the clock, resuming.
- ``given``      a data set from Python: what it may be, and what is said of rows that cannot be used.
- ``matching``   BCO's weights of prompts; ``thumbs_collate`` the batches, and KTO's mismatched answers;
  ``thumbs_loss`` a loss with its state; ``thumbs_metrics`` what is logged of it.
- ``collate``    tokenised pairs to the tensors of one forward pass.
- ``reference_cache`` the log-probs of a fixed reference, computed once for any number of runs; ``logp_shards`` their
  files, ``reference_host`` the trainer's part.
- ``build``      model, adapter, reference and arguments from a recipe, with the facts that the manifest states;
  ``build_online``, ``build_reward`` and ``build_pal`` for these methods.
- ``plan``       steps and memory of a run before it begins, and whether activations are computed again.
- ``memory``     freed memory back to the system every few steps.
- ``interrupt``  Ctrl-C and SIGTERM: save after the step in hand, then stop.

Private attributes of TRL that are used here are named in ``tests/align/trainers/test_trl_contract.py``.
"""

import warnings

# Of its own path to vLLM, which is not taken here.
warnings.filterwarnings("ignore", "TRL currently supports vLLM versions", UserWarning)
