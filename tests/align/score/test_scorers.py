"""Rules, reward models, log-probs and references as columns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from align.data.fields import FieldError
from align.data.tokenize import tokenize_pair
from align.errors import AlignError, ConfigError
from align.models.load import LoadedModel
from align.rewards.models import RewardModel
from align.score.policy import PolicyScorer
from align.score.references import CannedReferences, PredictedReferences, SampledReferences
from align.score.rows import ScoreRow, score_row
from align.score.scorers import ModelScorer, Policy, RuleScorer, named_specs, reward_folder
from align.trainers.references import Draws, drawn_rewards

PAIRS = [
    {"prompt": "the inner thing", "chosen": " another garden", "rejected": " ant"},
    {"prompt": "an apple", "chosen": " then", "rejected": " there is a hint of it"},
    {"prompt": "cat", "chosen": " think", "rejected": " an inner an inner"},
]


def row(fields: dict[str, Any]) -> ScoreRow:
    found = score_row(fields, [])
    assert found is not None
    return found


@pytest.fixture
def policy(make_tiny_model: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast) -> Policy:
    return Policy("tiny", LoadedModel(make_tiny_model(), tiny_tokenizer, ""), max_length=64, batch_size=4)


@pytest.fixture
def make_reward(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., str]:
    def make(**settings: Any) -> str:
        torch.manual_seed(0)
        RewardModel.create(tiny_model_dir, **settings).save_pretrained(tmp_path / "rm")
        return str(tmp_path / "rm")

    return make


def model_scorer(folder: str) -> ModelScorer:
    return ModelScorer("rm", folder, dtype="float32", batch_size=2, device="cpu")


RULES = """
def letters(prompts, completions):
    assert all(isinstance(text, str) for text in [*prompts, *completions])
    return [len(prompt) + len(text) / 100 for prompt, text in zip(prompts, completions)]
def one(prompts, completions):
    return [1.0]
def some(prompts, completions):
    return [None if len(text) % 2 else len(text) for text in completions]
def shifted(prompts, completions, shift):
    return [len(text) + one for text, one in zip(completions, shift)]
def broken(prompts, completions):
    return [float("nan") if "nan" in text else 1 / (len(text) - 1) for text in completions]
