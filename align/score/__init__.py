"""Columns of rewards, log-probs and similarity for a data set (``align score``), and what to keep by them.

- ``rows``        a row as scorers see it: an id, a prompt, and answers by field.
- ``scorers``     what makes columns: a rule, a reward model; the names that ``--with`` knows.
- ``policy``      what the model itself says: log-probs, CHES and its kin, in one pass.
- ``dataset``     the same for a ``datasets.Dataset`` in a script of one's own: ``ches_scores``, ``filter_by``.
- ``references``  what ``LogSigmoidCentered`` is centred on: a quantile of the policy's answers, a canned answer,
  or a regression on the prompt.
- ``shards``      results on disk in pieces, so that an interrupted run goes on.
- ``output``      the input's rows with their new columns, as JSONL or Parquet.
- ``select``      what a rule keeps by the numbers of a column: a share, thresholds, groups.
- ``run``         one pass over the data, from rows to the file.
- ``filter``      rows by rules on columns, and a verdict with its reason for every row (``align filter``).
- ``filtered``    what a filter writes: rows that stay and that go, reasons, a page.
- ``training``    ``data.filter`` of a recipe: the rows that a run trains on, scored by its model where need be.
- ``preflight``   a look at a sample before training (``align train --preflight``).
"""
