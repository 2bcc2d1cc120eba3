"""Every private attribute of TRL that the pair trainer touches: an upgrade fails here, not in a run."""

from __future__ import annotations

import inspect
from importlib.metadata import version

import pytest
from packaging.version import Version
from trl import DPOConfig, DPOTrainer
from trl.trainer import utils

OVERRIDDEN = {
    "_prepare_dataset": ["self", "dataset", "processing_class", "args", "dataset_name"],
    "_set_signature_columns_if_needed": ["self"],
    "_precompute_ref_logps": ["self", "dataset", "name", "batch_size"],
    "_compute_loss": ["self", "model", "inputs", "return_outputs"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "create_model_card": ["self", "model_name", "dataset_name", "tags"],
    "log": ["self", "logs", "start_time"],
    "training_step": ["self", "args", "kwargs"],
}
SET_IN_INIT = [
    "self._metrics",
    "self._total_train_tokens",
    "self._tokenizer",
    "self.ref_model",
    "self.aux_loss_enabled",
]
ARGUMENTS = [
    "beta",
    "loss_type",
    "loss_weights",
    "label_smoothing",
    "ld_alpha",
    "use_weighting",
    "f_divergence_type",
    "precompute_ref_log_probs",
    "padding_free",
    "truncation_mode",
    "max_length",
]


def test_version():
    assert Version("1.16") <= Version(version("trl")) < Version("1.17")


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_methods_have_the_signature_that_we_override(name):
    assert list(inspect.signature(getattr(DPOTrainer, name)).parameters) == OVERRIDDEN[name]


def test_attributes_are_set_where_we_read_them():
    source = inspect.getsource(DPOTrainer.__init__)
    assert [name for name in SET_IN_INIT if f"{name} =" not in source] == []
    assert "self._signature_columns" in inspect.getsource(DPOTrainer._set_signature_columns_if_needed)


def test_the_loss_goes_through_the_method_that_we_override():
    assert "self._compute_loss(model, inputs, return_outputs)" in inspect.getsource(DPOTrainer.compute_loss)
    assert "self.compute_loss(" in inspect.getsource(DPOTrainer.prediction_step)


def test_metrics_are_averaged_by_log():
    assert "self._metrics[mode]" in inspect.getsource(DPOTrainer.log)


def test_the_arguments_that_are_refused_exist_with_the_defaults_that_mean_off():
    from align.trainers.pair import _NOT_TAKEN

    config = DPOConfig("unused", use_cpu=True, bf16=False)
    for name in ARGUMENTS:
        assert hasattr(config, name)
    for name, off, _ in _NOT_TAKEN:
        assert getattr(config, name) == off


def test_adapter_context():
    assert list(inspect.signature(utils.use_adapter).parameters) == ["model", "adapter_name"]
