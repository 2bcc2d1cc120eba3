"""Files and folders that a recipe names: what is missing is said before anything is loaded."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from align.data.load import SUFFIXES

from .explain import Problem


def check_paths(recipe: Mapping[str, Any]) -> list[Problem]:
    """Problems of ``data.train``, ``data.eval``, ``model.name``, ``model.adapter`` and ``output``."""
    problems = []
    for section, key, check in (
        ("data", "train", data_problem),
        ("data", "eval", data_problem),
        ("model", "name", model_problem),
        ("model", "adapter", _adapter),
    ):
        value = _get(recipe, section, key)
        if value and (what := check(value)):
            problems.append((f"{section}.{key}", what))
    output = recipe.get("output")
    if isinstance(output, str) and Path(output).is_file():
        problems.append(("output", f"'{output}' is a file; name a folder"))
    return problems


def _get(recipe: Mapping[str, Any], section: str, key: str) -> str | None:
    found = recipe.get(section)
    value = found.get(key) if isinstance(found, Mapping) else None
    return value if isinstance(value, str) else None


def data_problem(source: str) -> str | None:
    """Why a source leads to no data; None for a file, a folder, packaged data, and what may be a hub id."""
    if source.startswith("align:"):
        return _packaged_data(source)
    path = Path(source)
    if path.exists() or (not source.endswith(SUFFIXES) and _is_hub_id(source) and not _near(path)):
        return None
    return f"no such file or folder: '{source}'{_near(path)}"


def _packaged_data(source: str) -> str | None:
    folder = resources.files("align.recipes").joinpath("data")
    names = sorted(f.name.removesuffix(".jsonl") for f in folder.iterdir() if f.name.endswith(".jsonl"))
    known = ["align:" + "/".join(name.rsplit("_", 1)) for name in names]
    if source in known:
        return None
    near = difflib.get_close_matches(source, known, n=1)
    return f"no data set '{source}'; " + (
        f"did you mean {near[0]}?" if near else f"there are: {', '.join(known) or 'none'}"
    )


def model_problem(name: str) -> str | None:
    """Why a name leads to no model; None for a folder, a packaged name, and what may be a hub id."""
    path = Path(name).expanduser()
    if path.is_file():
        return f"'{name}' is a file; name the model's folder"
    if path.exists() or (_is_hub_id(name) and not _near(path)) or re.fullmatch(r"[\w.-]+", name):
        return None
    return f"no such folder: '{name}'{_near(path)}"


def _adapter(name: str) -> str | None:
    path = Path(name).expanduser()
    if not path.is_dir():
        return f"no such folder: '{name}'{_near(path)}"
    if not (path / "adapter_config.json").is_file():
        return f"'{name}' holds no adapter_config.json: not an adapter"
    return None


def _is_hub_id(name: str) -> bool:
    """``owner/name``, for data also ``owner/name:split``."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?", name))


def _near(path: Path) -> str:
    """A neighbour with a similar name."""
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
