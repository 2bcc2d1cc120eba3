"""The README's Python runs as it stands, and its recipe is one that the loader takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from typer.testing import CliRunner

from align.cli import app
from align.config.load import load_recipe
from align.losses import LOSSES
from align.reports.methods import reference_of

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[0])
def test_python_runs(code, tmp_path, monkeypatch, tiny_tokenizer, make_tiny_model):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("align.losses.catalogue.LOSSES", dict(LOSSES))
    rows = [{"prompt": "the inner", "chosen": " thing", "rejected": " cat"}] * 4
    thumbs = [
        {"prompt": prompt, "completion": " thing", "label": label}
        for prompt, label in (("the inner", True), ("an ant", False), ("there", True), ("a hint", False))
    ]
    page = {"model": make_tiny_model(), "tokenizer": tiny_tokenizer}
    page |= {"dataset": Dataset.from_list(rows), "thumbs": Dataset.from_list(thumbs)}
    exec(code, page)
    assert len(blocks("python")) == 7
    assert "answer" not in page or page["answer"].valid
    assert "trainer" not in page or page["trainer"].state.global_step == 2


def test_the_command_of_transfer_q_runs(tiny_model_dir):
    """The model and the quickstart's run are a tiny model here, the answer short; on vLLM it is the same one."""
    texts = re.findall(r"^align generate[^`]*--transfer-q[^`]*", README, re.MULTILINE)
    words, on_vllm = (shlex.split(text.replace("\\\n", " ")) for text in texts)
    assert on_vllm == [*words, "--engine", "vllm"]
    assert words[words.index("--transfer-q") + 1] == load_recipe("quickstart").output
    stand_ins = {"smollm2-135m-instruct": str(tiny_model_dir), "runs/quickstart": f"{tiny_model_dir}/"}
    result = CliRunner().invoke(app, [*(stand_ins.get(word, word) for word in words[1:]), "--max-new-tokens", "4"])
    assert result.exit_code == 0, result.stderr
    assert re.search(r"reward [\d.e-]+ · steps \d", result.stderr)


def test_the_recipe_is_valid(tmp_path):
    (text,) = blocks("yaml")
    pairs = ("pairs.jsonl", "heldout.jsonl")
    for name in pairs:
        (tmp_path / name).write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    recipe = yaml.safe_load(text)
    recipe["data"] |= {"train": str(tmp_path / pairs[0]), "eval": str(tmp_path / pairs[1])}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert load_recipe(str(tmp_path / "mine.yaml")).method == "ln_dpo"


def test_nothing_is_left_to_fill_in_and_links_lead_somewhere():
    assert "@@" not in README
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (root / target).exists(), target


def test_every_method_of_a_recipe_has_its_row():
    """Losses on pairs and on thumbs, with the right word on the reference; the rest is on the page of methods."""
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([\w ]+) \|$", README, re.MULTILINE))
    assert rows == {name: reference_of(info) for name, info in LOSSES.items() if info.kind in ("pair", "thumbs")}
