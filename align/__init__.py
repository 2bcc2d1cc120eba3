"""Align: preference alignment for language models.

One namespace, six floors; a floor imports only from those below it.

- ``align.losses``    log-probs from hidden states and the preference losses: pure tensor functions, torch alone.
- ``align.rewards``   rules and models that say how good an answer is.
- ``align.decoding``  decoders that follow a constraint or a reward.
- ``align.evals``     what a model, a reward or a decoder is worth, with intervals.
- ``align.recipes``   YAML recipes and the small data that the project itself made.
- ``align.cli``, ``align.config``, ``align.data``, ``align.models``, ``align.trainers``, ``align.tracking``,
  ``align.reports``, ``align.run``: the run, from a recipe to a report. ``align.evaluate`` and ``align.heldout`` are
  its evaluations, ``align.run_pal`` those of ``method: pal``; ``align.sweep`` is several runs of one recipe,
  ``align.dry_run`` what one would do.
- beside the run: ``align.score`` (columns for a data set, and filters by them), ``align.generate`` with
  ``align.controlled`` and ``align.answers`` (answers to a prompt or a file, and the file that they go to),
  ``align.suites`` (``align eval``), ``align.annotators`` (new annotators of a PAL model), ``align.doctor``.

This file imports nothing, so that ``import align.losses`` costs torch and ``align --help`` costs nothing.
"""
