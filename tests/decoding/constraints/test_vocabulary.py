"""The bytes of tokens, of every kind of tokenizer, against what the tokenizers decode."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from align.decoding.constraints import ConstraintError, Vocabulary

TEXT = "Hé, the inn!\n\t日本 🙂  {}"


def test_byte_level_tokens_say_the_text(tiny_tokenizer: PreTrainedTokenizerFast, tiny: Vocabulary) -> None:
    assert tiny.bytes(tiny_tokenizer.encode(TEXT)) == TEXT.encode()
    assert tiny.ends == {tiny_tokenizer.eos_token_id}
    assert all(tiny.tokens[index] is None for index in tiny_tokenizer.all_special_ids)
    assert sorted(tiny.tokens[index] for index in tiny.usable[:256]) == [bytes([byte]) for byte in range(256)]


def test_packaged_tokens_say_the_text(chat_tokenizer: PreTrainedTokenizerFast, chat: Vocabulary) -> None:
    ids = chat_tokenizer.encode(TEXT)
    assert chat.bytes(ids) == TEXT.encode()
    assert chat.text(ids) == chat_tokenizer.decode(ids)
    assert chat.size == len(chat_tokenizer)


def sentencepiece() -> PreTrainedTokenizerFast:
    """Four pieces and the bytes, as Llama 2 has them."""
    pieces = ["<unk>", "</s>", "▁", "▁the", "é", "x", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE({piece: rank for rank, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def test_sentencepiece_tokens_are_spaces_and_bytes() -> None:
    tokenizer = sentencepiece()
    vocabulary = Vocabulary.of(tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["x", "▁the", "é", "<0xE6>", "<0x97>", "<0xA5>", "▁"])
    assert vocabulary.bytes(ids) == "x theé日 ".encode()
    assert vocabulary.tokens[0] is None


def test_words_are_taken_as_written() -> None:
    backend = Tokenizer(models.WordLevel({"yes": 0, "no": 1, "</s>": 2}, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    vocabulary = Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    assert vocabulary.tokens == (b"yes", b"no", None)


def test_columns_beyond_the_tokens_and_ends_by_name(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A model's logits may be wider than its tokenizer; a chat model may end in more than one way."""
    ends = {tiny_tokenizer.eos_token_id, tiny_tokenizer.pad_token_id}
    vocabulary = Vocabulary.of(tiny_tokenizer, size=300, ends=ends)
    assert vocabulary.size == 300
    assert vocabulary.tokens[299] is None
    assert vocabulary.ends == ends


def test_what_is_wrong_with_a_vocabulary(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConstraintError, match="no end token"):
        Vocabulary([b"a"], frozenset())
    with pytest.raises(ConstraintError, match="end token 7 is not among its 1 tokens"):
        Vocabulary([b"a"], frozenset({7}))
    with pytest.raises(ConstraintError, match="end token 0 also has bytes, b'a'"):
        Vocabulary([b"a"], frozenset({0}))
    with pytest.raises(ConstraintError, match="object has no backend_tokenizer"):
        Vocabulary.of(object())
    backend = Tokenizer(models.WordPiece({"a": 0, "##b": 1, "[S]": 2}, unk_token="[S]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ConstraintError, match="decoder of type WordPiece"):
        Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[S]"))
