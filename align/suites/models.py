"""The models of a suite and what they are compared with, loaded one after the other."""

from __future__ import annotations

import filecmp
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from align.errors import AlignError, ConfigError
from align.models.hardware import resolve_dtype
from align.models.load import LoadedModel, Origin, load_run, origin_of
from align.models.scoring import attach_scoring
from align.tracking.run_folder import checkpoint_is_complete, checkpoint_step


def steps_of(name: str) -> list[str]:
    """The checkpoints of a run and the run itself, which stands for its end; of anything else, itself.

    A last checkpoint that holds the same weights as the end is left out: compared twice, it would count twice.

    Raises:
        AlignError: a run that has none of them yet.
    """
    folder = Path(name).expanduser()
    if not (folder / "config.resolved.yaml").is_file():
        return [name]
    checkpoints = sorted(filter(checkpoint_is_complete, folder.glob("checkpoint-*")), key=checkpoint_step)
    ended = (folder / "adapter").is_dir() or (folder / "model").is_dir()
    if not checkpoints and not ended:
        raise AlignError(f"{name}: this run has neither a checkpoint nor trained weights yet; wait for the first one")
    if checkpoints and any(_same_weights(checkpoints[-1], folder / end) for end in ("adapter", "model")):
        checkpoints.pop()
    return [*map(str, checkpoints), *([name] if ended else [])]


def _same_weights(one: Path, other: Path) -> bool:
    """Whether two folders have the same weights, byte by byte."""
    names, others = (sorted(path.name for path in folder.glob("*.safetensors")) for folder in (one, other))
    return names == others != [] and filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


def reference_of(names: Sequence[str], given: str | None) -> Origin | str:
    """What models are compared with: what is given, else what all of them were trained from.

    Raises:
        ConfigError: nothing is given, and they were trained from several models, or one from none that is known.
    """
    if given is not None:
        return given
    origins = {name: origin_of(name) for name in names}
    plain = [name for name, origin in origins.items() if origin is None]
    if plain:
        what = f"is missing: {plain[0]} is neither a run nor an adapter, so what it was trained from is not known"
        raise ConfigError("align eval", [("--reference", what)])
    different = list(dict.fromkeys(origin for origin in origins.values() if origin is not None))
    if len(different) > 1:
        started = " and ".join(origin.adapter or origin.name for origin in different[:2])
        raise ConfigError("align eval", [("--reference", f"is missing: the models were trained from {started}")])
    return different[0]


def precision(names: Sequence[str], reference: Origin | str) -> tuple[str, torch.dtype]:
    """The dtype of weights and the one of products, as in training and in its evaluations.

    Where whole models are compared, their weights are in float32: bf16 would round small steps of training away.
    """
    asked = next((origin.dtype for origin in map(origin_of, names) if origin is not None), "auto")
    compute, _ = resolve_dtype(asked)
    adapters = isinstance(reference, Origin) and all(map(_is_adapter, names))
    return asked if adapters else "float32", compute


def name_of(reference: Origin | str) -> str:
    """What a reference is called in results."""
    if isinstance(reference, str):
        return reference
    return " with ".join(filter(None, (reference.name, reference.adapter)))


def load_reference(reference: Origin | str, dtype: str) -> LoadedModel:
    """The reference, its weights in ``dtype``.

    Raises:
        AlignError: it cannot be found or loaded.
    """
    return load_run(reference, dtype=dtype) if isinstance(reference, str) else reference.load(dtype=dtype)


def let_score(model: Any) -> Any:
    """Let a model give log-probs (``align.models.scoring``); the causal model itself, without a wrapper."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    attach_scoring(inner)
    return inner


def computing_in(compute: torch.dtype, model: Any) -> AbstractContextManager[Any]:
    """Products in the dtype that ``precision`` gives."""
    return torch.autocast(model.device.type, compute, enabled=compute != torch.float32)


def _is_adapter(name: str) -> bool:
    """Whether a run or a checkpoint of one ended in an adapter."""
    folder = Path(name).expanduser()
    return (folder / "adapter_config.json").is_file() or (folder / "adapter").is_dir()
