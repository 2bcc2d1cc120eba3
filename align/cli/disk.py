"""A full disk, however a library says it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from align.errors import AlignError

FULL = {errno.ENOSPC, errno.EDQUOT}
# safetensors and torch (the last two) raise errors of their own, without a number.
SAID = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing", "unexpected pos")


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Around what writes to ``path``: the errors of most libraries do not say where there was no space.

    Raises:
        AlignError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if is_full(error):
            raise AlignError(full_message(error, path)) from error
        raise


def is_full(error: BaseException) -> bool:
    """Whether a full disk is behind an error."""
    return any(
        (isinstance(cause, OSError) and cause.errno in FULL) or any(words in str(cause) for words in SAID)
        for cause in _causes(error)
    )


def full_message(error: BaseException, path: Path) -> str:
    """What to do about it. ``path``: where, unless the error itself names a file."""
    named = (cause.filename for cause in _causes(error) if isinstance(cause, OSError) and cause.filename)
    target = Path(str(next(named, path)))
    folder = next(p for p in [target, *target.absolute().parents] if p.is_dir())
    free = shutil.disk_usage(folder).free / 1e9
    return (
        f"{target}: the disk is full ({free:.2f} GB free)\n"
        "  free some space and give the same command again: a run goes on from its last complete checkpoint\n"
        "  or choose another output (models are unpacked in ALIGN_CACHE); training.save_total_limit=1 keeps one "
        "checkpoint"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
