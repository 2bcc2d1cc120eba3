"""Vocabularies for constraints: every byte and a few longer tokens; the tiny tokenizer's; the packaged model's."""

from __future__ import annotations

import gguf
import pytest
from transformers import PreTrainedTokenizerFast

from align.decoding.constraints import Vocabulary
from align.models import packaged

LONGER = [b"the", b" the", b"in", b"he", b"er", b'{"', b'":', b"12", b"\xc3\xa9", b"\xa9\n", b"\xe6\x97", b"in"]


@pytest.fixture(scope="session")
def letters() -> Vocabulary:
    """256 bytes (each its own id), longer tokens (one twice, some ending inside a character), a special and an end."""
    return Vocabulary([*(bytes([byte]) for byte in range(256)), *LONGER, None, None], frozenset({257 + len(LONGER)}))


@pytest.fixture(scope="session")
def tiny(tiny_tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    return Vocabulary.of(tiny_tokenizer)


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The packaged model's tokenizer, without its weights."""
    reader = gguf.GGUFReader(packaged._packaged_file())
    return packaged._tokenizer({key: field.contents() for key, field in reader.fields.items()})


@pytest.fixture(scope="session")
def chat(chat_tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    return Vocabulary.of(chat_tokenizer)
