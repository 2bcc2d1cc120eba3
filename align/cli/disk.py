"""A full disk, however a library says it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

FULL = {errno.ENOSPC, errno.EDQUOT}
# safetensors and torch raise errors of their own, without a number.
SAID = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing")


def disk_is_full(error: BaseException) -> str | None:
    """What to tell the user if a full disk is behind ``error``, else None."""
    for cause in _causes(error):
        by_number = isinstance(cause, OSError) and cause.errno in FULL
        if by_number or any(words in str(cause) for words in SAID):
            named = cause.filename if isinstance(cause, OSError) else None
            return _message(Path(str(named)) if named else Path.cwd(), known=named is not None)
    return None


def _message(path: Path, known: bool) -> str:
    folder = next(p for p in [path, *path.absolute().parents] if p.is_dir())
    free = shutil.disk_usage(folder).free / 1e9
    where = str(path) if known else f"writing from {folder}"
    return (
        f"disk full: {where} ({free:.2f} GB free there)\n"
        "  free some space, or choose another output or ALIGN_CACHE; then the same command goes on from the last "
        "complete checkpoint\n"
        "  training.save_total_limit=1 keeps one checkpoint, training.save_strategy=no none"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
