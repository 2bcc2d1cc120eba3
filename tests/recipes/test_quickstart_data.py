"""The quickstart's data is what its generator says: requests, split, rule, lengths."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import sys
from collections import Counter
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from align.models import packaged
from align.rewards.rules import everyday_answer

FOLDER = Path(str(resources.files("align.recipes"))) / "data"
SPLITS = ("train", "heldout")


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """The generator, a script that no package holds."""
    spec = importlib.util.spec_from_file_location("make_quickstart_pairs", FOLDER / "make_quickstart_pairs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    def read(split: str) -> list[dict[str, Any]]:
        text = (FOLDER / f"quickstart_{split}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    return {split: read(split) for split in SPLITS}


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The packaged model's tokenizer, without its weights."""
    reader = gguf.GGUFReader(packaged._packaged_file())
    return packaged._tokenizer({key: field.contents() for key, field in reader.fields.items()})


def request(row: dict[str, Any]) -> str:
    return str(row["prompt"][0]["content"])


def test_requests_are_fixed(maker: ModuleType) -> None:
    """1,000 different requests, ten tasks of 100; the hash moves only when somebody edits them."""
    found = maker.requests()
    assert len({request.prompt for request in found}) == len(found) == 1000
    assert set(Counter(request.task for request in found).values()) == {100}
    assert Counter(request.split for request in found) == {"train": 800, "heldout": 200}
    text = "\n".join(f"{request.split}\t{request.prompt}" for request in found)
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "d0cd0ddb87096da06da76f0d58e704ef43eba101a460eceaa7aad6766b868c6a"
    )


def test_no_subject_is_in_both_splits(maker: ModuleType) -> None:
    subjects = {split: {request.subject for request in maker.requests() if request.split == split} for split in SPLITS}
    assert len(subjects["train"]) == 400
    assert len(subjects["heldout"]) == 100
    assert subjects["train"].isdisjoint(subjects["heldout"])


def test_rows_have_the_form_of_pairs(maker: ModuleType, rows: dict[str, list[dict[str, Any]]]) -> None:
    asked = {request.prompt: request for request in maker.requests()}
    for split in SPLITS:
        assert len({request(row) for row in rows[split]}) == len(rows[split])
        assert len({row["task"] for row in rows[split]}) == 10
        for row in rows[split]:
            assert asked[request(row)].split == split
            assert asked[request(row)].task == row["task"]
            assert [message["role"] for message in row["prompt"]] == ["user"]
            for side in ("chosen", "rejected"):
                assert [message["role"] for message in row[side]] == ["assistant"]
                text = row[side][0]["content"]
                assert text
                assert text == text.strip()
    assert len(rows["train"]) >= 640
    assert len(rows["heldout"]) >= 160


def test_rule_gives_the_stored_rewards(maker: ModuleType, rows: dict[str, list[dict[str, Any]]]) -> None:
    for row in (row for split in SPLITS for row in rows[split]):
        chosen, rejected = everyday_answer([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        assert row["chosen_reward"] == pytest.approx(chosen, abs=1e-6)
        assert row["rejected_reward"] == pytest.approx(rejected, abs=1e-6)
        assert chosen >= maker.MIN_REWARD
        assert chosen - rejected >= maker.MIN_GAP


def test_token_lengths(rows: dict[str, list[dict[str, Any]]], chat_tokenizer: PreTrainedTokenizerFast) -> None:
    """Most rows below 160 tokens and none over 256; neither side is much the longer one."""
    totals, chosen, rejected = [], [], []
    for row in (row for split in SPLITS for row in rows[split]):
        prompt = chat_tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        sides = [len(chat_tokenizer.encode(row[side][0]["content"])) + 1 for side in ("chosen", "rejected")]
        totals.append(len(prompt) + sum(sides))
        chosen.append(sides[0])
        rejected.append(sides[1])
    assert max(totals) <= 256
    assert sum(total <= 160 for total in totals) >= 0.85 * len(totals)
    assert abs(sum(chosen) / sum(rejected) - 1) < 0.2


def test_sampling_equals_sampling_alone(
    maker: ModuleType, make_tiny_model: Any, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """An answer does not depend on its batch: padding, shared prompts and rows that left change nothing."""
    model: LlamaForCausalLM = make_tiny_model().double()
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.padding_side = "left"
    prompts = ["Name three rivers.", "Why?", "Explain the tides to a child in one sentence."]
    with torch.inference_mode():
        together = maker.sample(model, tokenizer, prompts, answers=4)
        alone = [maker.sample(model, tokenizer, [prompt], answers=4)[0] for prompt in prompts]
    assert together == alone
    assert len({answer.text for answers in together for answer in answers}) > 6
    assert {answer.finished for answers in together for answer in answers} == {True, False}


def test_drawing_follows_the_distribution(maker: ModuleType) -> None:
    """Inverse of the cumulative distribution at temperature 0.5: p = (0.2, 0.3, 0.5) at u = 0.1, 0.4, 0.6, 0.99."""
    logits = maker.TEMPERATURE * torch.tensor([0.2, 0.3, 0.5]).log().repeat(4, 1)
    drawn = maker._draw(logits, torch.tensor([0.1, 0.4, 0.6, 0.99], dtype=torch.float64))
    assert drawn.tolist() == [0, 1, 2, 2]


def test_candidates_resume_after_a_cut_line(maker: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "candidates.jsonl"
    whole = json.dumps({"prompt": "Why?", "answers": [{"text": "So.", "finished": True}]}) + "\n"
    file.write_text(whole + '{"prompt": "Wh', encoding="utf-8")
    assert maker._read_candidates(file) == {"Why?": [maker.Answer("So.", True)]}
    assert file.read_text(encoding="utf-8") == whole


def test_pair_weighs_gap_and_length(maker: ModuleType, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    """Unfinished answers never count; of two worse answers the one of about the chosen one's length is taken."""
    asked = maker.Request("child", "tides", "train", "Explain tides to a child in one simple sentence.")
    good = "Tides are the sea going up and down because the moon pulls on the water."
    near = "Sure! Tides are the sea going up and down because the moon pulls it."
    far = "Tides. " + "The moon pulls the sea up and down, and then it goes back to where it was. " * 3
    answers = [maker.Answer(text.strip(), True) for text in (near, far, good)]
    row = maker.pair(asked, [*answers, maker.Answer("Tides", False)], chat_tokenizer)
    assert row["chosen"][0]["content"] == good
    assert row["rejected"][0]["content"] == near
    assert maker.pair(asked, [maker.Answer(good, True), maker.Answer(near, False)], chat_tokenizer) is None
