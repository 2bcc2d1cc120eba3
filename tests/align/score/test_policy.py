"""CHES and its kin as columns: equal to a plain loop, whatever stands beside a row, and bad rows named."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from align.data.fields import FieldError
from align.data.rows import row_id
from align.data.tokenize import tokenize_pair
from align.errors import AlignError
from align.models.load import LoadedModel
from align.score.dataset import ches_scores, filter_by
from align.score.policy import PolicyScorer
from align.score.rows import ScoreRow, score_row
from align.score.scorers import Policy

WORDS = ("ches", "ches_ln", "last_inner", "edit")
Rows = list[dict[str, Any]]


def pairs(count: int, seed: int = 0) -> Rows:
    """Text and messages, short and long, each answer another."""
    rng = random.Random(seed)
    words = ["the", "inner", "thing", "an", "apple", "garden", "hint", "there", "ant"]

    def text(most: int) -> str:
        return "".join(f" {rng.choice(words)}" for _ in range(rng.randint(1, most)))

    rows: Rows = []
    for number in range(count):
        prompt, chosen, rejected = text(12), f"{text(9)} {number}", text(9)
        if number % 3 == 0:
            said = [{"role": "assistant", "content": answer} for answer in (chosen, rejected)]
            rows.append({"prompt": [{"role": "user", "content": prompt}], "chosen": said[:1], "rejected": said[1:]})
        else:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def read(rows: Sequence[dict[str, Any]]) -> list[ScoreRow]:
    found = [score_row(row, []) for row in rows]
    assert None not in found
    return [row for row in found if row is not None]


@pytest.fixture
def policy(make_tiny_model: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast) -> Policy:
    return Policy("tiny", LoadedModel(make_tiny_model(), tiny_tokenizer, ""), max_length=256, batch_size=4)


def scorer(policy: Policy, *words: str) -> PolicyScorer:
    return PolicyScorer({word: word for word in words or WORDS}, policy)


def products(row: dict[str, Any], model: Any, tokenizer: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The vectors whose inner product each score is: two forward passes over one unpadded row each, all states."""
    pair = tokenize_pair(row["prompt"], row["chosen"], row["rejected"], tokenizer, None)
    states = []
    for answer in (pair.chosen_ids, pair.rejected_ids):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([pair.prompt_ids + answer]), output_hidden_states=True)
        states.append(out.hidden_states[-1][0, len(pair.prompt_ids) - 1 : -1].double())
    w, r = (state.sum(0) for state in states)
    mean_w, mean_r = (state.mean(0) for state in states)
    return {"ches": (w, r - w), "ches_ln": (mean_w, mean_r - mean_w), "last_inner": (states[0][-1], states[1][-1])}


def plain_loop(row: dict[str, Any], model: Any, tokenizer: Any) -> dict[str, Any]:
    """Each score, within 1e-4 of ``|M+| |M- - M+|``: near 0 its terms cancel, and the error is that of the terms."""
    return {
        name: pytest.approx(float(one @ other), abs=1e-4 * float(one.norm() * other.norm()), rel=0)
        for name, (one, other) in products(row, model, tokenizer).items()
    }


def test_float32_is_within_1e_4_of_the_plain_loop_in_float64(policy: Policy) -> None:
    rows = pairs(100)
    found = scorer(policy).score(read(rows)).columns
    wide = copy.deepcopy(policy.loaded.model).double()
    for row, columns in zip(rows, found, strict=True):
        for name, value in plain_loop(row, wide, policy.loaded.tokenizer).items():
            assert columns[name] == value


