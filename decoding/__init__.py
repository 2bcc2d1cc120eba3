"""Decoding: samplers that follow a constraint or a reward, on any engine. The floor between ``rewards`` and ``evals``.

- ``constraints``  what an answer may be, asked one token at a time: regex, JSON Schema, grammars, SQL on a schema,
  word lists, Python predicates, AND and OR of them, and laws that any constraint is put through.
- ``law``          the law that tokens are drawn from: the model's, or what temperature, top-k and top-p make of it.
- ``awrs``         a token under a constraint with a proper weight, from a few questions; ``masking`` and ``rejection``
  are what it is compared with, ``lazy`` is what all draw by.
- ``smc``          sequences: particles, resampling and the normaliser, free of any engine.
- ``engines``      what gives logits of many sequences at once: a transformers model with a cache that forks.
- ``generate``     requests with constraints and rewards to weighted answers, in one batch; ``request`` says what is
  asked, ``task`` is what is under way.
- ``transfer_q``   tokens or blocks by what a reward says of where an aligned baseline goes from them, and its
  relatives (ARGS, Controlled Decoding, best of n); ``guided`` says what is asked and answered, ``values`` what a
  candidate is worth.
"""
