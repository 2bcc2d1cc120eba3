"""Which folder is served: a whole model as it is, a run's merged one, or an adapter merged once into the cache."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from filelock import FileLock

from align.errors import AlignError
from align.models.hardware import DTYPES
from align.models.load import ADAPTER_CONFIG, load_run, locate, origin_of
from align.models.packaged import cache_folder
from align.rewards.named import CONFIG_FILE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """What is served.

    Args:
        path: a folder, or a hub id.
        name: by which requests ask for it.
        trusted: whether its recipe lets it bring code of its own.
    """

    path: str
    name: str
    trusted: bool = False


def served(source: str, dtype: str) -> Served:
    """What ``align generate --model`` reads, and recipes, which mean their runs.

    Args:
        source: run folder, checkpoint, adapter folder, model folder, packaged name, hub id, or a recipe.
        dtype: to merge an adapter to.

    Raises:
        AlignError: there is no such thing, it is not trained yet, or it is a reward model.
    """
    source = _run_of(source)
    folder = Path(source).expanduser()
    name = folder.absolute().name if folder.is_dir() else source
    if any((place / CONFIG_FILE).is_file() for place in (folder, folder / "model")):
        raise AlignError(f"{source}: a reward model writes no answers; serve a language model and name it by --reward")
    origin = origin_of(source)
    if origin is None:
        return Served(locate(source), name)
    trusted = bool(dict(origin.options).get("trust_remote_code", False))
    for whole in (folder / "merged", folder / "model", folder):
        if (whole / "config.json").is_file():
            return Served(str(whole), name, trusted)
    adapter = folder if (folder / ADAPTER_CONFIG).is_file() else folder / "adapter"
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise AlignError(f"{source}: this run has no trained weights yet; finish it with the command that started it")
    return Served(str(merged(source, adapter, dtype)), name, trusted)


def _run_of(source: str) -> str:
    """The run of a recipe; anything else as it is."""
    from align.config.load import load_recipe, shipped_recipes

    is_file = source.endswith((".yaml", ".yml")) and Path(source).is_file()
    if not is_file and (Path(source).expanduser().exists() or source not in shipped_recipes()):
        return source
    output = load_recipe(source).output
    if not (Path(output) / "config.resolved.yaml").is_file():
        raise AlignError(f"{source}: its run {output} is not there; train it first: align train {source}")
    return str(output)


def merged(source: str, adapter: Path, dtype: str) -> Path:
    """A folder in the cache with the adapter's weights in those of its model, made once.

    They are merged in float32 and then rounded to ``dtype``.

    Raises:
        AlignError: it cannot be loaded or written.
    """
    digest = sha256(json.dumps([dtype, str(origin_of(source))]).encode())
    for path in sorted(adapter.iterdir()):
        if path.is_file():
            digest.update(path.name.encode() + sha256(path.read_bytes()).digest())
    target = cache_folder() / "merged" / f"{adapter.absolute().parent.name}-{digest.hexdigest()[:16]}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_dir():
                _merge(source, target, dtype)
    except OSError as error:
        raise AlignError(
            f"{target}: the merged model cannot be written ({error}); free some space, or set ALIGN_CACHE"
        ) from error
    return target


def _merge(source: str, target: Path, dtype: str) -> None:
    logger.info("merging the adapter of %s into %s (once)", source, target)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    try:
        loaded = load_run(source, dtype="float32")
        loaded.model.cpu().merge_and_unload().to(DTYPES[dtype]).save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
