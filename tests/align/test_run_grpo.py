"""Whole runs of method grpo on a tiny model: combined rewards, references of every kind, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from align.cli import app
from align.config.load import load_recipe
from align.data.prompts import read_prompts
from align.errors import AlignError, ConfigError
from align.run import read_splits, train

RULES = """
def longer(prompts, completions):
    return [float(len(text)) for text in completions]

def spaces(prompts, completions):
    return [float(text.count(" ")) for text in completions]

def near(prompts, completions, wanted):
    return [None if want < 2 else -abs(len(text) - want) for text, want in zip(completions, wanted)]

def even(prompts, completions):
    return [None if sum(map(ord, text)) % 2 else float(len(text)) for text in completions]

def by_solution(completions, **columns):
    assert all(type(one) in (int, str) for one in columns["solution"])
    return [float(len(text)) for text in completions]

def rows(prompts, completions, row_id):
    assert set(row_id) == {"mine"}
    return [float(len(text)) for text in completions]

def tokens(prompts, completions, completion_ids):
    return [float(len(ids)) for ids in completion_ids]

def worlds(prompts, completions, environments):
    return [0.0 for world in environments]

def steps(prompts, completions, trainer_state=None):
    return [0.0 for text in completions]

def fails(prompts, completions):
    return [1 / (len(prompt) - 5) for prompt in prompts]
