"""Which weights these are, as a hash that two people can compare."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch


def weights_hash(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names.

    Args:
        tensors: ``(name, tensor)``, such as ``model.state_dict().items()``.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
