"""Log-probs of answers under models that stay as they are, on disk, for any number of runs at once.

A row is the two answers of a pair, one float32 a token. Its key is the SHA-256 of the token ids of prompt, chosen and
rejected answer; its folder is named after everything else that decides the numbers (``context``, which lies in it as
``context.json``). Rows come in shards, files that are written aside and then named, after the SHA-256 of their own
bytes: two runs cannot be in each other's way, a reader sees a whole shard or none, and nothing is ever changed. A
folder can be deleted at any time; its rows are then computed anew.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from align.errors import AlignError
from align.tracking.files import write_bytes, write_json

logger = logging.getLogger(__name__)

Ids = Sequence[int]
Answers = tuple[Tensor, Tensor]
"""Log-probs of the chosen and of the rejected answer, nats a token, float32."""


def row_key(prompt: Ids, chosen: Ids, rejected: Ids) -> bytes:
    """SHA-256 of the three lists of token ids, 32 bytes."""
    digest = hashlib.sha256()
    for ids in (prompt, chosen, rejected):
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(np.asarray(ids, dtype=np.int64).tobytes())
    return digest.digest()


class LogpShards:
    """The rows of one context.

    Args:
        root: where the folders of all contexts lie; made where it is missing.
        context: what decides the log-probs beside the token ids, as JSON values.

    Raises:
        AlignError: the folder cannot be made.
    """

    def __init__(self, root: Path, context: Mapping[str, Any]) -> None:
        written = json.dumps(context, sort_keys=True)
        self.folder = root / hashlib.sha256(written.encode()).hexdigest()[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            if not (self.folder / "context.json").exists():
                write_json(self.folder / "context.json", context)
        except OSError as error:
            raise AlignError(
                f"{self.folder}: reference log-probs cannot be kept here ({error.strerror}): name a folder that can "
                "be written (a recipe's is in ALIGN_CACHE), or do without (data.reference_cache: false)"
            ) from error

    def read(self, wanted: Mapping[bytes, tuple[int, int]]) -> dict[bytes, Answers]:
        """Those of the wanted rows that are there.

        A shard whose bytes are not those that were written, or whose numbers cannot be right, is told and removed.

        Args:
            wanted: number of tokens of both answers, by key.
        """
        found: dict[bytes, Answers] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                found |= _wanted_of(path, wanted)
            except FileNotFoundError:  # another run has found it damaged
                continue
            except (ValueError, KeyError, SafetensorError) as error:
                logger.warning("%s: %s; it is removed, and its rows are computed anew", path, error)
                path.unlink(missing_ok=True)
        return found

    def write(self, rows: Mapping[bytes, Answers]) -> None:
        """Keep rows, as one shard.

        Raises:
            AlignError: a log-prob is not finite. OSError: the disk is full.
        """
        values = torch.cat([logps.float().cpu() for answers in rows.values() for logps in answers])
        if not bool(values.isfinite().all()):
            raise AlignError(
                "the reference gives an answer a log-prob that is not finite: look at its weights and at model.dtype"
            )
        lengths = [[len(logps) for logps in answers] for answers in rows.values()]
        content = save(
            {
                "keys": torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(-1, 32),
                "lengths": torch.tensor(lengths, dtype=torch.int32),
                "logps": values,
            }
        )
        write_bytes(self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors", content)


def _wanted_of(path: Path, wanted: Mapping[bytes, tuple[int, int]]) -> dict[bytes, Answers]:
    """The wanted rows of a shard.

    Raises:
        ValueError: what is wrong with it.
    """
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != path.stem:
        raise ValueError(f"damaged: its {len(content):,} bytes are not those that were written")
    shard = load(content)
    keys, lengths, values = shard["keys"], shard["lengths"], shard["logps"]
    if int(lengths.sum()) != len(values) or len(keys) != len(lengths):
        raise ValueError(f"damaged: {len(values):,} log-probs of {int(lengths.sum()):,} tokens")
    if not bool(values.isfinite().all()):
        raise ValueError("damaged: a log-prob is not finite")
    parts = iter(torch.split(values, lengths.flatten().tolist()))
    found = {}
    for key, chosen, rejected in zip(keys.numpy(), parts, parts, strict=True):
        name = key.tobytes()
        if name not in wanted:
            continue
        if (len(chosen), len(rejected)) != wanted[name]:
            raise ValueError(f"damaged: {len(chosen)} and {len(rejected)} log-probs, of {wanted[name]} tokens")
        found[name] = (chosen, rejected)
    return found