"""


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "score_rules.py").write_text(RULES, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "score_rules"


def test_equal_answers_are_set_aside_as_in_training() -> None:
    problems: list[FieldError] = []
    assert score_row({"prompt": "cat", "chosen": "an", "rejected": "an"}, problems) is None
    assert [(problem.field, problem.reason) for problem in problems] == [("chosen", "equal to rejected")]


def test_a_rule_reads_text(rules: str) -> None:
    """Of messages, the last user turn (3 letters) and the answer (5): 3.05; of text, what stands there."""
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who"}]
    scorer = RuleScorer("letters", f"{rules}:letters")
    found = scorer.score([row({"prompt": talk, "completion": "cat i"}), row({"prompt": "ab", "completion": "c"})])
    assert found.columns == [{"letters_completion": 3.05}, {"letters_completion": 2.01}]
    assert len(scorer.identity["code"] or "") == 64


def test_what_a_rule_gets_wrong_is_told(rules: str) -> None:
    two = [row(fields) for fields in PAIRS[:2]]
    with pytest.raises(FieldError, match="one: the rule gave 1 numbers for 4 answers"):
        RuleScorer("one", f"{rules}:one").score(two)
    broken = RuleScorer("broken", f"{rules}:broken")
    with pytest.raises(FieldError, match="broken: nan: not a finite number"):
        broken.score([row({"prompt": "p", "completion": "nan"})])
    with pytest.raises(FieldError, match="the rule fails: ZeroDivisionError"):
        broken.score([row({"prompt": "p", "completions": ["ab", "a"]})])
    with pytest.raises(ConfigError, match="did you mean score_rules:letters"):
        RuleScorer("letters", f"{rules}:leters")


def test_a_reward_model_scores_every_answer(make_reward: Callable[..., str]) -> None:
    """The columns are what the model says of the same answers alone, one by one."""
    folder = make_reward()
    scorer = model_scorer(folder)
    columns = scorer.score([row(fields) for fields in PAIRS]).columns
    model = RewardModel.from_pretrained(folder, dtype=torch.float32)
    for fields, found in zip(PAIRS, columns, strict=True):
        for name in ("chosen", "rejected"):
            alone = model.rewards([fields["prompt"]], [fields[name]])
            assert found[f"rm_{name}"] == pytest.approx(float(alone), abs=1e-5)
    answers = [PAIRS[0]["chosen"], PAIRS[0]["rejected"]]
    both = pytest.approx([columns[0]["rm_chosen"], columns[0]["rm_rejected"]])
    assert scorer.reward([PAIRS[0]["prompt"]] * 2, answers) == both


def test_attributes_have_columns_of_their_own(make_reward: Callable[..., str]) -> None:
    """The reward is the weighted sum: 2 helpful - 1 verbose."""
    folder = make_reward(kind="attributes", attributes=["helpful", "verbose"], ranking={"helpful": 2, "verbose": -1})
    (found,) = model_scorer(folder).score([row({"prompt": "cat", "completion": " an ant"})]).columns
    assert set(found) == {"rm_completion", "rm_helpful_completion", "rm_verbose_completion"}
    assert found["rm_completion"] == pytest.approx(
        2 * found["rm_helpful_completion"] - found["rm_verbose_completion"], abs=1e-5
    )


def test_a_gpm_compares(make_reward: Callable[..., str]) -> None:
    """A pair has log-odds; of three answers each has its mean against the others: what GRPO is rewarded with."""
    scorer = model_scorer(make_reward(kind="gpm", dimension=4))
    pair, several = scorer.score([row(PAIRS[0]), row({"prompt": "cat", "completions": ["a", "b", "c"]})]).columns
    swapped = {"prompt": PAIRS[0]["prompt"], "chosen": PAIRS[0]["rejected"], "rejected": PAIRS[0]["chosen"]}
    (other,) = scorer.score([row(swapped)]).columns
    assert pair["rm"] == pytest.approx(-other["rm"], abs=1e-5)
    assert several["rm_completions"] == pytest.approx(scorer.reward(["cat"] * 3, ["a", "b", "c"]), abs=1e-5)
    assert sum(several["rm_completions"]) == pytest.approx(0, abs=1e-5)
    ((p,),) = [scorer.model.preference(*([PAIRS[0][name]] for name in ("prompt", "chosen", "rejected")))]
    assert pair["rm"] == pytest.approx(float(p.logit()), abs=1e-4)
    with pytest.raises(FieldError, match="a gpm compares answers"):
        scorer.score([row({"prompt": "cat", "completion": "a"})])


def test_answers_that_are_cut_are_counted(make_reward: Callable[..., str]) -> None:
    scorer = model_scorer(make_reward(max_length=12))
    found = scorer.score([row({"prompt": "ab", "completions": ["c", "d" * 40]})])
    assert found.cut == 1
    with pytest.raises(ValueError, match="leaves no room"):
        scorer.score([row({"prompt": "x" * 30, "completion": "c"})])


@pytest.mark.parametrize("shared", [True, False])
def test_logps_are_those_of_the_model(policy: Policy, shared: bool) -> None:
    """Each token's log-prob from the logits of its own row, prompt and answer as training tokenises them."""
    scorer = PolicyScorer({"logps": "logps"}, policy)
    scorer.shared = shared
    columns = scorer.score([row(fields) for fields in PAIRS]).columns
    model, tokenizer = policy.loaded.model, policy.loaded.tokenizer
    for fields, found in zip(PAIRS, columns, strict=True):
        pair = tokenize_pair(**fields, tokenizer=tokenizer, max_length=64)
        for name, answer in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            ids = torch.tensor([pair.prompt_ids + answer])
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            tokens = logps.gather(1, ids[0, 1:, None])[-len(answer) :, 0]
            assert found[f"logps_{name}"] == pytest.approx(float(tokens.sum()), rel=1e-5)
            assert found[f"logps_tokens_{name}"] == len(answer)


def test_logps_of_single_answers_and_too_long_ones(policy: Policy) -> None:
    """Rows of several kinds meet in one batch; a prompt over the limit is a fault that names the option."""
    scorer = PolicyScorer({"logps": "logps"}, policy)
    mixed = [row(PAIRS[0]), row({"prompt": "cat", "completions": [" a", "b" * 90]}), row({"prompt": "alone"})]
    pair, several, alone = scorer.score(mixed).columns
    together = scorer.score([row(PAIRS[0])]).columns[0]
    assert pair["logps_chosen"] == pytest.approx(together["logps_chosen"], rel=1e-5)
    assert several["logps_tokens_completions"][1] == 64 - 3
    assert scorer.score(mixed).cut == 1
    assert alone == {}
    with pytest.raises(FieldError, match="over --max-length 64"):
        scorer.score([row({"prompt": "x" * 80, "completion": "c"})])


