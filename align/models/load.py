"""Models by name: a packaged one, a local folder, a hub id, or what a run left behind."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from align.errors import AlignError

from .hardware import resolve_dtype
from .packaged import packaged_model

ADAPTER_CONFIG = "adapter_config.json"
LOAD_ERRORS = (OSError, ValueError, ImportError, SafetensorError)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate or to score."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    dtype_reason: str


def locate(name: str) -> str:
    """Where the weights of ``name`` are: the cache for a packaged model, else the folder or hub id itself.

    Raises:
        AlignError: a folder without a model in it.
    """
    packaged = packaged_model(name)
    if packaged is not None:
        return str(packaged)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise AlignError(
                f"{name}: no config.json in this folder, so it holds no model; name the folder that has one"
            )
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise AlignError(f"{name}: there is no such folder (and hub ids look like owner/name)")
    return name


def _not_loaded(name: str, path: str, error: Exception) -> AlignError:
    """What failed, and what to do. ``path``: where ``locate`` found ``name``."""
    cause = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if "trust_remote_code" in str(error):
        what = "it brings code of its own; set model.trust_remote_code: true if you trust its code"
    elif isinstance(error, ImportError):
        what = f"it needs a package that is missing ({cause}). Install it, or for attention set model.attention: sdpa"
    elif isinstance(error, SafetensorError):
        what = f"its weights are damaged ({cause}). Copy or download them again"
    elif Path(path).is_dir():
        what = f"this folder cannot be loaded ({cause}). Mend its files, or copy the model again"
    elif isinstance(error, OSError):
        what = (
            f"neither a packaged model, nor a local folder, nor to be had from the hub ({cause}). Check the spelling, "
            "the network and, for a gated model, your token; or give a local folder"
        )
    else:
        what = f"this model cannot be loaded ({cause}). Choose another one, or a release of transformers that reads it"
    return AlignError(f"{name}: {what}")


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a padding token.

    Raises:
        AlignError: there is none, or it has no EOS token.
    """
    return _tokenizer_in(locate(name), name, trust_remote_code)


