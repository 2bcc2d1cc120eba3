"""``tracking.integrations``: the trackers of transformers, by one key, for every trainer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from align.config.load import load_recipe
from align.errors import ConfigError
from align.models.load import load_tokenizer
from align.run import train
from align.trainers.build import training_arguments

WRITER = """
import json
from pathlib import Path

class SummaryWriter:
    def __init__(self, log_dir):
        self.path = Path(log_dir)
        self.path.mkdir(parents=True)
    def add_scalar(self, name, value, step):
        with (self.path / "scalars.jsonl").open("a") as file:
            file.write(json.dumps([name, value, step]) + "\\n")
    def add_text(self, name, value, *step): ...
    def add_hparams(self, *given): ...
    def flush(self): ...
    def close(self): ...
"""


@pytest.fixture
def writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for TensorBoard's writer, under the name that transformers looks for second."""
    package = tmp_path / "packages" / "tensorboardX"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(WRITER)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.delitem(sys.modules, "tensorboardX", raising=False)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)


def test_metrics_of_a_run_lie_in_its_folder(write_recipe: Callable[..., Path], writer: None) -> None:
    source = write_recipe(evals=[], generation=None, tracking={"integrations": ["tensorboard"]})
    run = train(load_recipe(str(source)), source="r", command=[])
    (file,) = run.glob("runs/*/scalars.jsonl")
    written = [json.loads(line) for line in file.read_text().splitlines()]
    losses = [(step, value) for name, value, step in written if name == "train/loss"]
    kept = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses == [(row["step"], row["loss"]) for row in kept if "loss" in row]
    assert len(losses) == 6


@pytest.mark.parametrize(
    "name", ["quickstart", "sft", "bco", "kto", "grpo_raw", "reward_bt", "pal_lora", "online_ipo", "gpo_iterated"]
)
def test_every_trainer_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.config.schema.find_spec", lambda package: ModuleSpec(package, None))
    recipe = load_recipe(name, ["tracking.integrations=[tensorboard, mlflow]"])
    arguments = training_arguments(recipe, Path(recipe.output), load_tokenizer(recipe.model.name))
    assert arguments.report_to == ["tensorboard", "mlflow"]
    without = load_recipe(name)
    assert training_arguments(without, Path(recipe.output), load_tokenizer(recipe.model.name)).report_to == []


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded: a package that is missing, one that has a key of its own, a run without a trainer."""

    def refusal(name: str, value: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load_recipe(name, [f"tracking.integrations={value}"])
        return str(caught.value)

    monkeypatch.setattr("align.config.schema.find_spec", lambda package: None)
    assert "needs the package mlflow, which is not installed: pip install mlflow" in refusal("quickstart", "[mlflow]")
    assert "'wandb' is not one of tensorboard, mlflow" in refusal("quickstart", "[wandb]")
    monkeypatch.setattr("align.config.schema.find_spec", lambda package: ModuleSpec(package, None))
    assert "a frozen backbone is not trained by TRL" in refusal("pal", "[tensorboard]")