"""
GRPO = {"num_generations": 4, "max_completion_length": 12, "beta": 0.01}
BOTH = {
    "all_of": [
        {"lsc": {"reward": "users_rules:longer", "reference": 20, "temperature": 5}},
        {"lsc": {"reward": "users_rules:spaces", "reference": 2.5}},
    ]
}


def run(source: Path) -> Path:
    recipe = load_recipe(str(source), [])
    return train(recipe, source=str(source), command=["align", "train", str(source)])


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.fixture
def grpo_recipe(write_recipe, tmp_path):
    (tmp_path / "users_rules.py").write_text(RULES)

    def write(rewards=BOTH, **changes):
        settings = {
            "method": "grpo",
            "loss": None,
            "grpo": {**GRPO, "rewards": rewards},
            "training": {"max_steps": 3, "per_device_train_batch_size": 8, "save_steps": 1},
            "generation": None,
            "evals": ["goals"],
        }
        return write_recipe(changes.pop("name", "recipe.yaml"), **{**settings, **changes})

    return write


def test_a_combined_reward_from_recipe_to_report(grpo_recipe):
    folder = run(grpo_recipe(generation={"prompts": 6}))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["data"]["train"]["prompts"] == 24
    log = metrics(folder)
    assert [row["step"] for row in log] == [1, 2, 3]
    for row in log:
        assert row["reward"] == pytest.approx(row["rewards/combined/mean"])
        assert row["reward"] < 0
        assert 0 <= row["good/all"] <= min(row["good/longer"], row["good/spaces"])
        assert row["perf/tokens_per_s"] > 0
    goals = json.loads((folder / "eval" / "goals.json").read_text())
    assert goals["n"] == 6
    assert {"longer_before", "spaces_after", "good_all_change", "kl_to_reference"} <= goals["metrics"].keys()
    row = goals["rows"][0]["after"]
    assert row["rewards"]["longer"] == len(row["text"])
    assert row["good"]["all"] == (row["good"]["longer"] and row["good"]["spaces"])
    page = (folder / "report.html").read_text()
    assert "Answers that are good in every reward, after" in page
    assert "Answers that are good in spaces, before" in page
    assert "the same weights with the adapter switched off" in page
    assert "Mean over the answers that the model drew in training" in page
    assert (folder / "merged" / "model.safetensors").exists()


def test_all_weights_and_a_reward_model_from_its_run(grpo_recipe, tiny_model_dir, tmp_path):
    """Full training compares with a copy of the start; a reward model stands where a rule stood."""
    from align.rewards.models import RewardModel

    RewardModel.create(tiny_model_dir, kind="gpm", dimension=2).save_pretrained(tmp_path / "gpm" / "model")
    folder = run(grpo_recipe(str(tmp_path / "gpm"), model={"lora": None}, generation={"prompts": 3}))
    assert json.loads((folder / "manifest.json").read_text())["reference"]["kind"] == "frozen-copy"
    for row in metrics(folder):
        assert row["rewards/gpm"] == pytest.approx(0, abs=1e-4)  # among its group, an answer's gain is another's loss
        assert row["rewards/gpm/std"] > 0
    goals = json.loads((folder / "eval" / "goals.json").read_text())["metrics"]
    assert goals["gpm_before"]["value"] == pytest.approx(-goals["gpm_after"]["value"], abs=1e-5)


def test_references_from_a_column_and_from_the_model_s_own_answers(grpo_recipe, tmp_path):
    rows = [{"prompt": f"say {number}", "usual": 10.0 + number} for number in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards = {
        "all_of": [
            {"lsc": {"reward": "users_rules:longer", "reference": "usual"}},
            {"lsc": {"reward": "users_rules:spaces", "reference": {"quantile": 0.5, "samples": 3}}},
        ]
    }
    data = {"train": str(tmp_path / "prompts.jsonl"), "eval": None}
    folder = run(grpo_recipe(rewards, data=data, evals=[]))
    kept = [json.loads(line) for line in (folder / "references.jsonl").read_text().splitlines()]
    assert len(kept) == 6
    assert all(len(row["rewards"]["users_rules:spaces"]) == 3 for row in kept)
    assert len(metrics(folder)) == 3


def test_references_of_every_kind_for_a_rule_that_reads_a_column(grpo_recipe, tmp_path):
    """The rule gives None for prompts 0 and 1, which then have no reward and no reference; the run is as long.

    What align score writes as the quantile of a prompt is what the run is given, to the last digit.
    """
    rows = [{"prompt": f"say {number}", "wanted": number} for number in range(6)]
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe(str(grpo_recipe(name="r.yaml")), [])
    spec = "near=users_rules:near,users_rules:longer"
    words = ["score", str(source), "--with", spec, "-m", recipe.model.name, "--reference-quantile", "0.5"]
    words += ["--samples", "3", "--max-new-tokens", "12", "--seed", "7", "--dtype", "float32"]
    scored = tmp_path / "scored.jsonl"
    done = CliRunner().invoke(app, [*words, "-o", str(scored)])
    assert done.exit_code == 0, done.output
    assert "6 reference answers without a reward left out" in done.stdout
    assert "near_reference    mean" in done.stdout
    assert "2 without a number" in done.stdout
    parts = [
        {"lsc": {"reward": "users_rules:near", "reference": {"quantile": 0.5, "samples": 3}}},
        {"lsc": {"reward": "users_rules:near", "reference": {"canned": "No"}, "name": "canned"}},
        {"lsc": {"reward": "users_rules:longer", "reference": {"regression": str(scored)}}},
    ]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"prompt": f"ask {n}", "wanted": n}) + "\n" for n in range(6)))
    data = {"train": str(source), "eval": str(held_out)}
    training = {"max_steps": 3, "per_device_train_batch_size": 8, "seed": 7}
    changes = {"data": data, "training": training, "generation": {"prompts": 6}, "model": {"dtype": "float32"}}
    folder = run(grpo_recipe({"all_of": parts}, **changes))
    lines = (folder / "references.jsonl").read_text().splitlines()
    kept = {row["row_id"]: row["rewards"] for row in map(json.loads, lines)}
    ids = {row.prompt: row.row_id for row in read_prompts(str(source), columns={"wanted": None}).rows}
    for row in map(json.loads, scored.read_text().splitlines()):
        own = kept[ids[row["prompt"]]]["users_rules:near"]
        assert row["near_reference"] == (None if row["wanted"] < 2 else sorted(own)[1])
    assert len(metrics(folder)) == 3
    goals = json.loads((folder / "eval" / "goals.json").read_text())
    assert (goals["metrics"]["near_after"]["n"], goals["metrics"]["longer_after"]["n"]) == (4, 6)
    assert goals["rows"][0]["after"]["rewards"]["near"] is None
    lacking = [{"prompt": f"say {number}"} for number in range(6)]
    source.write_text("".join(json.dumps(row) + "\n" for row in lacking))
    with pytest.raises(
        AlignError, match=r"6 of 6 rows cannot be used[\s\S]*missing, and users_rules:near asks for it"
    ):
        run(grpo_recipe("users_rules:near", **{**changes, "output": str(tmp_path / "other")}))


def test_columns_of_several_types_reach_the_rule_as_they_are(grpo_recipe, tmp_path):
    """Beside columns of the names under which TRL gives rewards what is its own."""
    rows = [{"prompt": f"say {n}", "solution": n if n % 2 else f"{n}", "note": [n, "a"][: n % 3]} for n in range(6)]
    rows = [{**row, "prompts": "?", "completions": ["?"], "trainer_state": 1} for row in rows]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "prompts.jsonl"), "eval": None}
    training = {"max_steps": 1, "per_device_train_batch_size": 8}
    assert len(metrics(run(grpo_recipe("users_rules:by_solution", data=data, evals=[], training=training)))) == 1


def test_a_column_row_id_is_the_users(grpo_recipe, tmp_path):
    """Where references are made, rows are trained on, and goals are judged."""
    for name in ("train", "held_out"):
        rows = [{"prompt": f"{name} {n}", "row_id": "mine"} for n in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "held_out.jsonl")}
    training = {"max_steps": 1, "per_device_train_batch_size": 8}
    rewards = {"lsc": {"reward": "users_rules:rows", "reference": {"quantile": 0.5, "samples": 2}}}
    folder = run(grpo_recipe(rewards, data=data, training=training, generation={"prompts": 2}))
    kept = [json.loads(line)["row_id"] for line in (folder / "references.jsonl").read_text().splitlines()]
    assert len(set(kept)) == 6
    assert "mine" not in kept


@pytest.mark.parametrize(
    ("rewards", "evals", "what"),
    [
        ("users_rules:worlds", [], "asks for environments: TRL gives it with an environment_factory"),
        ("users_rules:tokens", ["goals"], r"not where evals: \[goals\] judges answers; give the argument a default"),
        ({"lsc": {"reward": "users_rules:tokens", "reference": {"canned": "No"}}}, [], "where its reference is made"),
        ("users_rules:tokens", [], ""),
        ("users_rules:steps", ["goals"], ""),
    ],
)
def test_what_trl_does_not_give_a_rule_is_told_with_the_recipe(grpo_recipe, rewards, evals, what):
    source = str(grpo_recipe(rewards, evals=evals))
    if not what:
        load_recipe(source)
        return
    with pytest.raises(ConfigError, match=rf"reward +the rule {what}" if what[0] == "a" else what):
        load_recipe(source)


def test_goals_judge_each_answer_by_itself(grpo_recipe):
    """Where the rule gives one of the two answers to a prompt None, longer alone says whether that one is good."""
    parts = [{"reward": "users_rules:even", "reference": 4}, {"reward": "users_rules:longer", "reference": 5}]
    training = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 0.1}
    folder = run(grpo_recipe({"raw_sum": parts}, training=training, generation={"prompts": 8}))
    goals = json.loads((folder / "eval" / "goals.json").read_text())
    sides = [(row["before"], row["after"]) for row in goals["rows"]]
    assert any((one["rewards"]["even"] is None) is not (other["rewards"]["even"] is None) for one, other in sides)
    for side in (side for both in sides for side in both):
        assert side["good"]["all"] == (side["good"].get("even", True) and side["good"]["longer"])
    assert goals["metrics"]["good_all_before"]["n"] == 8


def test_held_out_prompts_without_a_reference_are_told_before_training(grpo_recipe, tmp_path):
    for name in ("train", "held_out"):
        rows = [{"prompt": f"{name} {n}", "wanted": 1 if name == "held_out" else 5} for n in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "held_out.jsonl")}
    rewards = {"lsc": {"reward": "users_rules:near", "reference": {"quantile": 0.5, "samples": 2}}}
    with pytest.raises(AlignError, match="no reference can be made for 3 of 3 prompts; the first, 'held_out 0'"):
        run(grpo_recipe(rewards, data=data, generation={"prompts": 3}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_prompts_without_a_reference_are_told_once_and_counted_in_manifest_and_report(grpo_recipe, tmp_path, caplog):
    """Of 5 held-out prompts number 4 has none, and number 0 of training; goals ask the first 2, and evaluation all."""
    for name in ("train", "held_out"):
        lacking = 4 if name == "held_out" else 0
        rows = [{"prompt": f"{name} {n}", "wanted": 1 if n == lacking else 5} for n in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "held_out.jsonl")}
    training = {"max_steps": 1, "per_device_train_batch_size": 8, "eval_strategy": "steps", "eval_steps": 1}
    training |= {"per_device_eval_batch_size": 8}
    rewards = {"lsc": {"reward": "users_rules:near", "reference": {"quantile": 0.5, "samples": 2}}}
    data = {**sources, "max_bad_fraction": 0.4}
    folder = run(grpo_recipe(rewards, data=data, training=training, generation={"prompts": 2}))
    told = [message for message in caplog.messages if "no reference can be made" in message]
    assert [message.partition("first, ")[2][:12] for message in told] == ["'train 0': n", "'held_out 4'"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [manifest["data"][name]["without_reference"] for name in ("train", "eval")] == [1, 1]
    assert "prompts without a reference, set aside too" in (folder / "report.html").read_text()
    assert json.loads((folder / "eval" / "goals.json").read_text())["n"] == 2


def test_goals_of_which_none_has_a_reference_are_told_before_training(grpo_recipe, tmp_path):
    """Of 6 held-out prompts, all of which evaluation asks, the first two have none."""
    for name, lacking in (("train", 0), ("held_out", 2)):
        rows = [{"prompt": f"{name} {n}", "wanted": 1 if n < lacking else 5} for n in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "held_out.jsonl")}
    training = {"max_steps": 1, "per_device_train_batch_size": 8, "eval_strategy": "steps"}
    rewards = {"lsc": {"reward": "users_rules:near", "reference": {"quantile": 0.5, "samples": 2}}}
    data = {**sources, "max_bad_fraction": 0.4}
    with pytest.raises(AlignError, match=r"for any of the first 2 held-out prompts, which evals: \[goals\] has"):
        run(grpo_recipe(rewards, data=data, training=training, generation={"prompts": 2}))


def test_a_rule_that_fails_is_an_error_that_names_the_prompt(grpo_recipe, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "say {n}"}}\n' for n in range(6)))
    data = {"train": str(tmp_path / "prompts.jsonl"), "eval": None}
    with pytest.raises(AlignError, match=r"grpo\.rewards: users_rules:fails: row 0: .*ZeroDivision.*'say \d'"):
        run(grpo_recipe("users_rules:fails", data=data, evals=[]))


def test_folders_that_cannot_serve_are_told_before_the_run(grpo_recipe, tiny_model_dir, tmp_path):
    from align.rewards.models import RewardModel

    RewardModel.create(tiny_model_dir, kind="gpm", dimension=2).save_pretrained(tmp_path / "gpm" / "model")
    for rewards, where, what in (
        (str(tiny_model_dir), "raw_sum.0.reward", "holds no reward model"),
        (
            {"lsc": {"reward": str(tmp_path / "gpm"), "reference": {"quantile": 0.5}}},
            "lsc.reference",
            "is a gpm, whose reward is of an answer among the others",
        ),
        (
            {"lsc": {"reward": "users_rules:longer", "reference": {"regression": "no/such.jsonl"}}},
            "lsc.reference.regression",
            "no such file",
        ),
    ):
        with pytest.raises(AlignError) as caught:
            load_recipe(str(grpo_recipe(rewards)), [])
        assert what in dict(caught.value.problems)[f"grpo.rewards.{where}"]


def test_a_row_without_its_reference_stops_the_run(grpo_recipe, tmp_path):
    rows = [{"prompt": f"say {number}", "usual": None if number else 10.0} for number in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards = {"lsc": {"reward": "users_rules:longer", "reference": "usual"}}
    with pytest.raises(AlignError, match=r"5 of 6 rows cannot be used[\s\S]*usual +null"):
        run(grpo_recipe(rewards, data={"train": str(tmp_path / "prompts.jsonl"), "eval": None}, evals=[]))


def test_prompts_that_leave_no_room_are_set_aside(grpo_recipe, tmp_path):
    rows = [{"prompt": "say"}, {"prompt": "say " * 40}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "prompts.jsonl"), "eval": None, "max_length": 40}
    with pytest.raises(AlignError, match=r"over 28: data\.max_length 40 less 12 for the answer"):
        run(grpo_recipe(data=data, evals=[]))


def test_interrupted_and_gone_on_equals_uninterrupted(grpo_recipe, tmp_path, monkeypatch):
    """A run that stops after its second step draws the third step's answers as the whole run did."""
    from align import run as module

    whole = run(grpo_recipe(name="w.yaml", evals=[], output=str(tmp_path / "whole")))
    path = grpo_recipe(name="k.yaml", evals=[], output=str(tmp_path / "stopped"))
    real = module.build

    def stopping(*args, **kwargs):
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                if state.global_step == 2:
                    raise KeyboardInterrupt

        built = real(*args, **kwargs)
        built.trainer.add_callback(Stop())
        return built

    with monkeypatch.context() as patch:
        patch.setattr(module, "build", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(path)
    stopped = run(path)
    timed = ("seconds", "perf/tokens_per_s", "perf/peak_rss_gb", "step_time")
    one, other = ([{k: v for k, v in row.items() if k not in timed} for row in metrics(f)] for f in (whole, stopped))
    assert one == other


def test_other_values_of_a_column_that_a_rule_reads_are_other_data(grpo_recipe, tmp_path, tiny_tokenizer):
    """What a run is asked before it goes on from a checkpoint."""
    source, found = tmp_path / "prompts.jsonl", []
    source.touch()
    recipe = load_recipe(str(grpo_recipe("users_rules:near", data={"train": str(source), "eval": None}, evals=[])), [])
    for wanted in (5, 6):
        source.write_text(json.dumps({"prompt": "say it", "wanted": wanted}) + "\n")
        found.append(read_splits(recipe, tiny_tokenizer, None)["train"].facts["sha256"])
    assert found[0] != found[1]


def test_fewer_prompts_than_a_step_takes_are_told_before_the_model_is_loaded(grpo_recipe, tmp_path, monkeypatch):
    """8 answers a batch, twice: 16, of 4 to a prompt. TRL would drop the incomplete step and end without any."""
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "say {n}"}}\n' for n in range(3)))
    training = {"max_steps": 3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    data = {"train": str(tmp_path / "prompts.jsonl"), "eval": None}
    recipe = load_recipe(str(grpo_recipe(data=data, training=training, evals=[])), [])
    monkeypatch.setattr("align.trainers.build.load_model", None)
    for dry_run in (True, False):
        with pytest.raises(ConfigError) as caught:
            train(recipe, source="r", command=[], dry_run=dry_run)
        ((where, what),) = caught.value.problems
        assert where == "data.train"
        assert what.startswith("3 prompts, and a step takes 4: 16 answers (training.per_device_train_batch_size 8,")


def test_dry_run(grpo_recipe, tmp_path, capsys):
    train(load_recipe(str(grpo_recipe()), []), source="r", command=[], dry_run=True)
    shown = capsys.readouterr().out
    assert "24 rows · 3 steps of 8 (0.25 epochs)" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"grpo": None}, "grpo.rewards", "is missing"),
        ({"method": "dpo", "evals": ["preference"]}, "grpo", "belongs to method: grpo; remove it"),
        (
            {"grpo": {"rewards": {"all_off": []}}},
            "grpo.rewards.all_off",
            "is no way to combine rewards; did you mean all",
        ),
        ({"grpo": {"rewards": "users_rules:longr"}}, "grpo.rewards.raw_sum.0.reward", "reward 'users_rules:longr'"),
        ({"grpo": {"rewards": "./no/such/folder"}}, "grpo.rewards.raw_sum.0.reward", "no such folder"),
        ({"grpo": {"num_generation": 4}}, "grpo.num_generation", "unknown key; did you mean grpo.num_generations?"),
        (
            {"grpo": {"num_generations": 3, "rewards": "users_rules:longer"}},
            "training.per_device_train_batch_size",
            "8 (times 1 accumulated) answers are no",
        ),
        ({"evals": ["preference"]}, "evals.0", "preference compares pairs, and method: grpo reads prompts"),
        ({"training": {"beta": 0.1}}, "training.beta", "set it as grpo.beta"),
        ({"training": {"epsilon": "x"}}, "training.epsilon", "'x' is not a number"),
        ({"training": {"max_prompt_length": 3}}, "training.max_prompt_length", "gone from TRL"),
        ({"loss": {"beta": 0.1}}, "loss.beta", "method grpo has no such setting"),
    ],
)
def test_recipes_that_do_not_fit(grpo_recipe, changes, where, what):
    with pytest.raises(AlignError) as caught:
        load_recipe(str(grpo_recipe(**changes)), [])
    found = dict(caught.value.problems)
    assert found.get(where, f"not among {found}").startswith(what)
