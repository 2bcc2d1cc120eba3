"""Models by name: a packaged one, a local folder, a hub id, or what a run left behind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from align.errors import AlignError

from .hardware import resolve_dtype
from .packaged import packaged_model


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


def _unreachable(name: str, error: Exception) -> AlignError:
    return AlignError(
        f"{name}: neither a packaged model, nor a local folder, nor to be had from the hub "
        f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the spelling, the network and, for a gated "
        "model, your token; or give a local folder"
    )


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a padding token.

    Raises:
        AlignError: there is none, or it has no EOS token.
    """
    return _tokenizer_in(locate(name), name, trust_remote_code)


def _tokenizer_in(path: str, name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _unreachable(name, error) from error
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
        attention: ``auto`` (the architecture's default), ``sdpa``, ``eager`` or ``flash_attention_2``.

    Raises:
        AlignError: the model cannot be found, or is not a causal language model.
    """
    path = locate(name)
    torch_dtype, reason = resolve_dtype(dtype)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(path, **options)
        _require_causal(name, config)
        if attention != "auto":
            options["attn_implementation"] = attention
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch_dtype, **options)
    except (OSError, ValueError) as error:
        raise _unreachable(name, error) from error
    return model.eval(), reason


def _require_causal(name: str, config: Any) -> None:
    architectures = getattr(config, "architectures", None) or []
    remote = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if remote or any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures):
        return
    if not architectures and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    what = ", ".join(architectures) or config.model_type
    raise AlignError(f"{name}: {what} is not a causal language model; alignment needs one that writes token by token")


def load_run(name: str, *, dtype: str = "auto") -> LoadedModel:
    """What ``name`` says can answer: a run folder, an adapter folder, or any model.

    A run is loaded by its adapter on the model that it was trained from, or by its own weights after full training.

    Raises:
        AlignError: the run has not finished, or the weights are missing.
    """
    folder = Path(name).expanduser()
    resolved = folder / "config.resolved.yaml"
    if resolved.is_file():
        base = yaml.safe_load(resolved.read_text())["model"]["name"]
        if (folder / "adapter").is_dir():
            return _with_adapter(base, folder / "adapter", dtype)
        if (folder / "model").is_dir():
            return load_run(str(folder / "model"), dtype=dtype)
        raise AlignError(f"{name}: this run has no trained weights yet; finish it with the command that started it")
    if (folder / "adapter_config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        return _with_adapter(base, folder, dtype)
    model, reason = load_model(name, dtype=dtype)
    return LoadedModel(_placed(model), load_tokenizer(name), reason)


def _with_adapter(base: str, adapter: Path, dtype: str) -> LoadedModel:
    from peft import PeftModel

    model, reason = load_model(base, dtype=dtype)
    own = (adapter / "tokenizer_config.json").is_file()
    tokenizer = _tokenizer_in(str(adapter), str(adapter)) if own else load_tokenizer(base)
    return LoadedModel(_placed(PeftModel.from_pretrained(model, str(adapter)).eval()), tokenizer, reason)


def _placed(model: Any) -> Any:
    return model.to("cuda") if torch.cuda.is_available() else model
