"""Model extrapolation: on from the initial weights through the aligned ones (ExPO, arXiv:2404.16792).

    theta = theta_init + alpha (theta_aligned - theta_init)

Float32, element by element, on every parameter of floating point; tied weights once. Buffers (norm statistics, masks,
frequencies) and whole numbers are those of the aligned model, as are its configuration and tokenizer. ``alpha`` 0 and
1 give the two models back exactly.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import cached_file

from align.errors import AlignError, ConfigError
from align.rewards.models import CONFIG_FILE, RewardModel

from .fingerprint import weights_hash
from .load import LOAD_ERRORS, load_run, load_tokenizer, locate

logger = logging.getLogger(__name__)

RECORD = "expo.json"


@dataclass(frozen=True)
class Extrapolated:
    """What was written.

    Attributes:
        tensors, parameters: how many were extrapolated; tied ones count once.
        distance: mean of |aligned - init| over the parameters.
    """

    tensors: int
    parameters: int
    distance: float


def extrapolate(init: str, aligned: str, *, alpha: float, output: Path) -> Extrapolated:
    """Write the extrapolated model to a folder, with ``expo.json``, which says what it is made of.

    Args:
        init, aligned: runs, folders, packaged names or hub ids; two causal models or two reward models. Adapters are
            merged in float32. A regression and the scaled Bradley-Terry model that began from it are reward models of
            one kind here: the regression by what ranks its answers.
        alpha: 0 or more; over 2 is warned of.
        output: a folder that does not exist or is empty.

    Raises:
        ConfigError: alpha is negative or not finite.
        AlignError: a model cannot be loaded, or is quantised; the two do not fit each other or are equal; or the
            output holds something.
    """
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ConfigError("align models expo", [("--alpha", f"{alpha}: 0 or more; 0 is INIT and 1 is ALIGNED")])
    if alpha > 2:
        logger.warning("alpha is %g: over 2, models usually break; 1.1 to 1.6 are usual.", alpha)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise AlignError(f"{output}: is there already; name a new folder")
    folders = [_reward_folder(name) for name in (init, aligned)]
    if (folders[0] is None) != (folders[1] is None):
        which, other = (init, aligned) if folders[0] is not None else (aligned, init)
        raise AlignError(f"{which} is a reward model and {other} is not: extrapolate between models of one kind")
    if folders[0] is not None and folders[1] is not None:
        return _rewards(folders[0], folders[1], alpha, output)
    return _causal(init, aligned, alpha, output)


def _causal(init: str, aligned: str, alpha: float, output: Path) -> Extrapolated:
    start, end = _causal_model(init), _causal_model(aligned)
    record = _record(init, start, aligned, end, alpha)
    made = _move(start, end, alpha, (init, aligned))
    tokenizer = _tokenizer(aligned)
    output.mkdir(parents=True, exist_ok=True)
    end.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / RECORD).write_text(json.dumps({**record, **asdict(made)}, indent=2) + "\n", encoding="utf-8")
    return made


def _causal_model(name: str) -> Any:
    """The model in the dtype that its weights are stored in; with an adapter, merged in float32."""
    folder = Path(name).expanduser()
    if (folder / "adapter_config.json").is_file() or (folder / "adapter").is_dir():
        return load_run(name, dtype="float32").model.cpu().merge_and_unload()
    path = str(folder / "model") if (folder / "config.resolved.yaml").is_file() else locate(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    except LOAD_ERRORS as error:
        raise AlignError(f"{name}: cannot be loaded ({str(error).partition(chr(10))[0]})") from error
    _refuse_quantised(name, model)
    return model.eval()


def _tokenizer(name: str) -> Any:
    folder = Path(name).expanduser()
    for place in (folder / "adapter", folder / "model", folder):
        if (place / "tokenizer_config.json").is_file():
            return load_tokenizer(str(place)) if (place / "config.json").is_file() else _bare_tokenizer(place)
    if (folder / "adapter_config.json").is_file():
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return load_tokenizer(settings["base_model_name_or_path"])
    return load_tokenizer(name)


def _bare_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def _reward_folder(name: str) -> str | None:
    """Where the reward model is; None where it is none."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return next((str(place) for place in (folder, folder / "model") if (place / CONFIG_FILE).is_file()), None)
    if folder.exists() or name.startswith((".", "/", "~")) or "/" not in name:
        return None
    return name if cached_file(name, CONFIG_FILE, _raise_exceptions_for_missing_entries=False) else None


