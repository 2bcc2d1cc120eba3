"""Align: preference alignment for language models.

One namespace, six floors; a floor imports only from those below it.

- ``align.losses``    log-probs from hidden states and the preference losses: pure tensor functions, torch alone.
- ``align.rewards``   rules and models that say how good an answer is.
- ``align.decoding``  decoders that follow a constraint or a reward.
- ``align.evals``     what a model, a reward or a decoder is worth, with intervals.
- ``align.recipes``   YAML recipes and the small data that the project itself made.
- ``align.cli``, ``align.config``, ``align.data``, ``align.models``, ``align.trainers``, ``align.tracking``,
  ``align.reports``, ``align.run``: the run, from a recipe to a report.

This file imports nothing, so that ``import align.losses`` costs torch and ``align --help`` costs nothing.
"""
