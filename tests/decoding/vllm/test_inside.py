"""``align generate --engine vllm``, in the session's engine: the answers of ``--engine transformers``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from align import inside
from align.cli import app
from align.decoding.engines.vllm import VLLMEngine

Align = Callable[..., Result]


@pytest.fixture
def align(engine: VLLMEngine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Align:
    """The command on the tiny model, in float32, which is what the engine has."""
    monkeypatch.setattr(inside, "start", lambda what: engine)
    monkeypatch.setattr("align.models.hardware.has_bf16_cpu", lambda: False)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def call(*more: object) -> Result:
        command = ["generate", "--model", folder, "--max-new-tokens", 12, "--raw", *more]
        return CliRunner().invoke(app, [str(one) for one in command])

    return call


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_prompt_under_a_constraint(align: Align) -> None:
    asked = ("-p", "a b ab", "--constraint", "regex:(a|bb)*ab", "--particles", 5, "--seed", 3)
    inner, outer = align(*asked, "--engine", "vllm"), align(*asked)
    assert inner.exit_code == 0, inner.output
    assert inner.stdout == outer.stdout
    assert inner.stdout.endswith("ab\n")
    assert "5 particles" in inner.stderr


def test_one_prompt_without(align: Align) -> None:
    greedy = ("-p", "a b ab", "--temperature", 0)
    inner, outer = align(*greedy, "--engine", "vllm"), align(*greedy)
    assert inner.exit_code == 0, inner.output
    assert inner.stdout.split() == outer.stdout.split()
    drawn = [align("-p", "a b ab", "--engine", "vllm", "--seed", seed).stdout for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_files(align: Align, tmp_path: Path) -> None:
    """Constraints of rows of every kind, a reward, and neither; a row that fails, and the same command again."""
    (tmp_path / "words.txt").write_text("abab\nbab\n")
    specs = ["regex:[ab]{3}", f"words:{tmp_path / 'words.txt'}", "regex:c", "python:vllm_predicates:one_b", "regex:("]
    rows = [{"prompt": "a b", "must": spec} for spec in specs]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    under = ("--constraint-field", "must", "--constraint-timeout", 20)
    guided = ("--constraint", "regex:[ab]{2,}", "--reward", "vllm_predicates:shortness", "--reward-every", 2)
    for number, control in enumerate([under, guided]):
        found = []
        for engine in ("vllm", "transformers"):
            output = tmp_path / f"{number}-{engine}.jsonl"
            result = align("-i", source, "-o", output, *control, "--particles", 4, "--engine", engine)
            assert result.exit_code == 0, result.output
            found.append(rows_of(output))
            assert [row["settings"].get("engine") for row in found[-1]] == [{"vllm": "vllm"}.get(engine)] * 5
        for one, other in zip(*found, strict=True):
            assert (one["completion"], one["valid"]) == (other["completion"], other["valid"])
            assert one["log_normaliser"] == pytest.approx(other["log_normaliser"], abs=1e-4)
            assert one["reason"] == other["reason"]
        assert sum(row["valid"] for row in found[0]) == (3, 5)[number]

    output = tmp_path / "plain.jsonl"
    for _ in range(2):
        result = align("-i", source, "-o", output, "--engine", "vllm")
        assert result.exit_code == 0, result.output
        plain = rows_of(output)
    assert [row["row"] for row in plain] == [1, 2, 3, 4, 5]
    assert len({row["completion"] for row in plain}) > 1
    again = tmp_path / "again.jsonl"
    align("-i", source, "-o", again, "--engine", "vllm")
    assert rows_of(again) == plain
    result = align("-i", source, "-o", output)
    assert result.exit_code == 1, "answers of another engine are others"


def test_several_answers_a_prompt(align: Align, tmp_path: Path) -> None:
    """The first of several is the one that stands alone; a prompt that is listed twice shares none of its own."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("a b", "b", "a b")))
    one, several = tmp_path / "one.jsonl", tmp_path / "several.jsonl"
    for output, more in ((one, ()), (several, ("--n", 4))):
        drawn = ("--engine", "vllm", "--temperature", 1, "--max-new-tokens", 24)
        result = align("-i", source, "-o", output, *drawn, *more)
        assert result.exit_code == 0, result.output
    rows = rows_of(several)
    assert [row["completions"][0] for row in rows] == [row["completion"] for row in rows_of(one)]
    assert len({tuple(ids) for row in rows for ids in row["completion_ids"]}) == 12
