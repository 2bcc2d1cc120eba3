"""Recipes as typed, strict objects.

- ``schema``    the keys of a recipe, with their types, defaults and units (pydantic models).
- ``read``      YAML as people expect it (``5e-7`` is a number, ``no`` is a word, a repeated key is an error).
- ``load``      ``load_recipe``: file or shipped recipe, ``base:``, overrides, every check, all problems at once.
- ``losses``    ``method``, ``losses`` and ``loss`` against the table of losses.
- ``training``  the ``training:`` section against the fields of TRL's configs.
- ``reward``, ``pal``  these sections, and what they ask of the others.
- ``paths``     files and folders that a recipe names.
- ``explain``   what is wrong, in words, with 'did you mean'.
- ``json_schema``  the JSON Schema that editors complete recipes from.

    from align.config.load import load_recipe

    recipe = load_recipe("quickstart", ["loss.beta=2", "training.max_steps=20"])
"""