@pytest.mark.parametrize(("shared", "budget"), [(True, 0), (True, 400), (True, None), (False, None)])
def test_nothing_beside_a_row_changes_it(policy: Policy, shared: bool, budget: int | None) -> None:
    """Alone, in batches of 2 and of 17, in another order, with a long neighbour that pads all others.

    Within 1e-5, as in ``plain_loop``.
    """
    rows = read(pairs(17))
    sizes = {}
    for row, pair in zip(rows, pairs(17), strict=True):
        vectors = products(pair, policy.loaded.model, policy.loaded.tokenizer).items()
        sizes[row.row_id] = {name: float(one.norm() * other.norm()) for name, (one, other) in vectors}
    of = scorer(policy)
    assert of.layout == {"shared_prompt": True, "row_tokens": 0}
    of.layout = {"shared_prompt": shared, "row_tokens": budget}
    alone = {row.row_id: of.score([row]).columns[0] for row in rows}
    long = read([{"prompt": "a" * 90, "chosen": "b" * 60, "rejected": "c"}])
    others = [rows, rows[::-1], rows + long, *(rows[start : start + 2] for start in range(0, 17, 2))]
    for batch in others:
        for row, columns in zip(batch, of.score(batch).columns, strict=True):
            for name, value in alone.get(row.row_id, {}).items():
                assert columns[name] == pytest.approx(value, abs=1e-5 * sizes[row.row_id].get(name, 0), rel=0)


def test_a_family_that_takes_separate_rows(
    tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    config = GPTBigCodeConfig(
        vocab_size=len(tiny_tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3
    )
    model = GPTBigCodeForCausalLM(config).eval()
    rows = pairs(9)
    of = scorer(Policy("bigcode", LoadedModel(model, tiny_tokenizer, ""), 256, 4))
    assert "separate rows for chosen and rejected answers: gpt_bigcode" in caplog.text
    for row, columns in zip(rows, of.score(read(rows)).columns, strict=True):
        for name, value in plain_loop(row, copy.deepcopy(model).double(), tiny_tokenizer).items():
            assert columns[name] == value


def test_the_prompt_is_computed_once_and_the_head_is_not_asked(policy: Policy) -> None:
    """One call of the backbone, one row a pair, of prompt, chosen and rejected; logps is what asks the head."""
    row = pairs(2)[1]
    pair = tokenize_pair(row["prompt"], row["chosen"], row["rejected"], policy.loaded.tokenizer, None)
    model = policy.loaded.model
    seen: list[torch.Size] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    model.lm_head.register_forward_pre_hook(lambda module, args: pytest.fail("logits were computed"))
    scorer(policy).score(read([row]))
    assert seen == [(1, len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids))]
    scorer(policy, "edit").score(read([row]))
    assert len(seen) == 1


def test_all_columns_come_of_one_pass(policy: Policy) -> None:
    """And each is what it is alone."""
    rows = read(pairs(5))
    together = scorer(policy, *WORDS, "logps").score(rows).columns
    for word in (*WORDS, "logps"):
        for columns, all_columns in zip(scorer(policy, word).score(rows).columns, together, strict=True):
            assert {name: all_columns[name] for name in columns} == pytest.approx(columns, rel=1e-6)


def test_bf16_ranks_as_float32_does(policy: Policy) -> None:
    rows = read(pairs(60))
    exact = torch.tensor([columns["ches_ln"] for columns in scorer(policy).score(rows).columns])
    policy.loaded.model.bfloat16()
    rounded = torch.tensor([columns["ches_ln"] for columns in scorer(policy).score(rows).columns])
    ranks = torch.stack([exact.argsort().argsort(), rounded.argsort().argsort()]).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.99


def test_through_an_adapter(policy: Policy) -> None:
    """What LoRA changes is in the scores; a model in training is scored without dropout and goes on training."""
    model = policy.loaded.model
    before = scorer(policy).score(read(pairs(3))).columns[0]
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)
    adapted = get_peft_model(model, config).train()
    of = scorer(Policy("adapted", LoadedModel(adapted, policy.loaded.tokenizer, ""), 256, 4))
    found = of.score(read(pairs(3))).columns[0]
    assert found == of.score(read(pairs(3))).columns[0]
    assert found["ches"] != pytest.approx(before["ches"], rel=1e-3)
    assert adapted.training
    merged = adapted.eval().merge_and_unload()
    wanted = scorer(Policy("merged", LoadedModel(merged, policy.loaded.tokenizer, ""), 256, 4))
    assert wanted.score(read(pairs(3))).columns[0] == pytest.approx(found, rel=1e-3)


