"""The model card: front matter that the hub reads, numbers as measured, and nothing that was not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from align.reports.card import write_card


def parts(card: Path) -> tuple[dict[str, object], str]:
    _, front, body = card.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


def edit_manifest(run: Path, **changes: object) -> None:
    path = run / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_card_of_a_finished_run(finished_run):
    front, body = parts(write_card(finished_run))
    assert front == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["align", "preference-alignment", "ln_dpo", "lora"],
    }
    win = json.loads((finished_run / "eval" / "generation.json").read_text())["metrics"]["win_rate"]
    assert (
        f"| Win rate against the model before training | {100 * win['value']:.1f} % "
        f"| {100 * win['low']:.1f} to {100 * win['high']:.1f} | 40 |" in body
    )
    assert "| Largest fall of a chosen answer |" in body
    assert "[arXiv:2407.15229](https://arxiv.org/abs/2407.15229)" in body
    assert "align train runs/quickstart/config.resolved.yaml output=runs/quickstart-again" in body
    assert "not by people" in body
    assert "\n\n\n" not in body


def test_names_on_the_hub_are_linked_and_others_are_not_guessed(finished_run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "sft").mkdir()
    data = {"train": {"source": "acme/pairs", "rows": 2}, "eval": {"source": "data/heldout.jsonl", "rows": 2}}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "heldout.jsonl").touch()
    edit_manifest(finished_run, model={"name": "acme/base-7b"}, data=data)
    front, _ = parts(write_card(finished_run))
    assert front["base_model"] == "acme/base-7b"
    assert front["datasets"] == ["acme/pairs"]
    edit_manifest(finished_run, model={"name": "runs/sft"})
    assert "base_model" not in parts(write_card(finished_run))[0]
    edit_manifest(finished_run, model={"name": "mini", "base_model": "acme/mini", "license": "apache-2.0"})
    front, _ = parts(write_card(finished_run))
    assert (front["base_model"], front["license"]) == ("acme/mini", "apache-2.0")


def test_a_run_without_evaluations_claims_nothing(make_run):
    _, body = parts(write_card(make_run()))
    assert "This run did not finish (status: interrupted)." in body
    assert "Nothing was evaluated." in body
    assert "The run left no weights." in body
    assert "%" not in body
    assert "not by people" not in body


def test_the_snippet_runs_on_the_saved_model(make_run, make_tiny_model, tiny_tokenizer, monkeypatch, tmp_path, capsys):
    """The code in the card is executed as it stands, against a LoRA adapter in the folder that it names."""
    from peft import LoraConfig, get_peft_model

    run = make_run("method: ln_dpo\nmodel: {name: base}\noutput: bare\ngeneration: {max_new_tokens: 4}\n", name="bare")
    monkeypatch.chdir(tmp_path)
    make_tiny_model().save_pretrained("base")
    base = type(make_tiny_model()).from_pretrained("base")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")).save_pretrained(
        run / "adapter"
    )
    tiny_tokenizer.save_pretrained(run / "adapter")
    _, body = parts(write_card(run))
    snippets = re.findall(r"```python\n(.*?)```", body, flags=re.DOTALL)
    assert len(snippets) == 1
    assert "apply_chat_template" in snippets[0]
    names: dict[str, object] = {}
    exec(snippets[0], names)
    assert names["answer"].shape[1] - names["inputs"]["input_ids"].shape[1] in range(1, 5)
    assert capsys.readouterr().out
