"""``align eval --suite frontier``, on a run of the tiny model and on laws that can be summed over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from align.answering import Kept
from align.config.load import load_recipe
from align.data.prompts import PromptRow
from align.models.load import LoadedModel
from align.reports.eval_figures import result_pictures
from align.rewards.named import load_reward
from align.run import train
from align.suites.drawn import Reader
from align.suites.prompts import Prompts, Rewards
from align.suites.steered import transfer_points, weighted_points

SMALL = ("prompts=4", "max_new_tokens=6", "best_of=[1,2,4,2]", "particles=4", "strengths=[0.2]")
JUDGE = "align.rewards.rules:everyday_answer"
SMALL = (*SMALL, "alphas=[2]", "candidates=3", "rollout_length=2", "scales=[0,0.5,1]", "--suite", "frontier")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, recipe_in: Callable[..., Path]) -> Path:
    """Six steps with checkpoints at 4 and 6; no test changes it."""
    recipe = recipe_in(tmp_path_factory.mktemp("frontier"), evals=["displacement"])
    return train(load_recipe(str(recipe), []), source="r", command=[])


@pytest.fixture
def reader(
    make_tiny_model: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> Callable[[int, int, int], tuple[Reader, Prompts]]:
    """``reader(seed, prompts, max_new_tokens)``: a random model and prompts."""

    def make(seed: int, count: int, longest: int) -> tuple[Reader, Prompts]:
        rows = [PromptRow(f"row {n}", "data", n, f"the cat {n}", "") for n in range(count)]
        prompts = Prompts(rows, {}, longest)
        loaded = LoadedModel(make_tiny_model(seed), tiny_tokenizer, "")
        return Reader(f"model {seed}", loaded, torch.float32, prompts, Kept(tmp_path / "kept.jsonl"), 0), prompts

    return make


def test_all_points_of_a_run(evaluated: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    """Every kind is there; the adapter at 0 is the reference and at 1 the run; kept answers make the same again."""
    found, shown = evaluated(run, *SMALL, f"judge={JUDGE}")
    base, model = found["models"].values()
    kinds = [one["kind"] for one in base["points"]], [one["kind"] for one in model["points"]]
    assert kinds[0] == ["reference", "best-of-n", "best-of-n", "best-of-n", "smc"]
    assert kinds[1] == ["checkpoint", "run", "scaling", "scaling", "scaling", "transfer-q"]  # the last one is the end
    reference, *best, smc = base["points"]
    _, end, off, half, full, guided = model["points"]
    assert off["kl"]["value"] == pytest.approx(0, abs=1e-5)
    assert off["reward"]["value"] == pytest.approx(reference["reward"]["value"])
    for name in ("reward", "kl"):
        assert full[name] == end[name]
    assert half["rows"] != full["rows"]
    assert reference["kl"]["value"] == best[0]["kl"]["value"] == 0
    values = [one["reward"]["value"] for one in best]
    assert values == sorted(values)
    for one in best:
        assert 0 <= one["kl"]["value"] <= one["kl_bound"]["value"] + 1e-9
    assert best[2]["cost"]["tokens"] == pytest.approx(4 * best[0]["cost"]["tokens"])
    assert smc["kl"]["value"] >= -1e-6
    assert guided["cost"]["tokens"] > guided["rows"][0]["tokens"] / 4
    labels = [one["model"] for one in found["comparisons"]]
    assert (len(labels), "best of 1" in labels, full["label"] in labels, half["label"] in labels) == (
        16,
        False,
        False,
        True,
    )
    assert [one["metric"] for one in found["comparisons"]] == ["reward", "judge"] * 8
    judge = load_reward(JUDGE)
    for one in (reference, end, half, guided):
        said = judge([row["prompt"] for row in one["rows"]], [row["text"] for row in one["rows"]])
        assert [row["judge"] for row in one["rows"]] == pytest.approx(said)
        assert one["judge"]["value"] == pytest.approx(np.mean(said))
    assert all(0 <= row["judge"] <= 1 for one in (*best, smc) for row in one["rows"])
    assert all(row["prompt"] for one in (*base["points"], *model["points"]) for row in one["rows"])
    said = " ".join(shown.split())
    assert "best of n, SMC, Transfer-Q*: answers are chosen by" in said
    assert f"see what {JUDGE} says of them" in said
    assert "by the judge" in said
    assert [p.title for p in result_pictures(found)] == ["Frontier", "Frontier by the judge"]
    assert "at most log 4 = 1.39 without resampling" in said
    assert "too large where few rewards differ" in said
    assert "at most log(particles) without resampling" in smc["kl"]["how"]
    assert model["metrics"]["kl_to_reference"]["value"] == end["kl"]["value"]
    assert "best of 4" in shown

    before = (tmp_path / "result.answers.jsonl").read_text()
    again, _ = evaluated(run, *SMALL, f"judge={JUDGE}")
    assert again == found
    assert (tmp_path / "result.answers.jsonl").read_text() == before


def test_points_that_are_asked_for(evaluated: Callable[..., Any], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of another size change nothing."""
    words = (run, "points=[best-of-n]", "prompts=5", "max_new_tokens=6", "best_of=[3]", "--suite", "frontier")
    found, _ = evaluated(*words)
    monkeypatch.setattr("align.answering.BATCH", 3)
    monkeypatch.setattr("align.heldout.BATCH", 2)
    again, _ = evaluated(*words, "seed=0", "reward=users_rule:longer")
    base, model = found["models"].values()
    assert [one["kind"] for one in (*base["points"], *model["points"])] == ["reference", "best-of-n", "run"]
    assert [note.partition(":")[0] for note in found["notes"]] == ["best of n", "best of n"]
    for name, other in again["models"].items():
        for one, two in zip(found["models"][name]["points"], other["points"], strict=True):
            assert two["reward"] == one["reward"]
            assert two["kl"]["value"] == pytest.approx(one["kl"]["value"], abs=1e-5)


