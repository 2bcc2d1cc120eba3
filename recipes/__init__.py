"""Recipes: one YAML per run, and the small data sets that the project made.

``align recipes ls`` lists them, ``align recipes cp NAME`` copies one to edit, and a recipe names the data here as
``align:NAME/SPLIT`` (``align:quickstart/train`` is ``data/quickstart_train.jsonl``). Every data set keeps its
generator beside it, as ``data/make_*.py``.
"""