def _rewards(init: str, aligned: str, alpha: float, output: Path) -> Extrapolated:
    start, end = _reward_model(init), _reward_model(aligned)
    if start.config.kind == "attributes" and end.config.kind == "scalar":
        start.make_scalar()
    about = {"kind", "width", "attributes", "ranking", "unit_norm", "gate", "tau"}
    differ = [key for key in sorted(about) if getattr(start.config, key) != getattr(end.config, key)]
    if differ:
        values = ", ".join(f"{key} {getattr(start.config, key)} and {getattr(end.config, key)}" for key in differ)
        raise AlignError(f"{init} and {aligned}: reward models that differ in {values}")
    record = _record(init, start, aligned, end, alpha)
    made = _move(start, end, alpha, (init, aligned))
    end.config = replace(end.config, training="full")
    end.save_pretrained(output)
    (output / RECORD).write_text(json.dumps({**record, **asdict(made)}, indent=2) + "\n", encoding="utf-8")
    return made


def _reward_model(folder: str) -> RewardModel:
    try:
        model = RewardModel.from_pretrained(folder, dtype="auto")
        if model.config.training == "lora":
            model = RewardModel.from_pretrained(folder, dtype=torch.float32)
            with tempfile.TemporaryDirectory() as merged:
                model.save_pretrained(merged, merge=True)
                model = RewardModel.from_pretrained(merged, dtype=torch.float32)
    except LOAD_ERRORS as error:
        raise AlignError(f"{folder}: cannot be loaded ({str(error).partition(chr(10))[0]})") from error
    _refuse_quantised(folder, model.carrier)
    return model


def _refuse_quantised(name: str, model: Any) -> None:
    if getattr(model.config, "quantization_config", None) is not None:
        raise AlignError(f"{name}: is quantised; extrapolate between whole weights, and quantise what comes of it")


def _record(init: str, start: nn.Module, aligned: str, end: nn.Module, alpha: float) -> dict[str, Any]:
    return {
        "formula": "init + alpha (aligned - init)",
        "alpha": alpha,
        "init": {"name": init, "weights": weights_hash(start.state_dict().items())},
        "aligned": {"name": aligned, "weights": weights_hash(end.state_dict().items())},
    }


def _move(start: nn.Module, end: nn.Module, alpha: float, names: tuple[str, str]) -> Extrapolated:
    """Put the extrapolated parameters into ``end``.

    Raises:
        AlignError: other parameters or shapes, weights that are not finite, or no difference at all.
    """
    before, after = dict(start.named_parameters()), dict(end.named_parameters())
    _check_match(before, after, names)
    moved = {name: value for name, value in after.items() if value.is_floating_point()}
    distance = sum(
        float((value - before[name]).detach().abs().sum(dtype=torch.float64)) for name, value in moved.items()
    )
    parameters = sum(value.numel() for value in moved.values())
    if distance == 0:
        raise AlignError(f"{names[0]} and {names[1]}: equal weights, so there is no direction to go on in")
    with torch.no_grad():
        for name, value in moved.items():
            value.copy_(moved_tensor(before[name], value, alpha))
            if not bool(torch.isfinite(value).all()):
                raise AlignError(f"{name}: not finite at alpha {alpha} in {value.dtype}; is it in both models?")
    return Extrapolated(len(moved), parameters, distance / parameters)


def moved_tensor(init: Tensor, aligned: Tensor, alpha: float) -> Tensor:
    """``init + alpha (aligned - init)`` in float32 (float64 stays), exact at alpha 0 and 1."""
    wide = torch.promote_types(torch.promote_types(init.dtype, aligned.dtype), torch.float32)
    return torch.lerp(init.to(wide), aligned.to(wide), alpha)


def _check_match(before: Mapping[str, Tensor], after: Mapping[str, Tensor], names: tuple[str, str]) -> None:
    init, aligned = names
    alone = [(init, sorted(before.keys() - after.keys())), (aligned, sorted(after.keys() - before.keys()))]
    for name, keys in alone:
        if keys:
            raise AlignError(
                f"{init} and {aligned}: {len(keys)} weights stand in {name} alone, such as {keys[0]}: models of one "
                "architecture, with embeddings tied in both or in neither, are wanted"
            )
    for key, value in after.items():
        if value.shape != before[key].shape:
            shapes = f"{list(before[key].shape)} and {list(value.shape)}"
            raise AlignError(
                f"{init} and {aligned}: {key} has shapes {shapes}: was the vocabulary resized between the two?"
            )