def test_answers_of_one_token_are_flagged(policy: Policy) -> None:
    """The words an and in are tokens: with the end token two states each, and CHES 0 where a limit leaves one."""
    rows = read(
        [{"prompt": "cat", "chosen": "an", "rejected": "in"}, {"prompt": "cat", "chosen": "an", "rejected": "xyz"}]
    )
    assert [columns["one_token"] for columns in scorer(policy).score(rows).columns] == [True, False]
    short = scorer(Policy("tiny", policy.loaded, max_length=4, batch_size=4))
    (cut,) = short.score(rows[:1]).columns
    assert (cut["ches"], cut["ches_ln"], cut["one_token"]) == (0.0, 0.0, True)
    assert short.score(rows[:1]).cut == 2
    assert "one_token" not in scorer(policy, "edit").score(rows).columns[0]


def test_a_turn_that_ends_in_a_token_of_its_own_is_no_longer_for_it(
    make_tiny_model: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The template ends turns by <end> and a newline, as Gemma's does, and generation by it or the end token."""
    tokenizer, model = copy.deepcopy(tiny_tokenizer), make_tiny_model()
    turn_end = "<|endoftext|>"
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", turn_end)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(turn_end)]
    of = scorer(Policy("tiny", LoadedModel(model, tokenizer, ""), max_length=256, batch_size=4))
    rows = [
        {"prompt": [{"role": "user", "content": "cat"}], "chosen": chosen, "rejected": "in"}
        for chosen in ("an", "an ant")
    ]
    assert [columns["one_token"] for columns in of.score(read(rows)).columns] == [True, False]


def test_prompts_whose_end_moves_are_counted(policy: Policy, caplog: pytest.LogCaptureFixture) -> None:
    """A prompt's t and an answer's he merge into one token: both answers begin at it, and one warning says so."""
    rows = read([{"prompt": "cat t", "chosen": "he an", "rejected": "in"}, *pairs(2)])
    found = scorer(policy).score(rows)
    assert found.moved == 1
    assert "the end of the prompt is tokenised otherwise" in caplog.text


def test_what_batches_cut_and_move_is_told_of_all_rows(policy: Policy, caplog: pytest.LogCaptureFixture) -> None:
    """Three rows in batches of two: the prompts' ends move in all, and of six answers those over 5 tokens are cut."""
    data = Dataset.from_list([{"prompt": "cat t", "chosen": "he an", "rejected": "in " * n} for n in range(1, 4)])
    ches_scores(data, policy.loaded.model, policy.loaded.tokenizer, batch_size=2, max_length=9)
    moved, cut = "3 of 3 rows whose prompt ends in other tokens", "2 answers are too long for max_length"
    assert [record.message[: len(said)] for record, said in zip(caplog.records, (cut, moved), strict=True)] == [
        cut,
        moved,
    ]


def test_what_cannot_be_scored_is_refused(policy: Policy) -> None:
    of = scorer(policy)
    for row, message in (
        ({"prompt": "cat", "completion": "an"}, "ches compares chosen with rejected, and this row has no pair"),
        ({"prompt": "cat " * 100, "chosen": "an", "rejected": "in"}, "over --max-length 256 before any answer"),
        ({"prompt": "cat", "chosen": " a", "rejected": " a<|im_end|>"}, "equal to rejected in tokens"),
    ):
        with pytest.raises(FieldError, match=message):
            of.score(read([row]))
    poison(policy.loaded)
    with pytest.raises(FieldError, match="a hidden state is not finite"):
        of.score(read([{"prompt": "cat", "chosen": "z", "rejected": "in"}]))


def poison(loaded: LoadedModel) -> None:
    """The letter z has no finite embedding."""
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[loaded.tokenizer.convert_tokens_to_ids("z")] = torch.nan


def test_a_data_set_in_a_script(
    make_tiny_model: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Scores row by row, nulls and a warning for the bad ones, and the lowest half of the others."""
    loaded = LoadedModel(make_tiny_model(), tiny_tokenizer, "")
    poison(loaded)
    bad = [{"prompt": "cat", "chosen": "z", "rejected": "an"}, {"prompt": "cat", "chosen": "", "rejected": "an"}]
    text = [row for row in pairs(20) if isinstance(row["prompt"], str)][:10]
    rows = [*text[:4], *bad, *text[4:]]
    scored = ches_scores(Dataset.from_list(rows), loaded.model, tiny_tokenizer, columns=WORDS, batch_size=3)
    assert scored.column_names == ["prompt", "chosen", "rejected", "row_id", *WORDS, "one_token"]
    assert "2 of 12 rows have no score" in caplog.text
    ids = [row_id(*(rows[place][name] for name in ("prompt", "chosen", "rejected"))) for place in range(12)]
    assert f"dataset[4] (row_id {ids[4]}): model: a hidden state is not finite" in caplog.text
    assert f"dataset[5] (row_id {ids[5]}): chosen: empty" in caplog.text
    assert [place for place, value in enumerate(scored["ches_ln"]) if value is None] == [4, 5]
    assert scored["row_id"] == ids
    for row in scored.select(range(4)):
        for name, value in plain_loop(row, loaded.model, tiny_tokenizer).items():
            assert row[name] == value
    kept = filter_by(scored, "ches_ln", keep=0.5)
    values = [value for value in scored["ches_ln"] if value is not None]
    assert kept["ches_ln"] == [value for value in values if value in sorted(values)[:5]]
    assert "2 of 12 rows have no ches_ln and are left out; the first: dataset[4]: ches_ln: missing" in caplog.text
    named = scored.add_column("kind", ["a", "b"] * 6)
    assert sorted(filter_by(named, "ches_ln", keep=0.5, group="kind")["kind"]) == ["a", "a", "b", "b"]
    assert "keeps 4 of 10 rows where 5 were asked for" in caplog.text
    assert filter_by(scored, "ches_ln", window=(0.5, 1.0))["ches_ln"] == [v for v in values if v in sorted(values)[5:]]
    assert all(value < 0 for value in filter_by(scored, "ches_ln", below=0)["ches_ln"])


def test_a_data_set_that_cannot_be_scored(policy: Policy) -> None:
    data, model, tokenizer = Dataset.from_list(pairs(3)[1:]), policy.loaded.model, policy.loaded.tokenizer
    for columns in (["chess"], "ches", []):
        with pytest.raises(AlignError, match="a list of one or more of ches, ches_ln, last_inner, edit"):
            ches_scores(data, model, tokenizer, columns=columns)
    with pytest.raises(AlignError, match="name one split"):
        ches_scores({"train": data}, model, tokenizer)  # type: ignore[arg-type]
    with pytest.raises(AlignError, match=r"no row can be scored; the first: dataset\[0\] \(row_id \w+\): prompt"):
        ches_scores(data, model, tokenizer, max_length=3)
    scored = ches_scores(data, model, tokenizer)
    with pytest.raises(AlignError, match="a column ches already"):
        ches_scores(scored, model, tokenizer)
    with pytest.raises(AlignError, match="no column chess: there are prompt"):
        filter_by(scored, "chess", keep=0.5)
    with pytest.raises(AlignError, match="filter_by has no rule; give one of keep, window, below, above"):
        filter_by(scored, "ches")
    with pytest.raises(AlignError, match=r"keep is 1\.5; it must be at most 1"):
        filter_by(scored, "ches", keep=1.5)
    with pytest.raises(AlignError, match=r"keep .*0\.5.* is not"):
        filter_by(scored, "ches", keep="0.5")  # type: ignore[arg-type]


def test_a_data_set_that_has_been_scored(policy: Policy, caplog: pytest.LogCaptureFixture) -> None:
    """Its row_id and one_token stay; null in them is filled in; another row_id is refused."""
    data, model, tokenizer = Dataset.from_list(pairs(3)[1:]), policy.loaded.model, policy.loaded.tokenizer
    once = ches_scores(data, model, tokenizer, columns=["ches"])
    short = Dataset.from_list([{**once[0], "row_id": None, "one_token": None}, once[1]])
    twice = ches_scores(short, model, tokenizer, columns=["ches_ln"])
    assert set(twice.column_names) == {*once.column_names, "ches_ln"}
    for name in once.column_names:
        assert twice[name] == once[name]
    other = data.add_column("one_token", [True, False])  # of a model with other tokens
    assert ches_scores(other, model, tokenizer)["one_token"] == [True, False]
    assert "1 of 2 pairs keep the one_token that the data has" in caplog.text
    theirs = data.add_column("one_token", ["no", None])
    assert ches_scores(theirs, model, tokenizer)["one_token"] == ["no", None]
    with pytest.raises(AlignError, match="row_id of its own"):
        ches_scores(data.add_column("row_id", ["a", "b"]), model, tokenizer)


def test_what_a_script_gets_wrong(policy: Policy, caplog: pytest.LogCaptureFixture) -> None:
    """Said with what, where and in the words of Python, not of the command."""
    data, model, tokenizer = Dataset.from_list(pairs(3)[1:]), policy.loaded.model, policy.loaded.tokenizer
    with pytest.raises(AlignError, match=r"model is a str, tokenizer a .*: load both first"):
        ches_scores(data, "name", tokenizer)
    with pytest.raises(AlignError, match="tokenizer a NoneType"):
        ches_scores(data, model, None)
    for name, value in (("batch_size", 0), ("batch_size", "4"), ("batch_size", True), ("max_length", 0)):
        with pytest.raises(AlignError, match=f"{name} is {value!r}: it must be a whole number, 1 or more"):
            ches_scores(data, model, tokenizer, **{name: value})
    with pytest.raises(AlignError, match="name each once"):
        ches_scores(data, model, tokenizer, columns=["ches", "ches"])
    with pytest.raises(AlignError, match="a Linear is no causal model"):
        ches_scores(data, torch.nn.Linear(1, 1), tokenizer)
    with pytest.raises(AlignError, match="a LlamaModel is no causal model"):  # what AutoModel loads
        ches_scores(data, model.model, tokenizer)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": len(tokenizer)}
    with pytest.raises(AlignError, match="a T5ForConditionalGeneration is no causal model"):
        ches_scores(data, T5ForConditionalGeneration(T5Config(**sizes)), tokenizer)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = endless.pad_token = None
    with pytest.raises(AlignError, match="the tokenizer has no end token"):
        ches_scores(data, model, endless)
    with pytest.raises(AlignError, match=r"over max_length 3"):
        ches_scores(data, model, tokenizer, max_length=3)
    scored = Dataset.from_dict({"text": ["a", "b", "c"], "ches": [1.0, math.nan, 3.0], "far": [1.0, math.inf, 3.0]})
    with pytest.raises(AlignError, match="name one split"):
        filter_by({"train": scored}, "ches", keep=0.5)  # type: ignore[arg-type]
    with pytest.raises(AlignError, match=r"no row has a number.*: dataset\[0\]: text: 'a' is not a number"):
        filter_by(scored, "text", keep=0.5)
    assert filter_by(scored, "far", keep=1.0)["text"] == ["a", "c"]
    assert "1 of 3 rows have no far and are left out; the first: dataset[1]: far: inf is not finite" in caplog.text
    with pytest.raises(AlignError, match=r"window .*0\.5.* is not"):
        filter_by(scored, "ches", window=0.5)  # type: ignore[arg-type]
    with pytest.raises(AlignError, match="no row is kept: ches lies between 1 and 3"):
        filter_by(scored, "ches", below=-1e9)
    assert filter_by(scored, "ches", keep=1.0)["text"] == ["a", "c"]
    assert "1 of 3 rows have no ches" in caplog.text


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs(30)), encoding="utf-8")
    return path


def test_the_command(align: Callable[..., Any], source: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """One pass, all columns; an unknown word is told with those that are known."""
    done = align(
        "score", source, "--with", "ches,ln=ches_ln,logps", "--model", tiny_model_dir, "-o", tmp_path / "o.jsonl"
    )
    assert done.exit_code == 0, done.output
    row = json.loads((tmp_path / "o.jsonl").read_text().splitlines()[0])
    assert {"ches", "ln", "one_token", "logps_chosen", "logps_tokens_rejected"} <= row.keys()
    assert "one_token" not in done.stdout
    missing = align("score", source, "--with", "ches", "-o", tmp_path / "p.jsonl")
    assert "--model  is missing: ches needs it" in missing.stderr
    wrong = align("score", source, "--with", "chess", "-o", tmp_path / "p.jsonl")
    assert wrong.exit_code == 2
    assert "did you mean ches?" in wrong.stderr


def test_a_second_pass(align: Callable[..., Any], source: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """CHES again under another name, one_token kept whatever this model says; a name that is taken is told before any
    model is looked for.
    """

    def score(data: Path, words: str, output: str, model: str = str(tiny_model_dir)) -> Any:
        return align("score", data, "--with", words, "--model", model, "-o", tmp_path / output)

    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert score(source, "ches_ln,logps", one.name).exit_code == 0
    again = score(one, "other=ches_ln,ches", two.name)
    assert again.exit_code == 0, again.output
    was, now = ([json.loads(row) for row in file.read_text().splitlines()] for file in (one, two))
    for before, after in zip(was, now, strict=True):
        assert after["other"] == after["ches_ln"]
        assert after["one_token"] is before["one_token"] is False
    for words in ("ches_ln", "logps"):
        taken = score(one, words, "three.jsonl", model="nowhere")
        assert taken.exit_code == 1
        assert f"there is a column {words}" in taken.stderr
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    flagged = one.read_text().replace('"one_token": false', '"one_token": true', 7)
    one.write_text(flagged)
    otherwise = score(one, "ches", "three.jsonl")
    assert otherwise.exit_code == 0, otherwise.output
    assert "7 pairs keep the one_token that the data has, which would be another" in otherwise.stdout
    assert "7 pairs whose answers are single tokens" in otherwise.stdout
    third = [json.loads(row) for row in (tmp_path / "three.jsonl").read_text().splitlines()]
    assert [row["one_token"] for row in third] == [True] * 7 + [False] * 23


def test_what_needs_no_model_is_told_before_one_is_looked_for(
    align: Callable[..., Any], source: Path, tmp_path: Path
) -> None:
    """An output that is none of ours, and a row_id of the data's own."""
    output = tmp_path / "out.jsonl"
    output.write_text("precious\n")
    words = ("--with", "ches", "--model", "nowhere", "-o", output)
    assert "out.jsonl is there already and was not made by align score" in align("score", source, *words).stderr
    output.unlink()
    source.write_text(json.dumps({**pairs(1)[0], "row_id": 7}) + "\n")
    assert "pairs.jsonl: row 1: the data has a column row_id of its own (7)" in align("score", source, *words).stderr


def test_two_processes_write_the_file_of_one(
    source: Path, tiny_model_dir: Path, tmp_path: Path, align: Callable[..., Any], two_processes: Callable[..., None]
) -> None:
    """As torchrun has them, over gloo: 720 rows in three shards, of which the first process scores two."""
    rows = source.read_text(encoding="utf-8")
    source.write_text("".join(rows.replace(" the", f" the{n}") for n in range(24)), encoding="utf-8")  # three shards

    def score(output: str) -> None:
        words = ("--with", "ches,ches_ln,logps", "--model", tiny_model_dir, "-o", tmp_path / output)
        done = align("score", source, *words)
        assert done.exit_code == 0, done.output

    score("one.jsonl")
    two_processes(lambda: score("two.jsonl"))
    one, two = ((tmp_path / f"{name}.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two
    assert len(one.splitlines()) == 24 * 30


def test_log_probs_of_a_pair_do_not_depend_on_what_is_beside_it(policy: Policy) -> None:
    """The pair's prompt ends before "th", which is one token with the "e" of chosen; in a mixed batch, too."""
    pair = {"prompt": "an inn th", "chosen": "e end", "rejected": " no"}
    single = {"prompt": "an inn th", "completion": " no"}
    alone, mixed = (scorer(policy, "logps").score(read(rows)) for rows in ([pair], [single, pair]))
    assert mixed.columns[1]["logps_tokens_rejected"] == alone.columns[0]["logps_tokens_rejected"]
    assert mixed.columns[1] == pytest.approx(alone.columns[0], abs=1e-4)
    assert mixed.columns[0]["logps_tokens_completion"] < mixed.columns[1]["logps_tokens_rejected"]
    assert (alone.moved, mixed.moved) == (1, 1)
