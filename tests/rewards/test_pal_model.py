"""PAL with its backbone: rewards for who is chosen, saved and loaded, scored and rewarded as any other model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.rewards.functions import RewardFunction, load_scorer
from align.rewards.models import RewardModel
from align.rewards.named import is_rule, split_choice
from align.rewards.pal import Pal, PalA, PalB
from align.rewards.pal_model import ChoiceError, PalRewardModel, load_reward_model

PROMPTS = ["the inner thing", "an apple", "cat"]
ANSWERS = [" another garden", " then there is a hint of it", " an"]


def made(folder: Path, kind: type[Pal] = PalA, groups: int = 2) -> PalRewardModel:
    torch.manual_seed(0)
    model = PalRewardModel.create(folder, kind="pal", frozen=True, dtype=torch.float32)
    pal = kind(model.hidden_size, ["ann", "bob@x.org"], groups=groups, dimension=6)
    with torch.no_grad():
        pal.logits.weight.copy_(torch.randn(2, groups))
    return model.attach(pal)


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    model = made(tiny_model_dir)
    model.fitted = {"eve": [0.25, 0.75]}
    model.save_pretrained(tmp_path / "run" / "model")
    return tmp_path / "run"


@pytest.mark.parametrize("kind", [PalA, PalB])
def test_rewards_are_those_of_the_pal_model_on_its_states(tiny_model_dir: Path, kind: type[Pal]):
    model = made(tiny_model_dir, kind).choose("annotator:ann")
    answers, prompts = model.embed(PROMPTS, ANSWERS)
    with torch.no_grad():
        expected = model.pal.reward(answers, model.pal.weights(["ann"])[0], prompts)
    found = model.rewards(PROMPTS, ANSWERS, batch_size=2)
    assert found == pytest.approx(expected, abs=1e-5)
    assert model.score_pairs(PROMPTS[:1], ANSWERS[:1], ANSWERS[1:2]).shape == (1,)
    assert not model.rewards(PROMPTS, ANSWERS).requires_grad


def test_who_can_be_chosen(tiny_model_dir: Path):
    """Groups are the corners of the simplex, a mix is a point in it, and annotators are where training put them."""
    model = made(tiny_model_dir)
    model.fitted = {"eve": [0.25, 0.75]}
    table = torch.softmax(model.pal.logits.weight.detach(), -1)
    for who, weights in {
        "annotator:ann": table[0],
        "annotator:bob@x.org": table[1],
        "annotator:eve": torch.tensor([0.25, 0.75]),
        "mean": table.mean(0),
        "uniform": torch.tensor([0.5, 0.5]),
        "group:2": torch.tensor([0.0, 1.0]),
        "mix:0.3:0.7": torch.tensor([0.3, 0.7]),
    }.items():
        assert torch.allclose(model.choose(who).chosen, weights), who


@pytest.mark.parametrize(
    ("who", "message"),
    [
        ("annotator:zoe", "'zoe' is unknown: .*fit-annotators.* Known: ann, bob@x.org"),
        ("ann", "names nobody: write annotator:NAME"),
        ("", "names nobody"),
        ("group:0", "groups are 1 to 2"),
        ("group:3", "groups are 1 to 2"),
        ("mix:0.5", "2 weights, one a group"),
        ("mix:0.5:0.6", "1 in sum"),
        ("mix:nan:1", "2 weights"),
        ("mix:-1:2", "0 or more"),
        ("mix:a:b", "2 weights"),
    ],
)
def test_nobody_is_chosen_in_silence(tiny_model_dir: Path, who: str, message: str):
    with pytest.raises(ChoiceError, match=message):
        made(tiny_model_dir).choose(who)


def test_without_a_choice_there_is_no_reward(tiny_model_dir: Path, folder: Path):
    with pytest.raises(ChoiceError, match="choose one with choose"):
        made(tiny_model_dir).rewards(PROMPTS, ANSWERS)
    with pytest.raises(ChoiceError, match="run@WHO, and WHO is annotator:NAME, mean"):
        load_scorer(str(folder))
    with pytest.raises(ValueError, match="kind pal, and RewardModel is scalar or"):
        RewardModel.from_pretrained(folder / "model")
    RewardModel.create(tiny_model_dir).save_pretrained(folder / "plain")
    with pytest.raises(ChoiceError, match="one reward for all, and no annotators: leave out @mean"):
        load_reward_model(f"{folder / 'plain'}@mean")
    with pytest.raises(ValueError, match="width 8, and these have 32"):
        made(tiny_model_dir).attach(PalA(8, ["ann"], groups=2, dimension=2))


@pytest.mark.parametrize("trained", ["frozen", "lora", "full"])
def test_what_is_saved_is_loaded(tiny_model_dir: Path, tmp_path: Path, trained: str):
    """Whole, with an adapter, and with one that is merged; the fitted annotators too."""
    from peft import LoraConfig

    model = made(tiny_model_dir)
    if trained == "lora":
        model.train_backbone(lora=LoraConfig(r=4, target_modules="all-linear"))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.05)
    elif trained == "full":
        model.train_backbone()
    model.fitted = {"eve": [0.25, 0.75]}
    expected = model.choose("annotator:eve").rewards(PROMPTS, ANSWERS)
    for merge in (False, True):
        model.save_pretrained(tmp_path / str(merge), merge=merge)
        loaded = load_reward_model(f"{tmp_path / str(merge)}@annotator:eve", dtype=torch.float32)
        assert loaded.rewards(PROMPTS, ANSWERS) == pytest.approx(expected, abs=1e-4)


def test_gradients_reach_adapters_through_the_last_tokens_state(tiny_model_dir: Path):
    from peft import LoraConfig

    model = made(tiny_model_dir).train_backbone(lora=LoraConfig(r=4, target_modules="all-linear")).train()
    ids, mask = torch.tensor([[65, 66, 67, 68], [65, 66, 67, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    values = model(ids, mask, torch.tensor([2, 2]), users=torch.tensor([0, 1])).values
    (values[0] - values[1]).backward()
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert any("lora_B" in name for name in moved)
    assert {"pal.logits.weight", "pal.prototypes"} <= moved
    assert not any("score" in name for name in moved)
    alone = model(ids[1:, :3], mask[1:, :3], torch.tensor([2]), users=torch.tensor([1])).values
    assert torch.allclose(values[1:], alone, atol=1e-5)


def test_a_run_is_a_reward_of_an_expression(folder: Path):
    """Two annotators of one model, each against their own reference, as GRPO calls them; an empty answer too."""
    ann, eve = f"{folder}@annotator:ann", f"{folder / 'model'}@annotator:eve"
    assert not is_rule(ann)
    reward = RewardFunction.of(
        {"all_of": [{"lsc": {"reward": ann, "reference": -3.0}}, {"lsc": {"reward": eve, "reference": -2.0}}]}
    )
    found = reward(PROMPTS, [*ANSWERS[:2], ""])
    columns = reward.columns(PROMPTS, [*ANSWERS[:2], ""], {})
    assert set(columns) == {"run_ann", "run_eve"}
    model = load_reward_model(ann)
    assert columns["run_ann"][:2] == pytest.approx(model.rewards(PROMPTS[:2], ANSWERS[:2]).double(), abs=1e-4)
    expected = sum(torch.nn.functional.logsigmoid(columns[n] - at) for n, at in (("run_ann", -3.0), ("run_eve", -2.0)))
    assert found == pytest.approx(expected.tolist(), abs=1e-9)


def test_a_choice_is_split_from_its_folder(tmp_path: Path):
    (tmp_path / "a@b").mkdir()
    (tmp_path / "c").mkdir()
    for spec, wanted in {
        f"{tmp_path}/c@annotator:bob@x.org": (f"{tmp_path}/c", "annotator:bob@x.org"),
        f"{tmp_path}/a@b@mean": (f"{tmp_path}/a@b", "mean"),
        f"{tmp_path}/a@b": (f"{tmp_path}/a@b", None),
        "module:function": ("module:function", None),
        "nowhere@mean": ("nowhere@mean", None),
    }.items():
        assert split_choice(spec) == wanted
    assert is_rule("module:function")
    assert not is_rule("runs/typo@annotator:bob")
