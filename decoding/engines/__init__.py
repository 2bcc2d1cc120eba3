"""Engines: what gives the next token's logits of many sequences at once.

- ``protocol``      the few methods that the decoders ask for.
- ``rollouts``      continuations by those methods, with common beginnings computed once.
- ``remote``        rollouts of a model behind a server.
- ``transformers``  any causal model whose cache transformers keeps as keys and values, or as recurrent states.
"""

from .protocol import Engine, Rollout, Rollouts
from .transformers import TransformersEngine

__all__ = ["Engine", "Rollout", "Rollouts", "TransformersEngine"]