def test_what_cannot_be_asked(refused: Callable[..., str], run: Path) -> None:
    assert "points" in refused(run, "points=[everything]", "--suite", "frontier")
    assert "best_of" in refused(run, "best_of=[0]", "--suite", "frontier")
    assert "reward" in refused(run, "reward=nowhere:at_all", "--suite", "frontier")
    assert "judge" in refused(run, "judge=nowhere:at_all", "--suite", "frontier")
    said = refused("users_rule:longer", "reward=users_rule:longer", "--suite", "frontier")
    assert "users_rule:longer is a rule, and --suite frontier asks models that write answers" in said


def test_smc_against_all_answers(
    reader: Callable[..., tuple[Reader, Prompts]], users_rule: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Two tokens: the target p exp(s r), its reward and its KL are sums over all 70,000 answers.

    1,500 particles: the reward is told to some 0.05, the KL to some hundredths.
    """
    model, prompts = reader(0, 1, 2)
    strength = 0.5
    (found,) = weighted_points(model, prompts, Rewards(users_rule), [strength], 1500)
    (prompt,) = model.ids
    network, ends = model.loaded.model, {tiny_tokenizer.eos_token_id}
    with torch.no_grad():
        first = network(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
        rows = torch.tensor([[*prompt, token] for token in range(len(first))])
        second = network(rows).logits[:, -1].double().log_softmax(-1)
    answers = [(a,) if a in ends else (a, b) for a in range(len(first)) for b in range(1 if a in ends else len(first))]
    logps = np.array([float(first[y[0]]) + (float(second[y[0], y[1]]) if len(y) > 1 else 0) for y in answers])
    texts = tiny_tokenizer.batch_decode([list(y) for y in answers], skip_special_tokens=True)
    rewards = np.array([float(len(text)) for text in texts])
    assert np.exp(logps).sum() == pytest.approx(1)
    log_z = np.logaddexp.reduce(logps + strength * rewards)
    target = np.exp(logps + strength * rewards - log_z)
    exact = float(target @ (np.log(target) - logps))
    assert exact == pytest.approx(strength * float(target @ rewards) - log_z)
    assert exact > 0.02
    assert found["reward"]["value"] == pytest.approx(float(target @ rewards), abs=0.1)
    assert found["kl"]["value"] == pytest.approx(exact, rel=0.2)


def test_transfer_q_against_its_law(
    reader: Callable[..., tuple[Reader, Prompts]], users_rule: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """One token: the law is p exp(r / alpha) over the three likeliest, and the KL of a draw its log-ratio."""
    policy, prompts = reader(0, 6, 1)
    (found,) = transfer_points(policy, reader(1, 6, 1)[0], prompts, Rewards(users_rule), [2.0], 3, 4)
    for prompt, row in zip(policy.ids, found["rows"], strict=True):
        with torch.no_grad():
            logps = policy.loaded.model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
        likeliest = logps.topk(3).indices.tolist()
        texts = [tiny_tokenizer.decode([token], skip_special_tokens=True) for token in likeliest]
        tilts = np.array([len(text) / 2.0 for text in texts])
        log_z = np.logaddexp.reduce(logps[likeliest].numpy() + tilts)
        ratios = [tilt - log_z for tilt, text in zip(tilts, texts, strict=True) if text == row["text"]]
        assert any(row["kl"] == pytest.approx(ratio, abs=1e-6) for ratio in ratios)
