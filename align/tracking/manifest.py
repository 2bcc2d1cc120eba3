"""What tells one run from another later: versions, commit, machine, command."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .telemetry import telemetry_flags

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "wandb",
)
SECRET_NAME = re.compile(r"(token|secret|password|passwd|api[_-]?key|credential)s?$", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|[0-9a-f]{40})\b")
LOGIN_IN_URL = re.compile(r"(://)[^/@\s]+@")


def run_facts(argv: Sequence[str], seed: int) -> dict[str, Any]:
    """The sections of the manifest that the recipe and the data do not decide.

    Args:
        argv: the command as typed; secrets in it are replaced by ``***``.
        seed: the run's seed.
    """
    return {
        "align": installed_version("align-lm"),
        "command": without_secrets(argv),
        "versions": versions(),
        "git": git_state(Path.cwd()),
        "hardware": hardware(),
        "seed": seed,
        "telemetry": telemetry_flags(),
    }


def versions() -> dict[str, str]:
    """Python and the packages that decide the numbers; a package that is not installed is left out."""
    found = {name: installed_version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **{name: v for name, v in found.items() if v is not None}}


def installed_version(package: str) -> str | None:
    """The package's version, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and cleanness of the repository around ``folder``; None outside a repository or without git.

    Untracked files do not count as changes: they are mostly the runs themselves.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def hardware() -> dict[str, Any]:
    """Processor, cores that this process may use, memory (GB, 10^9 bytes), graphics cards."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def without_secrets(argv: Sequence[str]) -> list[str]:
    """The command with tokens, keys and logins in addresses replaced by ``***``."""
    clean = []
    hide_next = False
    for word in argv:
        name, equals, value = word.partition("=")
        if hide_next:
            clean.append("***")
        elif equals and value and SECRET_NAME.search(name):
            clean.append(f"{name}=***")
        else:
            clean.append(LOGIN_IN_URL.sub(r"\1***@", SECRET_VALUE.sub("***", word)))
        hide_next = not hide_next and not equals and word.startswith("-") and bool(SECRET_NAME.search(word))
    return clean