def _tokenizer_in(path: str, name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise _not_loaded(name, path, error) from error
    if tokenizer.eos_token_id is None:
        raise AlignError(f"{name}: its tokenizer has no EOS token, so an answer could not end; set one and save it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str, *, dtype: str = "auto", attention: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, str]:
    """A causal model in evaluation mode, and why it has the dtype that it has.

    Args:
        name: packaged name, folder or hub id.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        attention: ``auto`` (the architecture's default), ``sdpa``, ``eager``, ``flash_attention_2`` or
            ``flex_attention``.

    Raises:
        AlignError: the model cannot be found or loaded, or is not a causal language model.
    """
    path = locate(name)
    torch_dtype, reason = resolve_dtype(dtype)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = load_config(name, **options)
    _require_causal(name, config)
    try:
        if attention != "auto":
            options["attn_implementation"] = attention
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch_dtype, **options)
    except LOAD_ERRORS as error:
        raise _not_loaded(name, path, error) from error
    return model.eval(), reason


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model, without its weights.

    Raises:
        AlignError: it cannot be found or read.
    """
    path = locate(name)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise _not_loaded(name, path, error) from error


def _require_causal(name: str, config: Any) -> None:
    architectures = getattr(config, "architectures", None) or []
    remote = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if remote or any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures):
        return
    if not architectures and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    what = ", ".join(architectures) or config.model_type
    raise AlignError(f"{name}: {what} is not a causal language model; alignment needs one that writes token by token")


def load_policy(
    name: str, adapter: str | None = None, *, dtype: str, attention: str, trust_remote_code: bool
) -> tuple[Any, str]:
    """``load_model``, with an adapter on it where one is named.

    Raises:
        AlignError: the model or the adapter cannot be loaded.
    """
    options: dict[str, Any] = {"dtype": dtype, "attention": attention, "trust_remote_code": trust_remote_code}
    if adapter is None:
        return load_model(name, **options)
    loaded = _with_adapter(name, Path(adapter).expanduser(), **options)
    return loaded.model, loaded.dtype_reason


def load_run(name: str, *, dtype: str = "auto") -> LoadedModel:
    """What ``name`` says can answer: a run folder, a checkpoint of one, an adapter folder, or any model.

    A run is loaded by its adapter on the model that it was trained from, or by its own weights after full training;
    in both cases with its recipe's ``model.attention`` and ``model.trust_remote_code``.

    Raises:
        AlignError: the run has not finished, or the weights are missing or cannot be loaded.
    """
    folder = Path(name).expanduser()
    spec = _spec_of_run(folder)
    if spec is not None:
        options = _options_of(spec)
        adapter, model = (folder, folder) if _is_checkpoint(folder) else (folder / "adapter", folder / "model")
        if (adapter / ADAPTER_CONFIG).is_file():
            return _with_adapter(spec["name"], adapter, dtype=dtype, **options)
        if model.is_dir():
            return _whole(str(model), dtype=dtype, **options)
        raise AlignError(f"{name}: this run has no trained weights yet; finish it with the command that started it")
    if (folder / ADAPTER_CONFIG).is_file():
        return _with_adapter(_base_of(folder), folder, dtype=dtype)
    return _whole(name, dtype=dtype)


@dataclass(frozen=True)
class Origin:
    """What a run or an adapter was trained from.

    Attributes:
        name: the model, as its recipe names it.
        adapter: the adapter that training went on from, if there was one.
        options: ``attention`` and ``trust_remote_code`` of the recipe.
        dtype: of the recipe. The same model with other options or in another dtype is the same origin.
    """

    name: str
    adapter: str | None = None
    options: tuple[tuple[str, Any], ...] = field(default=(), compare=False)
    dtype: str = field(default="auto", compare=False)

    def load(self, *, dtype: str) -> LoadedModel:
        """The model as it was before training, its weights in ``dtype``.

        Raises:
            AlignError: it cannot be found or loaded.
        """
        if self.adapter is None:
            return _whole(self.name, dtype=dtype, **dict(self.options))
        return _with_adapter(self.name, Path(self.adapter).expanduser(), dtype=dtype, **dict(self.options))


def origin_of(name: str) -> Origin | None:
    """What a run, a checkpoint of one or an adapter was trained from; None for any other model."""
    folder = Path(name).expanduser()
    spec = _spec_of_run(folder)
    if spec is not None:
        return Origin(spec["name"], spec.get("adapter"), tuple(_options_of(spec).items()), spec.get("dtype", "auto"))
    return Origin(_base_of(folder)) if (folder / ADAPTER_CONFIG).is_file() else None


def _spec_of_run(folder: Path) -> dict[str, Any] | None:
    """Section ``model`` of the recipe of a run, or of the run that a checkpoint is of; None for any other folder."""
    resolved = (folder.absolute().parent if _is_checkpoint(folder) else folder) / "config.resolved.yaml"
    return dict(yaml.safe_load(resolved.read_text())["model"]) if resolved.is_file() else None


def _is_checkpoint(folder: Path) -> bool:
    return folder.absolute().name.startswith("checkpoint-")


def _options_of(spec: dict[str, Any]) -> dict[str, Any]:
    return {key: spec[key] for key in ("attention", "trust_remote_code") if key in spec}


def _base_of(adapter: Path) -> str:
    return str(json.loads((adapter / ADAPTER_CONFIG).read_text())["base_model_name_or_path"])


def _whole(name: str, *, trust_remote_code: bool = False, **options: str) -> LoadedModel:
    model, reason = load_model(name, trust_remote_code=trust_remote_code, **options)
    return LoadedModel(_placed(model), load_tokenizer(name, trust_remote_code=trust_remote_code), reason)


def _with_adapter(base: str, adapter: Path, *, trust_remote_code: bool = False, **options: str) -> LoadedModel:
    from peft import PeftModel

    model, reason = load_model(base, trust_remote_code=trust_remote_code, **options)
    if (adapter / "tokenizer_config.json").is_file():
        tokenizer = _tokenizer_in(str(adapter), str(adapter), trust_remote_code)
    else:
        tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter))
    except LOAD_ERRORS as error:
        raise _not_loaded(str(adapter), str(adapter), error) from error
    return LoadedModel(_placed(adapted.eval()), tokenizer, reason)


def _placed(model: Any) -> Any:
    return model.to("cuda") if torch.cuda.is_available() else model