def test_references_are_quantiles_of_the_models_own_answers(policy: Policy, rules: str) -> None:
    """The same prompt has the same reference, whatever stands beside it; a higher quantile is higher."""
    letters = RuleScorer("letters", f"{rules}:letters")
    rows = [row(fields) for fields in (*PAIRS, {"prompt": "cat"})]

    def references(quantile: float, *of: ScoreRow) -> list[float]:
        scorer = SampledReferences([letters], policy, quantile, Draws(samples=8, max_new_tokens=6, seed=1))
        return [columns["letters_reference"] for columns in scorer.score(of).columns]

    high = references(0.9, *rows)
    assert high[2] == high[3]
    assert references(0.9, rows[1]) == [high[1]]
    assert all(low < top for low, top in zip(references(0.1, *rows), high, strict=True))
    assert int(high[0]) == len(PAIRS[0]["prompt"])  # the rule's whole part: the answers were to this prompt
    with pytest.raises(FieldError, match="are more than --max-length 64"):
        references(0.5, row({"prompt": "x" * 60}))


def test_a_rule_gives_nulls_and_reads_columns(rules: str) -> None:
    """An answer of 4 letters has a reward, one of 3 has none; a row without the column is a fault of its own."""
    some = RuleScorer("some", f"{rules}:some")
    found = some.score([row({"prompt": "p", "completions": [" ant", "cat"]})]).columns
    assert found == [{"some_completions": [4.0, None]}]
    shifted = RuleScorer("shifted", f"{rules}:shifted")
    fields = {"prompt": "p", "chosen": "ab", "rejected": "c", "shift": 10}
    assert shifted.score([row(fields)]).columns == [{"shifted_chosen": 12.0, "shifted_rejected": 11.0}]
    del fields["shift"]
    with pytest.raises(FieldError, match="asks for column shift"):
        shifted.score([row(fields)])


def test_what_has_no_reward_is_left_out_of_references_and_counted(policy: Policy, rules: str) -> None:
    """Of the answers drawn, those of even length have a reward: the median is of these, and the others are counted."""
    some, draws = RuleScorer("some", f"{rules}:some"), Draws(samples=12, max_new_tokens=3, seed=3)
    found = SampledReferences([some], policy, 0.5, draws).score([row({"prompt": "cat"})])
    rewards = drawn_rewards("cat", {"some": some.reward}, policy.loaded.model, policy.loaded.tokenizer, draws)["some"]
    there = [reward for reward in rewards if reward is not None]
    assert found.left_out == 12 - len(there) > 0
    assert found.columns[0]["some_reference"] == torch.tensor(there, dtype=torch.float64).quantile(0.5)


def test_a_row_with_a_reward_and_no_reference_is_set_aside(policy: Policy, rules: str) -> None:
    """The rule says nothing of answers of odd length: of "No." and of the one token drawn, never of " ant"."""
    some = RuleScorer("some", f"{rules}:some")
    odd = {"completion": "cat"}, {}
    for made, lack in (
        (CannedReferences([some], "No."), "the canned answer has none: name another"),
        (SampledReferences([some], policy, 0.5, Draws(2, 1, seed=2)), "none of the 2 reference answers has a reward"),
    ):
        assert [made.score([row({"prompt": "cat", **one})]).columns for one in odd] == [[{"some_reference": None}]] * 2
        for answers in ({"completion": " ant"}, {"completions": ["cat", " ant"]}):
            with pytest.raises(FieldError, match=f"some_reference: an answer of the row has a reward, and {lack}"):
                made.score([row({"prompt": "cat", **answers})])


