"""Models by name, and what is said where a name does not lead to one."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, BertConfig, BertForMaskedLM, dynamic_module_utils
from transformers.utils import is_flash_attn_2_available

from align.errors import AlignError
from align.models import hardware, load
from align.models.fingerprint import weights_hash
from align.models.load import Origin, load_model, load_run, load_tokenizer, origin_of


def test_a_local_folder(tiny_model_dir):
    model, reason = load_model(str(tiny_model_dir), dtype="float32")
    assert model.dtype == torch.float32
    assert not model.training
    assert reason == "float32: asked for"
    assert load_tokenizer(str(tiny_model_dir)).pad_token_id is not None


def test_attention_backend_is_taken(tiny_model_dir):
    assert load_model(str(tiny_model_dir), attention="eager")[0].config._attn_implementation == "eager"


def test_a_model_that_is_not_causal(tmp_path):
    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(AlignError, match="BertForMaskedLM is not a causal language model"):
        load_model(str(tmp_path / "bert"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{tmp}", "no config.json in this folder"),
        ("{tmp}/absent", "there is no such folder"),
        ("./absent", "there is no such folder"),
        ("nobody/no-such-model", "neither a packaged model, nor a local folder, nor to be had from the hub"),
    ],
)
def test_names_that_lead_nowhere(tmp_path, name, message):
    with pytest.raises(AlignError, match=message):
        load_model(name.format(tmp=tmp_path))


def test_a_tokenizer_without_an_end(tmp_path, tiny_model_dir):
    folder = tmp_path / "endless"
    shutil.copytree(tiny_model_dir, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(AlignError, match="no EOS token"):
        load_tokenizer(str(folder))


def test_an_adapter_folder_is_loaded_on_its_base(tmp_path, tiny_model_dir):
    base, _ = load_model(str(tiny_model_dir), dtype="float32")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = base(ids).logits
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():
        after = adapted.eval()(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load_run(str(tmp_path / "adapter"), dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, after)
    assert (after - before).abs().max() > 1e-3


def test_a_local_folder_that_fails_says_what_failed_there(tmp_path, tiny_model_dir):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model_dir, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(AlignError, match=r"weights are damaged .*download them again"):
        load_model(str(folder))
    weights.unlink()
    with pytest.raises(AlignError, match=r"this folder cannot be loaded \(OSError: .*model\.safetensors") as caught:
        load_model(str(folder))
    assert "network" not in str(caught.value)


def test_a_package_that_attention_needs(tiny_model_dir):
    if is_flash_attn_2_available():
        pytest.skip("flash-attn is installed")
    with pytest.raises(AlignError, match=r"package that is missing .*FlashAttention2.* set model\.attention: sdpa"):
        load_model(str(tiny_model_dir), attention="flash_attention_2")


@pytest.fixture
def own_code_dir(tmp_path, tiny_model_dir, monkeypatch):
    """The tiny model as an architecture that only the code in its folder knows."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "own-code"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    family = CONFIG_MAPPING[config["model_type"]].__name__.removesuffix("Config")
    (folder / "own.py").write_text(
        f"from transformers import {family}Config, {family}ForCausalLM\n\n"
        f"class OwnConfig({family}Config):\n    model_type = 'own'\n\n"
        f"class OwnForCausalLM({family}ForCausalLM):\n    config_class = OwnConfig\n"
    )
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_with_code_of_its_own(own_code_dir):
    with pytest.raises(AlignError, match=r"set model\.trust_remote_code: true if you trust its code"):
        load_model(str(own_code_dir))


