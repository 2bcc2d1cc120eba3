"""A template's text cut at its last separator, tokenised once up to there: the tokens of the whole, or no cut."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from align.data import encode
from align.data.encode import Encoder

PIECES = ["▁", "a", "b", "c", "▁a", "▁ab", "ab", "<", ">", "|", "\n", "##a", "##b", "##c", "[UNK]"]
WORDS = ["", " ", "a", " ab", "c  ", "<|s|>", " <|s|> a", "a<|e|>b", "\n", "<|", "|s|>", "ab\ncab", "A  B", "x<|s|"]


def backend(kind: str) -> Tokenizer:
    if kind == "bytes":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = [*alphabet, "Ġa", "ab", "Ċa"]
        merges = [("Ġ", "a"), ("a", "b"), ("Ċ", "a")]
        made = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=merges))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        made.decoder = decoders.ByteLevel()
    elif kind == "words":
        vocabulary = {token: place for place, token in enumerate(PIECES)}
        made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        made.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()])
        made.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        made = Tokenizer(models.Unigram([(piece, -float(len(piece) == 1)) for piece in PIECES], unk_id=14))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    return made


def tokenizer(kind: str, *more: AddedToken, **separator: bool) -> PreTrainedTokenizerFast:
    made = backend(kind)
    made.add_special_tokens([AddedToken("<|s|>", normalized=False, **separator), AddedToken("<|e|>")])
    made.add_tokens(list(more))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|e|>")
    wrapped.chat_template = (
        "{% for m in messages %}<|s|>{{ m['role'] }}\n{{ m['content'] }}<|e|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|s|>assistant\n{% endif %}"
    )
    return wrapped


ROWS = [
    (
        [{"role": "user", "content": prompt}],
        {name: [{"role": "assistant", "content": answer + end}] for name, end in (("chosen", ""), ("rejected", "c"))},
    )
    for prompt in WORDS
    for answer in WORDS
]


def encoded(tokenizer: PreTrainedTokenizerFast) -> tuple[list, dict[str, int], int]:
    """What the rows become, what is counted, and how many characters were tokenised."""
    counts = dict.fromkeys(("boundary_moved", "eos_inside", "truncated_chosen", "truncated_rejected"), 0)
    encoder = Encoder(tokenizer, 40, counts)
    seen = 0

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(tokenizer, name)

        def __call__(self, texts: list[str], **options: object) -> object:
            nonlocal seen
            seen += sum(map(len, texts))
            return tokenizer(texts, **options)

    encoder.tokenizer = Counting()
    rows = [str(row) if isinstance(row, Exception) else row for row in encoder.rows(ROWS)]
    return rows, counts, seen


@pytest.fixture
def without_cuts(monkeypatch: pytest.MonkeyPatch):
    def run(tokenizer: PreTrainedTokenizerFast):
        with monkeypatch.context() as patch:
            patch.setattr(encode, "separator", lambda *_: "")
            return encoded(tokenizer)

    return run


@pytest.mark.parametrize("kind", ["bytes", "words", "first", "always", "never"])
def test_parts_give_the_tokens_of_the_whole(kind, without_cuts, monkeypatch):
    """196 rows, among them contents that hold the separator, half of it, or nothing but blanks."""
    made = tokenizer(kind)
    assert encode.separator(made, "a<|s|>assistant\n") == "<|s|>"
    # What counts the characters is no tokenizer of the library: the rule for it is asked with the real one.
    real = encode.separator
    monkeypatch.setattr(encode, "separator", lambda _, text: real(made, text))
    rows, counts, characters = encoded(made)
    assert (rows, counts) == without_cuts(made)[:2]
    assert characters < 0.7 * without_cuts(made)[2]


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        pytest.param(tokenizer("bytes", lstrip=True), "<|e|>", id="takes blanks from its left"),
        pytest.param(tokenizer("bytes", AddedToken("a<|s|>", normalized=False)), "<|e|>", id="end of another"),
        pytest.param(tokenizer("bytes", AddedToken("b<|s", normalized=False)), "<|e|>", id="another reaches into it"),
        pytest.param(tokenizer("bytes", AddedToken("b<|", normalized=False)), "", id="another reaches into both"),
        pytest.param(tokenizer("bytes", AddedToken("whole", single_word=True)), "", id="another looks around itself"),
    ],
)
def test_no_cut_where_what_is_before_it_counts(made, expected):
    """Then the other special token of the text is the separator, or none is."""
    assert encode.separator(made, "<|s|>user\na<|e|>\n<|s|>assistant\n") == expected


def test_no_cut_for_tokenizers_of_other_kinds():
    """A class of someone's own may do anything with its text; one that keeps special tokens as text has none."""

    class Own(PreTrainedTokenizerFast):
        pass

    text = "a<|s|>"
    assert encode.separator(Own(tokenizer_object=backend("bytes"), eos_token="<|s|>"), text) == ""
    made = tokenizer("bytes")
    made.split_special_tokens = True
    assert encode.separator(made, text) == ""


def test_a_text_that_stands_in_many_rows_is_tokenised_once(tiny_tokenizer):
    """Four pairs of one prompt: it is read once, and as the beginning of each answer."""
    seen: list[str] = []

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(tiny_tokenizer, name)

        def __call__(self, texts: list[str], **options: object) -> object:
            seen.extend(texts)
            return tiny_tokenizer(texts, **options)

    encoder = Encoder(tiny_tokenizer, None, dict.fromkeys(("boundary_moved", "eos_inside"), 0))
    encoder.tokenizer = Counting()
    rows = list(encoder.rows([("the cat", {"chosen": f" {n}", "rejected": " no"}) for n in range(4)]))
    assert seen == ["the cat", "the cat 0", "the cat no", "the cat 1", "the cat 2", "the cat 3"]
    assert [row[1]["rejected"] for row in rows] == [rows[0][1]["rejected"]] * 4
