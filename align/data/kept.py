"""Tokens of rows, made once: kept in a file by what decides them.

The file's name is a hash of the rows' ids in their order, the names of their answers, the limit, the tokenizer's whole
state with its chat template, the versions of the libraries that read it, and the source of the rules themselves. What
is counted and what is wrong with rows is in it too: a run that reads it says what the run that made it said. A file
that does not hold what it says is told of and made anew; one that cannot be written is told of, and not needed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from . import encode, encodings, workers
from .encode import Encoder, Question
from .encodings import Encoded, Encodings
from .fields import FieldError
from .rows import Content

logger = logging.getLogger(__name__)

# Where tokenising takes about a second of one processor, and reading the file a tenth.
WORTH_KEEPING = 2**20  # characters

_LIBRARIES = ("tokenizers", "transformers", "jinja2")
_SETTINGS = (
    "chat_template",
    "special_tokens_map",
    "split_special_tokens",
    "clean_up_tokenization_spaces",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    "add_prefix_space",
)


def encoded(
    encoder: Encoder, rows: Sequence[Question], ids: Sequence[str], folder: Path | None
) -> Iterator[Encoded | FieldError]:
    """Prompt ids and answer ids of each row, or why it cannot be used; counted in ``encoder``.

    Args:
        ids: of the rows, each a hash of its prompt and answers.
        folder: where tokens are kept; None keeps none.
    """
    size = sum(_characters(content) for prompt, answers in rows for content in (prompt, *answers.values()))
    key = None if folder is None or size < WORTH_KEEPING else _key(encoder, rows, ids)
    path = None if folder is None or key is None else folder / f"{key[:32]}.safetensors"
    found = None if path is None else _read(path, str(key))
    if found is None:
        found = workers.encode(encoder, rows, workers.processes_for(size))
        if path is not None:
            _write(path, str(key), found)
    return encoder.counted(found, rows)


def _characters(content: Content) -> int:
    return len(content) if isinstance(content, str) else sum(len(message["content"]) for message in content)


# --- what decides the tokens --------------------------------------------------------------------------------------


def _key(encoder: Encoder, rows: Sequence[Question], ids: Sequence[str]) -> str | None:
    """None where the same rows may become other tokens, or nothing says that they will not."""
    state = _state(encoder.tokenizer)
    if state is None:
        logger.info("the tokens of %d rows are not kept: nothing shows all that this tokenizer depends on", len(rows))
        return None
    decided = {
        "rules": [hashlib.sha256(Path(str(part.__file__)).read_bytes()).hexdigest() for part in (encode, encodings)],
        "versions": [version(name) for name in _LIBRARIES],
        "tokenizer": state,
        "ends": [encoder.eos, encoder.adds_bos, encoder.adds_eos],
        "max_length": encoder.max_length,
        "names": sorted({tuple(answers) for _, answers in rows}),
        "rows": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()


def _state(tokenizer: Any) -> dict[str, Any] | None:
    """All that its tokens depend on; None for a class of someone's own, or one that draws."""
    if not tokenizer.is_fast or not type(tokenizer).__module__.startswith("transformers."):
        return None
    backend = tokenizer.backend_tokenizer
    if getattr(backend.model, "dropout", None):
        return None
    # Before its parts stand the limit and the padding of the last call, which are not the tokenizer's own.
    _, mark, parts = backend.to_str().partition('"added_tokens":')
    state = {name: repr(getattr(tokenizer, name, None)) for name in _SETTINGS}
    if "strftime_now" in state["chat_template"]:
        state["today"] = date.today().isoformat()
    state["class"] = type(tokenizer).__qualname__
    return {**state, "backend": hashlib.sha256((mark + parts).encode()).hexdigest()} if mark else None


# --- files --------------------------------------------------------------------------------------------------------


def _read(path: Path, key: str) -> Encodings | None:
    """What the file holds; None where there is none, or where it does not hold what it says."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            said, tokens, lengths = file.metadata(), file.get_tensor("tokens"), file.get_tensor("lengths")
        if said["key"] != key or said["sha256"] != _digest(tokens, lengths, said["rest"]):
            raise ValueError("its hash is another")
        rest = json.loads(said["rest"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s): these rows are tokenised anew", path, error)
        return None
    problems = {int(place): (what[0], what[1]) for place, what in rest["problems"].items()}
    return Encodings(tokens, lengths, problems, rest["counts"], rest["moved_tail"])


def _write(path: Path, key: str, found: Encodings) -> None:
    from safetensors.numpy import save_file

    rest = json.dumps({"problems": found.problems, "counts": found.counts, "moved_tail": found.moved_tail})
    said = {"key": key, "rest": rest, "sha256": _digest(found.tokens, found.lengths, rest)}
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"tokens": found.tokens, "lengths": found.lengths}, aside, metadata=said)
        aside.replace(path)
    except Exception as error:  # a full disk is an error of safetensors' own
        logger.warning("%s cannot be written (%s): these rows will be tokenised again", path, error)
    finally:
        with suppress(OSError):  # it has its name, or there is no such folder
            aside.unlink()


def _digest(tokens: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], rest: str) -> str:
    digest = hashlib.sha256(rest.encode())
    for part in (tokens, lengths):
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()
