"""The manifest: what stands in it, and what must not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from align.tracking.manifest import git_state, run_facts, without_secrets


def test_secrets_leave_the_command():
    typed = [
        *(
            "align",
            "train",
            "a.yaml",
            "training.hub_token=abc",
            "--token",
            "abc",
            "--api-key=xyz",
            "data.max_length=256",
        ),
        *("https://me:pw@host/x", "hf_" + "a" * 30, "model=sk-" + "b" * 20),
    ]
    clean = without_secrets(typed)
    assert clean == [
        *(
            "align",
            "train",
            "a.yaml",
            "training.hub_token=***",
            "--token",
            "***",
            "--api-key=***",
            "data.max_length=256",
        ),
        *("https://***@host/x", "***", "model=***"),
    ]


def test_git_state_inside_and_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) is None
    assert git_state(tmp_path / "missing") is None
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "file"], [*identity, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    state = git_state(tmp_path)
    assert state is not None
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (tmp_path / "untracked").write_text("a run")
    assert git_state(tmp_path) == state
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path) == {**state, "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None


def test_run_facts_are_json_and_name_this_machine():
    facts = json.loads(json.dumps(run_facts(["align", "train", "quickstart"], seed=7)))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["hardware"]["cores"] >= 1
    assert facts["hardware"]["ram_gb"] > 0.5
    assert facts["seed"] == 7


def test_telemetry_is_off_before_and_after_the_libraries_are_imported():
    """One process calls it first, one after the import that reads the flag; both must end with it off."""
    call = "from align.tracking.telemetry import disable_telemetry; disable_telemetry()"
    load = "import huggingface_hub.constants as c"
    clean = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_TELEMETRY"}
    for lines in ([call, load], [load, "assert not c.HF_HUB_DISABLE_TELEMETRY", call]):
        flags = "c.HF_HUB_DISABLE_TELEMETRY, e['DO_NOT_TRACK'], e['WANDB_ERROR_REPORTING']"
        check = f"from os import environ as e; print({flags})"
        code = "\n".join([*lines, check])
        # DO_NOT_TRACK alone also switches the constant off, so it must not come from outside.
        env = {name: value for name, value in clean.items() if name != "DO_NOT_TRACK"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["True", "1", "false"]
