"""The reference of online training: the model before training, an average of policies, or an earlier policy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ADAPTER = "ref"
FILE = "reference.safetensors"
KINDS = ("fixed", "ema", "previous")


class MovingReference:
    """When and how the reference follows the policy.

    Args:
        kind: ``fixed`` does not; ``ema`` takes ``decay`` of itself and the rest of the policy after each optimiser
            step; ``previous`` becomes the policy every ``every`` steps.
        decay: in [0, 1).
        every: at least 1.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(self, kind: str, decay: float, every: int) -> None:
        if kind not in KINDS:
            raise ValueError(f"reference is {kind!r}: it must be one of {', '.join(KINDS)}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}: it must be in [0, 1)")
        if every < 1:
            raise ValueError(f"every is {every}: it must be at least 1")
        self.kind, self.decay, self.every = kind, decay, every

    def __bool__(self) -> bool:
        """Whether it moves at all."""
        return self.kind != "fixed"

    @staticmethod
    def add_adapter(model: PeftModel) -> None:
        """A second adapter, equal to the one in training, as the reference."""
        if ADAPTER in model.peft_config:
            return
        model.add_adapter(ADAPTER, model.peft_config["default"])
        with torch.no_grad():
            for own, theirs in _adapters(model):
                theirs.copy_(own)
        model.set_adapter("default")

    def check(self, policy: Any, reference: nn.Module | None) -> None:
        """Raise a ValueError where an average would stand still: in half precision a small step of it is lost."""
        if not self:
            return
        held = [theirs for _, theirs in _adapters(policy)] if reference is None else list(reference.parameters())
        types = {weight.dtype for weight in held} - {torch.float32, torch.float64}
        if self.kind == "ema" and types:
            raise ValueError(
                f"reference ema in {types.pop()}: its small steps would be lost; train weights in float32"
            )

    @torch.no_grad()
    def follow(self, policy: Any, reference: nn.Module | None, step: int) -> None:
        """After optimiser step ``step``.

        Args:
            policy: the model in training.
            reference: its copy; None where the policy has the reference's adapter.
        """
        if not self or (self.kind == "previous" and step % self.every):
            return
        share = 1 - self.decay if self.kind == "ema" else 1.0
        pairs = (
            _adapters(policy) if reference is None else zip(policy.parameters(), reference.parameters(), strict=True)
        )
        for own, theirs in pairs:
            theirs.lerp_(own.to(theirs.dtype), share)

    def save(self, reference: nn.Module | None, folder: Path) -> None:
        """With a checkpoint. An adapter is in it already."""
        if self and reference is not None:
            tensors = {name: value.detach().contiguous() for name, value in reference.named_parameters()}
            save_file(tensors, folder / FILE)

    def load(self, reference: nn.Module | None, folder: Path) -> None:
        """From a checkpoint."""
        if self and reference is not None:
            reference.load_state_dict(load_file(folder / FILE), strict=False)


def _adapters(model: PeftModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights of the adapter in training, each with the reference's."""
    weights = dict(model.named_parameters())
    for name, own in weights.items():
        parts = name.split(".")
        if "default" in parts:  # at the end of the name, too: an embedding's
            yield own, weights[".".join(ADAPTER if part == "default" else part for part in parts)]
