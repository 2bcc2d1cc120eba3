"""Reward models: scores depend on prompt and answer alone, what is saved comes back, bad rows are told."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align.losses.general_preference import gpm, gpm_score, unit_norm
from align.rewards.batches import in_order
from align.rewards.encoding import encode_rows
from align.rewards.heads import first_positions, last_positions, pair_matrix, token_positions
from align.rewards.models import RewardModel

Backbones = Callable[[str], Path]
PROMPTS = ["Say something", "the", "Name a thing that an inner garden has", "hint", "an apple"]
ANSWERS = [" kind.", " there is another one in the garden", " no", " the apple and the ant then", " ok ok"]
CLOSE: dict[str, float] = {"rtol": 1e-5, "atol": 1e-5}
KINDS: dict[str, dict[str, Any]] = {
    "scalar": {"kind": "scalar"},
    "attributes": {"kind": "attributes", "attributes": ("helpful", "brief"), "ranking": "helpful", "bias": 2.9},
    "gpm": {"kind": "gpm", "dimension": 4, "gate": True},
}


def make(backbone: Path, kind: str = "scalar", **more: Any) -> RewardModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = RewardModel.create(backbone, **{**KINDS[kind], **more})
        if model.gate is not None:
            torch.nn.init.normal_(model.gate.weight)  # as if trained: at its start the gate says 1
    return model


def rows(seed: int = 0, count: int = 7) -> tuple[list[list[int]], list[list[int]]]:
    rng = random.Random(seed)
    prompts = [[rng.randrange(200) for _ in range(rng.randint(1, 12))] for _ in range(count)]
    return prompts, [[rng.randrange(200) for _ in range(rng.randint(1, 30))] for _ in range(count)]


def left_padded(model: RewardModel, prompts: list[list[int]], answers: list[list[int]], padding: int = 3) -> Any:
    full = [[*p, *a] for p, a in zip(prompts, model.fit(prompts, answers), strict=True)]
    width = max(map(len, full)) + padding
    ids = torch.tensor([[model.tokenizer.pad_token_id] * (width - len(row)) + row for row in full])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in full])
    with torch.no_grad():
        return model(ids, mask, torch.tensor([len(p) for p in prompts]))


def test_a_new_head_is_not_reported_and_a_lack_in_the_backbone_is(
    backbone_dir: Backbones, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Transformers reports the head as missing, as if something were wrong; what else is missing is wrong."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = shutil.copytree(backbone_dir("llama"), tmp_path / "model")
    make(folder)
    assert "LOAD REPORT" not in caplog.text
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    make(folder)
    assert "LOAD REPORT" in caplog.text
    assert "norm.weight" in caplog.text


def test_a_classifier_with_another_head_is_no_backbone(backbone_dir: Backbones, tmp_path: Path):
    make(backbone_dir("llama"), "scalar").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="its head, of a sequence classifier, has 1 columns, where 4 are asked for: name"
    ):
        RewardModel.create(tmp_path, kind="gpm", dimension=4)
    assert RewardModel.create(tmp_path).config.kind == "scalar"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "granite"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_do_not_depend_on_batch_order_padding_or_neighbours(backbone_dir: Backbones, family: str, kind: str):
    model = make(backbone_dir(family), kind)
    prompts, answers = rows()
    alone = torch.cat([model.score_ids([p], [a]) for p, a in zip(prompts, answers, strict=True)])
    for batch_size in (1, 2, 3, 7, 50):
        torch.testing.assert_close(model.score_ids(prompts, answers, batch_size=batch_size), alone, **CLOSE)
    order = [3, 0, 6, 2, 5, 1, 4]
    shuffled = model.score_ids([prompts[i] for i in order], [answers[i] for i in order], batch_size=3)
    torch.testing.assert_close(shuffled, alone[order], **CLOSE)
    others, more = rows(seed=9)
    torch.testing.assert_close(model.score_ids(prompts + others, answers + more)[:7], alone, **CLOSE)
    left = left_padded(model, prompts, answers)
    torch.testing.assert_close(left.values, alone, **CLOSE)
    if kind == "gpm":
        right = [left_padded(model, [p], [a], padding=0).scale for p, a in zip(prompts, answers, strict=True)]
        torch.testing.assert_close(left.scale, torch.cat(right), **CLOSE)
        torch.testing.assert_close(left.scale.mean(-1), torch.ones(7))
        assert left.scale.std() > 1e-3


def test_a_padding_token_inside_an_answer_is_an_answer(backbone_dir: Backbones):
    """By its id the padding token would end the row early; by the mask it does not."""
    model = make(backbone_dir("llama"))
    pad = model.tokenizer.pad_token_id
    scores = model.score_ids([[1]] * 3, [[5, pad, 6], [5, pad, 7], [5]])
    assert len(set(scores.tolist())) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_it_reads_the_last_token_and_the_gate_the_last_of_the_prompt(backbone_dir: Backbones, kind: str):
    model = make(backbone_dir("llama"), kind)
    eos = model.config.eos_token_id
    prompt, answer = [4, 5, 6], [7, 8]
    hidden = model._backbone(torch.tensor([[*prompt, *answer, eos]])).last_hidden_state[0]
    values = hidden[-1] @ model.carrier.score.weight.T
    out = left_padded(model, [prompt], [answer])
    if kind == "scalar":
        torch.testing.assert_close(out.values, values, **CLOSE)
    elif kind == "attributes":
        torch.testing.assert_close(out.values[0], values + 2.9, **CLOSE)
    else:
        torch.testing.assert_close(out.values[0], values / values.norm(), **CLOSE)
        assert model.gate is not None
        expected = torch.softmax(hidden[2] @ model.gate.weight.T / 32**0.5, -1) * 2
        torch.testing.assert_close(out.scale[0], expected, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_scalar_model_loads_as_a_plain_classifier_with_equal_scores(
    backbone_dir: Backbones, tmp_path: Path, family: str
):
    model = make(backbone_dir(family))
    model.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = [p + a + tokenizer.eos_token for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    with torch.no_grad():
        theirs = plain(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    assert theirs.shape == (5, 1)
    torch.testing.assert_close(model.score(PROMPTS, ANSWERS), theirs[:, 0], **CLOSE)


def test_a_tokenizer_that_pads_with_its_end_token_gets_another(backbone_dir: Backbones, tmp_path: Path):
    """With padding equal to the end token a plain classifier would read the token before it."""
    source = AutoTokenizer.from_pretrained(backbone_dir("llama"))
    source.pad_token = source.eos_token
    model = make(backbone_dir("llama"), tokenizer=source)
    assert source.pad_token == source.eos_token
    model.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad_token_id == plain.config.pad_token_id != tokenizer.eos_token_id
    texts = [p + a + tokenizer.eos_token for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    with torch.no_grad():
        theirs = plain(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
    torch.testing.assert_close(model.score(PROMPTS, ANSWERS), theirs, **CLOSE)


@pytest.mark.parametrize("training", ["full", "frozen", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_comes_back(backbone_dir: Backbones, tmp_path: Path, kind: str, training: str):
    how: dict[str, Any] = {
        "full": {},
        "frozen": {"frozen": True},
        "lora": {"lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)},
    }[training]
    model = make(backbone_dir("llama"), kind, tau=0.7, max_length=99, **how)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file() is (training == "lora")
    back = RewardModel.from_pretrained(tmp_path)
    assert back.config == model.config
    assert (back.config.tau, back.config.training, back.config.max_length) == (0.7, training, 99)
    assert torch.equal(back.score(PROMPTS, ANSWERS), model.score(PROMPTS, ANSWERS))
    assert torch.equal(back.score_pairs(*triples()), model.score_pairs(*triples()))
    learn = {name for name, weight in back.named_parameters() if weight.requires_grad}
    assert learn == {name for name, weight in model.named_parameters() if weight.requires_grad}


def triples() -> tuple[list[str], list[str], list[str]]:
    return PROMPTS, ANSWERS, ANSWERS[::-1]


def test_lora_merges_into_a_plain_classifier(backbone_dir: Backbones, tmp_path: Path):
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_CLS")
    model = make(backbone_dir("qwen2"), lora=lora)
    before = model.score(PROMPTS, ANSWERS)
    model.save_pretrained(tmp_path, merge=True)
    back = RewardModel.from_pretrained(tmp_path)
    assert back.config.training == "full"
    torch.testing.assert_close(back.score(PROMPTS, ANSWERS), before, **CLOSE)
    AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(model.score(PROMPTS, ANSWERS), before)


def test_any_classifier_with_one_label_is_a_scalar_model(backbone_dir: Backbones, tmp_path: Path):
    model = make(backbone_dir("llama"))
    model.save_pretrained(tmp_path)
    (tmp_path / "reward.json").unlink()
    (tmp_path / "reward.safetensors").unlink()
    torch.testing.assert_close(
        RewardModel.from_pretrained(tmp_path).score(PROMPTS, ANSWERS), model.score(PROMPTS, ANSWERS)
    )
    with pytest.raises(ValueError, match="not a reward model"):
        RewardModel.from_pretrained(backbone_dir("llama"))


def test_the_head_is_float32_on_a_bf16_backbone(backbone_dir: Backbones, tmp_path: Path):
    model = make(backbone_dir("llama"), "gpm", dtype=torch.bfloat16)
    assert next(model._backbone.parameters()).dtype == torch.bfloat16
    assert model.carrier.score.weight.dtype == torch.float32
    values = model.score(PROMPTS, ANSWERS)
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.score(PROMPTS, ANSWERS), values)
    model.save_pretrained(tmp_path)
    back = RewardModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(back.carrier.score.weight, model.carrier.score.weight)


def test_what_each_way_of_training_changes(backbone_dir: Backbones):
    def moved(model: RewardModel) -> set[str]:
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        out = model(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.ones(2, 3), torch.tensor([1, 1]))
        loss = (out.values[0] * torch.tensor([1.0, -2.0, 0.5, 0.3])).sum() + (out.scale * torch.arange(2)).sum()
        loss.backward()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.grad is not None:
                    weight -= weight.grad
        return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}

    backbone = backbone_dir("llama")
    heads = {"carrier.score.weight", "gate.weight"}
    assert moved(make(backbone, "gpm", frozen=True)) == heads
    with_lora = moved(make(backbone, "gpm", lora=LoraConfig(r=2, target_modules=["q_proj"])))
    assert heads < with_lora
    assert all(name in heads or "lora" in name for name in with_lora)
    assert "carrier.model.layers.0.self_attn.q_proj.weight" in moved(make(backbone, "gpm"))


def test_gpm_head_starts_from_the_published_law(backbone_dir: Backbones):
    """N(0, 1/(H + 1)) with H = 32: standard deviation 0.1741; 32 x 4000 draws put it within 0.002."""
    model = make(backbone_dir("llama"), "gpm", dimension=4000, gate=False)
    assert float(model.carrier.score.weight.detach().std()) == pytest.approx(33**-0.5, abs=2e-3)


def test_attributes_rank_by_one_or_by_weights(backbone_dir: Backbones):
    model = make(backbone_dir("llama"), "attributes")
    values = model.score(PROMPTS, ANSWERS)
    assert values.shape == (5, 2)
    assert torch.equal(model.rewards(PROMPTS, ANSWERS), values[:, 0])
    weighted = make(backbone_dir("llama"), "attributes", ranking={"helpful": 2.0, "brief": -0.5})
    torch.testing.assert_close(weighted.rewards(PROMPTS, ANSWERS), 2 * values[:, 0] - 0.5 * values[:, 1])
    torch.testing.assert_close(weighted.preference(*triples()), torch.sigmoid(weighted.score_pairs(*triples())))


def test_a_model_of_attributes_becomes_the_scalar_that_ranks_alike(backbone_dir: Backbones, tmp_path: Path):
    """Scaled Bradley-Terry from regression: r is the ranking value less its constant, 2 * 2.9 - 0.5 * 2.9 = 4.35."""
    model = make(backbone_dir("llama"), "attributes", ranking={"helpful": 2.0, "brief": -0.5})
    before = model.rewards(PROMPTS, ANSWERS)
    scalar = model.make_scalar()
    torch.testing.assert_close(scalar.score(PROMPTS, ANSWERS), before - 4.35, **CLOSE)
    scalar.save_pretrained(tmp_path)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).num_labels == 1
    torch.testing.assert_close(RewardModel.from_pretrained(tmp_path).score(PROMPTS, ANSWERS), before - 4.35, **CLOSE)
    with pytest.raises(ValueError, match="attributes alone"):
        scalar.make_scalar()


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_antisymmetric_and_groups_agree_with_them(backbone_dir: Backbones, kind: str):
    model = make(backbone_dir("qwen2"), kind)
    scores = model.score_pairs(*triples())
    swapped = model.score_pairs(PROMPTS, ANSWERS[::-1], ANSWERS)
    torch.testing.assert_close(scores, -swapped, **CLOSE)
    assert float(model.score_pairs(["the"], [" no"], [" no"])) == 0.0
    p = model.preference(*triples())
    torch.testing.assert_close(p + model.preference(PROMPTS, ANSWERS[::-1], ANSWERS), torch.ones(5), **CLOSE)
    torch.testing.assert_close(p, torch.sigmoid(scores))
    matrix = model.score_groups(PROMPTS[:1], [ANSWERS])[0]
    assert torch.equal(matrix, -matrix.T)
    pairs = model.score_pairs([PROMPTS[0]] * 5, ANSWERS, ANSWERS[::-1])
    torch.testing.assert_close(matrix[range(5), range(4, -1, -1)], pairs, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_answers_tie_and_swapped_ones_turn_the_sign_to_the_last_bit(backbone_dir: Backbones, kind: str):
    """Twelve pairs of answers of many lengths, in batches of 2 and 5; every third is of one answer with itself."""
    words = ["the", "apple", "garden", "ok", "no", "another", "one", "there", "and", "ant"]
    rng = random.Random(0)
    first = [" " + " ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(12)]
    second = [a if row % 3 == 0 else " " + " ".join(rng.choices(words, k=4)) for row, a in enumerate(first)]
    prompts = [PROMPTS[row % 5] for row in range(12)]
    model = make(backbone_dir("llama"), kind)
    for size in (2, 5):
        scores = model.score_pairs(prompts, first, second, batch_size=size)
        assert (scores[::3] == 0).all()
        assert (scores != 0).sum() == 8
        assert torch.equal(model.score_pairs(prompts, second, first, batch_size=size), -scores)
        matrix = model.score_groups(["the"], [[*ANSWERS, *ANSWERS]], batch_size=size)[0]
        assert torch.equal(matrix[:5, 5:], matrix[:5, :5])
        assert (matrix[range(5), range(5, 10)] == 0).all()


def test_groups_cost_each_prompt_once(backbone_dir: Backbones):
    """4 + 5 answers: rows of four and one, each with its prompt, and not 9 rows, or 6 + 10 pairs."""
    model = make(backbone_dir("llama"), "gpm")
    seen: list[int] = []
    model._backbone.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    matrices = model.score_groups(PROMPTS[:2], [ANSWERS[:4], ANSWERS])
    assert [tuple(matrix.shape) for matrix in matrices] == [(4, 4), (5, 5)]
    assert seen == [2, 1]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_shared_prompts_change_no_score(backbone_dir: Backbones, size: int):
    """Rows in any order, prompts of one to five answers, beside rows of their own."""
    rng = random.Random(size)
    prompts = [prompt for count, prompt in enumerate(PROMPTS, 1) for _ in range(count)]
    answers = [" ".join(rng.choices(ANSWERS, k=rng.randint(1, 3))) for _ in prompts]
    rows = list(zip(prompts, answers, strict=True))
    rng.shuffle(rows)
    model = make(backbone_dir("llama"), "gpm")
    ids = encode_rows(model.tokenizer, *zip(*rows, strict=True))
    found = model.embed_ids(*ids, batch_size=size)
    fitted = model.fit(*ids)
    with torch.no_grad():
        model.eval()
        expected = in_order([(o, torch.cat(s, -1)) for o, *s in model._separate(ids[0], fitted, size)])
    torch.testing.assert_close(torch.cat(found, -1), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 2**31), st.booleans())
def test_one_product_gives_all_pairs(answers: int, blocks: int, seed: int, gated: bool):
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(3, answers, 2 * blocks, generator=generator, dtype=torch.float64)
    scale = torch.rand(3, blocks, generator=generator, dtype=torch.float64) if gated else None
    matrix = pair_matrix(v, scale)
    assert torch.equal(matrix, -matrix.transpose(1, 2))
    wide = None if scale is None else scale[:, None, None]
    torch.testing.assert_close(matrix, gpm_score(v[:, :, None], v[:, None], wide))
    turn = torch.linalg.matrix_exp(torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64))
    rotated = (v.unflatten(-1, (-1, 2)) @ turn.T).flatten(-2)
    torch.testing.assert_close(pair_matrix(rotated, scale), matrix)


def test_pair_matrix_by_hand():
    """v_i = (.5, -.2, .3, .7), v_j = (.1, .4, -.6, .2): .22 + .48 = .7; lam (.5, 1.5): .11 + .72 = .83.

    Unit vectors 120 degrees apart run in a circle: sin 120 = .8660254037844386 each.
    """
    v = torch.tensor([[0.5, -0.2, 0.3, 0.7], [0.1, 0.4, -0.6, 0.2]], dtype=torch.float64)
    assert float(pair_matrix(v)[0, 1]) == pytest.approx(0.7)
    assert float(pair_matrix(v, torch.tensor([0.5, 1.5]))[0, 1]) == pytest.approx(0.83)
    angles = torch.arange(3, dtype=torch.float64) * 2 * torch.pi / 3
    circle = pair_matrix(torch.stack([angles.cos(), angles.sin()], -1))
    for i in range(3):
        assert float(circle[i, (i + 1) % 3]) == pytest.approx(0.8660254037844386)
    with pytest.raises(ValueError, match="3 dimensions"):
        pair_matrix(torch.ones(2, 3))


def test_positions_of_rows_padded_on_either_side():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]])
    assert last_positions(mask).tolist() == [3, 2, 0]
    assert first_positions(mask).tolist() == [2, 0, 0]
    assert token_positions(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match=r"attention_mask\[1\]"):
        last_positions(torch.tensor([[1], [0]]))


def test_the_end_token_stands_once(backbone_dir: Backbones):
    model = make(backbone_dir("llama"))
    eos = model.config.eos_token_id
    scores = model.score_ids([[1, 2]] * 3, [[3, 4], [3, 4, eos], [3, 4, eos, eos]])
    assert len(set(scores.tolist())) == 1
    assert float(model.score(["a"], [" b" + model.tokenizer.eos_token])) == float(model.score(["a"], [" b"]))


def test_messages_go_through_the_template(backbone_dir: Backbones):
    """The template ends an answer in the end token and a newline, which is cut off."""
    model = make(backbone_dir("llama"))
    chat = [{"role": "user", "content": "Say the thing"}]
    text = "<|im_start|>user\nSay the thing<|im_end|>\n<|im_start|>assistant\n"
    by_hand = model.score([text], ["another<|im_end|>"])
    torch.testing.assert_close(model.score([chat], [[{"role": "assistant", "content": "another"}]]), by_hand)
    torch.testing.assert_close(model.score([chat], ["another"]), by_hand)


def test_long_answers_are_cut_with_their_end_kept_and_told(backbone_dir: Backbones, caplog: Any):
    model = make(backbone_dir("llama"), max_length=8)
    eos = model.config.eos_token_id
    assert model.fit([[1, 2, 3]] * 2, [[4, 5, 6, 7, 8, 9], [4]]) == [[4, 5, 6, 7, eos], [4, eos]]
    assert "1 of 2 answers were cut to fit max_length 8" in caplog.text
    with pytest.raises(ValueError, match="row 0: the prompt has 7 tokens, which leaves no room"):
        model.score_ids([[1] * 7], [[2, 3]])
    assert model.score_ids([[1] * 6], [[2, 3]]).shape == (1,)
    strict = make(backbone_dir("llama"), max_length=8, over_long="error")
    with pytest.raises(ValueError, match="row 1: 10 tokens, over max_length 8"):
        strict.score_ids([[1], [1, 2, 3]], [[2], [4, 5, 6, 7, 8, 9]])
    assert make(backbone_dir("llama")).config.max_length == 256


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "gpm", "dimension": 3}, "3 dimensions"),
        ({"kind": "ranker"}, "kind is 'ranker'"),
        ({"kind": "scalar", "dimension": 4}, "dimension is that of a gpm"),
        ({"kind": "scalar", "gate": True}, "gate weighs"),
        ({"kind": "scalar", "bias": 1.0}, "bias is for attributes"),
        ({"kind": "attributes"}, "give both or neither"),
        ({"kind": "attributes", "attributes": ("a", "b")}, "several attributes"),
        ({"kind": "attributes", "attributes": ("a", "a"), "ranking": "a"}, "stands twice"),
        ({"kind": "attributes", "attributes": ("a", "b"), "ranking": "c"}, "ranking names c"),
        ({"kind": "attributes", "attributes": ("a", "b"), "ranking": {"a": 0.0}}, "not all of them 0"),
        ({"kind": "scalar", "tau": 0.0}, "tau is 0"),
        ({"kind": "scalar", "over_long": "drop"}, "over_long is 'drop'"),
        ({"kind": "scalar", "frozen": True, "lora": LoraConfig()}, "give one"),
    ],
)
def test_settings_that_do_not_fit(backbone_dir: Backbones, wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        RewardModel.create(backbone_dir("llama"), **wrong)


def test_rows_that_cannot_be_scored(backbone_dir: Backbones):
    model = make(backbone_dir("llama"), "gpm")
    with pytest.raises(ValueError, match="row 1: answer 0 is empty"):
        model.score(["a", "b"], [" c", ""])
    with pytest.raises(ValueError, match="row 1: the answer is empty"):
        model.score_ids([[1], [1]], [[2], [model.config.eos_token_id]])
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        model.score(["a", "b"], [" c"])
    with pytest.raises(ValueError, match="the answer is empty"):
        model.score([[{"role": "user", "content": "a"}]], [" "])
    with pytest.raises(ValueError, match="prompt_length is needed"):
        model.score_ids([[]], [[1, 2]])
    with pytest.raises(ValueError, match="row 0: 1 answers"):
        model.score_groups(["a"], [[" b"]])
    with pytest.raises(ValueError, match="no reward to a single answer"):
        model.rewards(["a"], [" b"])
    with torch.no_grad():
        model._backbone.embed_tokens.weight[5] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        model.score_ids([[5]], [[5]])


def test_no_rows_are_no_scores(backbone_dir: Backbones):
    assert make(backbone_dir("llama")).score([], []).shape == (0,)
    assert make(backbone_dir("llama"), "gpm").score([], []).shape == (0, 4)
    assert make(backbone_dir("llama"), "gpm").score_pairs([], [], []).shape == (0,)


def test_embeddings_are_what_the_heads_read(backbone_dir: Backbones):
    model = make(backbone_dir("llama"))
    answers, prompts = model.embed(PROMPTS, ANSWERS, batch_size=2)
    torch.testing.assert_close((answers @ model.carrier.score.weight.T)[:, 0], model.score(PROMPTS, ANSWERS), **CLOSE)
    assert prompts.shape == answers.shape == (5, 32)
    again = model.embed(PROMPTS, [" something else altogether"] * 5)[1]
    torch.testing.assert_close(prompts, again, **CLOSE)


def test_scoring_leaves_the_mode_and_no_gradients(backbone_dir: Backbones):
    model = make(backbone_dir("llama")).train()
    assert not model.score(PROMPTS, ANSWERS).requires_grad
    assert model.training
    frozen = make(backbone_dir("llama"), frozen=True).train()
    assert not frozen._backbone.training


def test_a_file_of_another_format_is_refused(backbone_dir: Backbones, tmp_path: Path):
    make(backbone_dir("llama")).save_pretrained(tmp_path)
    found = json.loads((tmp_path / "reward.json").read_text())
    (tmp_path / "reward.json").write_text(json.dumps({**found, "taus": 1}))
    with pytest.raises(ValueError, match="taus"):
        RewardModel.from_pretrained(tmp_path)


def test_a_gpm_learns_a_circle(backbone_dir: Backbones):
    """Three answers that beat each other in a circle: no reward ranks more than two of the three pairs right."""
    model = make(backbone_dir("llama"), "gpm", dimension=2, gate=False, frozen=True)
    answers = [" apple", " garden", " hint"]
    states = torch.stack([model.embed(["the"], [answer])[0][0] for answer in answers])

    def embeddings() -> Tensor:
        return unit_norm(states @ model.carrier.score.weight.T)

    optimizer = torch.optim.Adam([model.carrier.score.weight], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        gpm(embeddings(), embeddings().roll(-1, 0), tau=0.1).loss.mean().backward()
        optimizer.step()
    matrix = model.score_groups(["the"], [answers])[0]
    assert all(float(matrix[i, (i + 1) % 3]) > 0 for i in range(3))
