"""Suites of ``align eval``: models, decoders and rewards compared on the same data.

Each module has ``Settings``, the keys that it takes as ``key=value``; ``run(asked, settings)``, which measures and
returns one JSON-able result (``align.evals.result``); and ``show(result)``, which prints it. ``asked`` is what all of
them share: models, data, reference. The statistics are in ``align.evals``; a run's own evaluations, after training,
are in ``align.evaluate``.
"""

from __future__ import annotations

SUITES: dict[str, str] = {
    "generation": "whose answers to prompts are preferred, plainly and at equal length; reward, KL, diversity",
    "frontier": "what does reward cost in KL: training, best of n, Transfer-Q*, SMC, the adapter's scale?",
    "constrained": "under a constraint: which share is valid, by which sampler, at what cost?",
    "preference": "who ranks the chosen answer first: policies, reward models, rules? per subset, RewardBench too",
    "calibration": "can the probabilities that rewards, policies and annotators state be trusted?",
    "pluralism": "whom does a reward serve: each annotator, the worst one, the worst group; what does PAL bring?",
    "cycles": "on preferences that run in a circle, does a model do better than any reward can?",
    "judges": "how far do annotators agree with people, and do position and length move them?",
    "displacement": "did the chosen answers of pairs fall too, where did their probability go, at which checkpoint?",
    "exact": "align verify as a file: do losses and samplers reach what worlds with a known truth ask of them?",
    "lm-eval": "tasks of lm-evaluation-harness before and after: what did alignment cost elsewhere?",
    "resampling": "sampling until a verifier passes: what do its mistakes cost, how many samples are best?",
}
"""By name, what each asks. ``NAME`` stands in the module of that name."""
