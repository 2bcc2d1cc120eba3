"""Rewards: what says how good an answer is.

- ``align.rewards.rules``  plain-Python rewards, readable line by line; ``everyday_answer`` labels the quickstart data
  and judges its win rate.
- ``align.rewards.text``   words, sentences and lists of English text, as the rules count them.
- ``align.rewards.named``  names: ``module:function`` to a rule, and where a reward model is.
- ``align.rewards.scorers``  a rule and a reward model, one for the other.
- ``align.rewards.models``  a causal backbone with a scalar, attribute or preference (GPM) head: ``RewardModel``;
  ``kinds``, ``heads``, ``carrier``, ``encoding`` and ``batches`` are its parts.
- ``align.rewards.pal``    PAL, one reward an annotator, on embeddings; ``pal_model`` with its backbone.
- ``align.rewards.transforms``  rewards as log-probabilities of being good (LSC), and their AND, OR, NOT.
- ``align.rewards.references``  what an answer has to beat, by quantile or regression.
- ``align.rewards.expression``  several rewards put together, as a recipe writes it: ``all_of``, ``lsc``, ...
- ``align.rewards.functions``  any of them, rule or model, as a reward function of TRL's GRPO.
- ``align.rewards.annotators``  any of them, or a judge, as preferences among the K answers to a prompt: ``verdicts``.
- ``align.rewards.density``  not a reward but a weight: how much likelier a prompt is among the thumbs up than among
  the thumbs down (BCO's underlying distribution matching).

A rule is a callable ``(prompts, completions) -> list[float]``, higher is better, which may ask for columns by name and
give None; recipes name one as ``module:function``.
"""