def test_a_run_is_loaded_as_its_recipe_says(tmp_path, own_code_dir):
    run = tmp_path / "run"
    shutil.copytree(own_code_dir, run / "model")
    recipe = f"model: {{name: {own_code_dir}, attention: eager, trust_remote_code: true}}\n"
    (run / "config.resolved.yaml").write_text(recipe)
    base, _ = load_model(str(own_code_dir), trust_remote_code=True)
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(run / "adapter")
    for weights in ("adapter", "model"):
        loaded = load_run(str(run))
        assert hasattr(loaded.model, "peft_config") == (weights == "adapter")
        assert type(loaded.model.config).__name__ == "OwnConfig"
        assert loaded.model.config._attn_implementation == "eager"
        (run / weights).rename(run / f"checkpoint-{len(weights)}")
    for checkpoint, adapted in (("checkpoint-7", True), ("checkpoint-5", False)):
        loaded = load_run(str(run / checkpoint))
        assert hasattr(loaded.model, "peft_config") == adapted
        assert loaded.model.config._attn_implementation == "eager"
        assert origin_of(str(run / checkpoint)) == origin_of(str(run))
    with pytest.raises(AlignError, match="no trained weights yet"):
        load_run(str(run))
    loaded = origin_of(str(run)).load(dtype="float32")
    assert not hasattr(loaded.model, "peft_config")
    assert loaded.model.config._attn_implementation == "eager"


def test_what_a_model_was_trained_from(tmp_path, tiny_model_dir):
    """A run says it in its recipe, with the adapter that it went on from; an adapter in its config."""
    base, _ = load_model(str(tiny_model_dir))
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "first")
    assert origin_of(str(tmp_path / "first")) == Origin(str(tiny_model_dir))
    assert origin_of(str(tiny_model_dir)) is None
    assert origin_of("owner/name") is None
    (tmp_path / "second").mkdir()
    recipe = f"model: {{name: {tiny_model_dir}, adapter: {tmp_path / 'first'}, dtype: float32}}\n"
    (tmp_path / "second" / "config.resolved.yaml").write_text(recipe)
    origin = origin_of(str(tmp_path / "second"))
    assert origin == Origin(str(tiny_model_dir), str(tmp_path / "first"))
    assert origin.dtype == "float32"
    assert hasattr(origin.load(dtype=origin.dtype).model, "peft_config")


def test_the_base_of_an_adapter_may_be_a_packaged_name(tmp_path, tiny_model_dir, monkeypatch):
    base, _ = load_model(str(tiny_model_dir))
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "tiny"}))
    monkeypatch.setattr(load, "packaged_model", lambda name: tiny_model_dir if name == "tiny" else None)
    assert load_run(str(tmp_path)).model.peft_config["default"].base_model_name_or_path == "tiny"


def test_an_adapter_with_damaged_weights(tmp_path, tiny_model_dir):
    base, _ = load_model(str(tiny_model_dir))
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(AlignError, match="weights are damaged"):
        load_run(str(tmp_path))


def test_a_run_that_has_not_finished(tmp_path):
    (tmp_path / "config.resolved.yaml").write_text("model: {name: somewhere}\n")
    with pytest.raises(AlignError, match="no trained weights yet"):
        load_run(str(tmp_path))


def test_weights_hash_tells_values_names_shapes_and_dtypes_apart():
    weight = torch.arange(6.0)
    known = weights_hash([("a", weight), ("b", weight)])
    assert known == weights_hash([("b", weight.clone()), ("a", weight)])
    others = [
        [("a", weight), ("c", weight)],
        [("a", weight), ("b", weight + 1e-6)],
        [("a", weight), ("b", weight.view(2, 3))],
        [("a", weight), ("b", weight.view(torch.int32))],
    ]
    assert len({known, *map(weights_hash, others)}) == 5
    assert len(weights_hash([("a", weight.bfloat16())])) == 64


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [({"amx_bf16": True}, "bfloat16"), ({"avx512_bf16": True}, "bfloat16"), ({"avx2": True}, "float32")],
)
def test_dtype_follows_the_processor(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    chosen, reason = hardware.best_dtype()
    assert str(chosen) == f"torch.{dtype}"
    assert reason.startswith(f"{dtype}: ")
