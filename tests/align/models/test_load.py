"""Models by name, and what is said where a name does not lead to one."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForMaskedLM

from align.errors import AlignError
from align.models import hardware
from align.models.fingerprint import weights_hash
from align.models.load import load_model, load_run, load_tokenizer


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