def test_references_by_a_canned_answer_and_by_regression(policy: Policy, rules: str, tmp_path: Path) -> None:
    """Letters of the prompt + .02 for "No"; predicted, they lie between; a row without the column is left out."""
    letters = RuleScorer("letters", f"{rules}:letters")
    rows = [row(fields) for fields in PAIRS]
    canned = CannedReferences([letters], "No").score(rows).columns
    assert [columns["letters_reference"] for columns in canned] == [15.02, 8.02, 3.02]
    source = tmp_path / "some.jsonl"
    known = [*canned, {"letters_reference": None}]
    prompts = [fields["prompt"] for fields in PAIRS] + ["dog"]
    lines = [json.dumps({"prompt": prompt, **one}) for prompt, one in zip(prompts, known, strict=True)]
    source.write_text("\n".join(lines), encoding="utf-8")
    scorer = PredictedReferences([letters], policy, str(source))
    (fitted,) = scorer.fitted.values()
    assert fitted.prompts == 3
    predicted = [columns["letters_reference"] for columns in scorer.score(rows).columns]
    assert all(3 < one < 15.02 for one in predicted)
    assert scorer.score(rows[1:2]).columns[0]["letters_reference"] == pytest.approx(predicted[1], abs=1e-4)
    with pytest.raises(AlignError, match="no row has a prompt and other_reference"):
        PredictedReferences([RuleScorer("other", f"{rules}:letters")], policy, str(source))


def test_names_of_columns() -> None:
    named = named_specs(["a.b:rule", "runs/bt/model", "runs/other", "logps", "mine=a.b:rule"])
    assert named == {
        "rule": "a.b:rule",
        "bt": "runs/bt/model",
        "other": "runs/other",
        "logps": "logps",
        "mine": "a.b:rule",
    }
    with pytest.raises(ConfigError, match="a column rule already; write NAME=c:rule"):
        named_specs(["a:rule", "c:rule"])
    for given in ("runs/v1.5", "runs/pal@mix:0.3:0.7", "runs/pal@annotator:eve@home"):
        with pytest.raises(
            ConfigError, match=f"is no name for a column; write NAME={given}, of letters, digits and _"
        ):
            named_specs([given])
    for given in ("CHES", "mine=CHES", "chess"):
        with pytest.raises(ConfigError, match=rf"{given}': did you mean ches\?"):
            named_specs([given])
    with pytest.raises(ConfigError, match="name what is to be added"):
        named_specs([])


def test_where_a_reward_model_is(make_reward: Callable[..., str], tmp_path: Path, tiny_model_dir: Path) -> None:
    """Its folder, or the run that holds it; a language model is none."""
    folder = Path(make_reward())
    assert reward_folder(str(folder)) == str(folder)
    folder.rename(tmp_path / "model")
    assert reward_folder(str(tmp_path)) == str(tmp_path / "model")
    assert reward_folder("a.b:rule") is None
    with pytest.raises(AlignError, match="holds no reward model"):
        reward_folder(str(tiny_model_dir))


def test_the_command(
    align: Callable[..., Any], make_reward: Callable[..., str], tiny_model_dir: Path, tmp_path: Path, rules: str
) -> None:
    """Several rewards and references in one pass; what is missing is told before anything is loaded."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(fields) + "\n" for fields in PAIRS), encoding="utf-8")
    words = ["score", source, "--with", f"{rules}:letters,{make_reward()}", "--with", "logps", "--output", output]
    options = ["--model", tiny_model_dir, "--reference-quantile", 0.85, "--samples", 4, "--max-new-tokens", 5]
    done = align(*words, *options, "--dtype", "float32")
    assert done.exit_code == 0, done.output
    assert "3 of 3 rows scored · 0 set aside" in done.stdout
    first = json.loads(output.read_text(encoding="utf-8").splitlines()[0])
    made = {f"{name}_{side}" for name in ("letters", "rm", "logps", "logps_tokens") for side in ("chosen", "rejected")}
    assert set(first) - set(PAIRS[0]) == made | {"row_id", "letters_reference", "rm_reference"}
    again = align(
        *words[:4], "--with", "logps", "-o", tmp_path / "c.jsonl", "-m", tiny_model_dir, "--reference-canned", "No"
    )
    assert again.exit_code == 0, again.output
    first = json.loads((tmp_path / "c.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["letters_reference"] == 15.02
    gpm = make_reward(kind="gpm", dimension=2)
    refused = align("score", source, "--with", f"{rules}:letters,{gpm}", "--reference-canned", "No", "-o", "x.jsonl")
    assert refused.exit_code == 2
    assert "is a gpm, which compares answers and has no reference" in refused.stderr
    missing = align(*words)
    assert missing.exit_code == 2
    assert "--model  is missing: logps needs it" in missing.stderr
    wrong = align("score", source, "--with", "logps", "--output", source, "--reference-quantile", 1, "--dtype", "int8")
    assert wrong.exit_code == 2
    assert all(word in wrong.stderr for word in ("3 problems", "is the data itself", "'int8'", "between 0 and 1"))
