"""Every private attribute of TRL and transformers that the trainers touch: an upgrade fails here, not in a run."""

from __future__ import annotations

import inspect
from importlib.metadata import version

import pytest
from packaging.version import Version
from transformers import Trainer
from transformers.trainer_callback import CallbackHandler
from trl import DPOConfig, DPOTrainer, GRPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.trainer import utils

HOSTS = (DPOTrainer, KTOTrainer)
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
# By trainers whose batches may have rows of like lengths.
OVERRIDDEN_FOR_LENGTHS = {
    "_get_train_sampler": ["self", "train_dataset"],
    "_get_eval_sampler": ["self", "eval_dataset"],
}
# By the thumbs trainer alone, for BCO's shift and prompt weights.
OVERRIDDEN_FOR_THUMBS = {
    "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_best_model": ["self"],
    "train": ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
}
CALLED_FOR_THUMBS = {"_get_output_dir": ["self", "trial"], "_prepare_inputs": ["self", "inputs"]}
# By the reward trainer, whose model is no PreTrainedModel: what a checkpoint holds is its own.
OVERRIDDEN_FOR_REWARDS = {
    "_prepare_dataset": ["self", "dataset", "processing_class", "args", "dataset_name"],
    "_set_signature_columns_if_needed": ["self"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "_save": ["self", "output_dir", "state_dict"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_best_model": ["self"],
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
    "precompute_ref_batch_size",
    "sync_ref_model",
    "padding_free",
    "truncation_mode",
    "max_length",
]
KTO_ARGUMENTS = [
    "beta",
    "loss_type",
    "desirable_weight",
    "undesirable_weight",
    "precompute_ref_log_probs",
    "train_sampling_strategy",
    "max_length",
]


def test_version():
    assert Version("1.16") <= Version(version("trl")) < Version("1.17")


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_methods_have_the_signature_that_we_override(host, name):
    assert list(inspect.signature(getattr(host, name)).parameters) == OVERRIDDEN[name]


@pytest.mark.parametrize("host", [DPOTrainer, RewardTrainer])
@pytest.mark.parametrize("name", OVERRIDDEN_FOR_LENGTHS)
def test_methods_that_choose_the_sampler(host, name):
    assert list(inspect.signature(getattr(host, name)).parameters) == OVERRIDDEN_FOR_LENGTHS[name]


def test_an_epoch_begins_before_its_loader_is_asked_and_is_counted_by_steps():
    """Where a run resumes, and what the callback that tells the sampler its epoch relies on."""
    loop = inspect.getsource(Trainer._inner_training_loop)
    assert loop.index("callback_handler.on_epoch_begin") < loop.index("self._run_epoch(")
    assert "self.state.global_step // num_update_steps_per_epoch" in inspect.getsource(Trainer._init_training_state)
    assert "train_dataloader=self.train_dataloader" in inspect.getsource(CallbackHandler.call_event)


@pytest.mark.parametrize("name", [*OVERRIDDEN_FOR_THUMBS, *CALLED_FOR_THUMBS])
def test_methods_that_the_thumbs_trainer_extends_or_calls(name):
    wanted = {**OVERRIDDEN_FOR_THUMBS, **CALLED_FOR_THUMBS}[name]
    assert list(inspect.signature(getattr(KTOTrainer, name)).parameters) == wanted


@pytest.mark.parametrize("name", OVERRIDDEN_FOR_REWARDS)
def test_methods_that_the_reward_trainer_overrides(name):
    assert list(inspect.signature(getattr(RewardTrainer, name)).parameters) == OVERRIDDEN_FOR_REWARDS[name]


def test_the_reward_trainers_attributes_are_set_where_we_read_them():
    source = inspect.getsource(RewardTrainer.__init__)
    assert [name for name in ("self._metrics", "self._total_train_tokens") if f"{name} =" not in source] == []
    assert "self._signature_columns" in inspect.getsource(RewardTrainer._set_signature_columns_if_needed)
    assert "num_labels" in source  # it insists on one; the host says one
    fields = {"center_rewards_coefficient", "pad_to_multiple_of", "max_length"}
    assert fields <= RewardConfig.__dataclass_fields__.keys()


@pytest.mark.parametrize("host", HOSTS)
def test_attributes_are_set_where_we_read_them(host):
    source = inspect.getsource(host.__init__)
    assert [name for name in SET_IN_INIT if f"{name} =" not in source] == []
    assert "self._signature_columns" in inspect.getsource(host._set_signature_columns_if_needed)


def test_trls_own_log_probs_of_the_reference_are_switched_off_by_an_attribute():
    assert "self.precompute_ref_logps =" in inspect.getsource(DPOTrainer.__init__)
    assert "if self.precompute_ref_logps:" in inspect.getsource(DPOTrainer.evaluate)


@pytest.mark.parametrize("host", HOSTS)
def test_the_loss_goes_through_the_method_that_we_override(host):
    assert "self._compute_loss(model, inputs, return_outputs)" in inspect.getsource(host.compute_loss)
    assert "self.compute_loss(" in inspect.getsource(host.prediction_step)


@pytest.mark.parametrize("host", HOSTS)
def test_metrics_are_averaged_by_log(host):
    assert "self._metrics[mode]" in inspect.getsource(host.log)


def test_the_arguments_that_are_refused_exist_with_the_defaults_that_mean_off():
    from align.trainers.pair import _NOT_TAKEN

    config = DPOConfig("unused", use_cpu=True, bf16=False)
    for name in ARGUMENTS:
        assert hasattr(config, name)
    for name, off, _ in _NOT_TAKEN:
        assert getattr(config, name) == off


def test_the_same_for_thumbs():
    from align.trainers.thumbs import _NOT_TAKEN

    config = KTOConfig("unused", use_cpu=True, bf16=False)
    for name in KTO_ARGUMENTS:
        assert hasattr(config, name)
    for name, off, _ in _NOT_TAKEN:
        assert getattr(config, name) == off
    assert config.train_sampling_strategy == "sequential"


def test_the_type_of_loss_that_frees_bco_of_mismatched_answers():
    """``apo_zero_unpaired`` makes no KL rows, and with it goes the rule of batches of two in order."""
    source = inspect.getsource(KTOTrainer.__init__)
    assert 'calculate_kl = args.loss_type not in ["apo_zero_unpaired"]' in source
    assert "if self.calculate_KL and args.per_device_train_batch_size <= 1" in source
    assert 'if self.calculate_KL and args.train_sampling_strategy != "sequential"' in source


def test_the_batches_of_a_step_come_through_one_method_before_the_first_is_trained_on():
    loop = inspect.getsource(Trainer._run_epoch)
    assert loop.index("self.get_batch_samples(") < loop.index("self.training_step(")


def test_a_checkpoint_is_written_where_the_shift_is_and_its_state_last():
    source = inspect.getsource(Trainer._save_checkpoint)
    assert 'f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"' in source
    assert "self._get_output_dir(trial=trial)" in source
    assert source.index("self.save_model(") < source.index("self.state.save_to_json(")


def test_adapter_context():
    assert list(inspect.signature(utils.use_adapter).parameters) == ["model", "adapter_name"]


def test_the_log_probs_of_grpo_come_from_the_method_that_we_override():
    """Called by name for the policy and the reference alike; the first arguments are those that we read."""
    names = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    kept = ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"]
    assert names[:8] == [*kept, "compute_aux_loss"]
    for method in (GRPOTrainer._compute_loss, GRPOTrainer._generate_and_score_completions):
        assert "self._get_per_token_logps_and_entropies(" in inspect.getsource(method)
    source = inspect.getsource(GRPOTrainer.__init__)
    assert [
        name
        for name in ("_metrics", "_tokenizer", "_entropy_bonus_enabled", "_total_train_tokens", "ref_model")
        if f"self.{name} =" not in source
    ] == []
    assert "num_input_tokens_seen" in inspect.getsource(GRPOTrainer._generate)


def test_what_grpo_gives_reward_functions():
    source = inspect.getsource(GRPOTrainer._calculate_rewards)
    assert 'reward_kwargs["log_metric"] = self._log_metric' in source
    assert "prompts=prompts, completions=completions, completion_ids=completion_ids_list, **reward_kwargs" in source
