"""What is served, with which arguments, and what is refused before anything is started."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from align.cli import serve as command
from align.decoding.constraints.worker import shared
from align.errors import AlignError, ConfigError
from align.serve import launch
from align.serve.launch import Serve, arguments, check
from align.serve.models import Served, served
from align.serve.options import Options


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def adapter(tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """An adapter that changes something."""
    folder = tmp_path / "run" / "adapter"
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def as_run(folder: Path, model: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.resolved.yaml").write_text(yaml.safe_dump({"model": {"name": str(model)}}), encoding="utf-8")
    return folder


def test_a_whole_model_is_served_where_it_is(tiny_model_dir: Path) -> None:
    assert served(str(tiny_model_dir), "float32") == Served(str(tiny_model_dir), tiny_model_dir.name)


def test_a_run_is_served_by_its_merged_model(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = as_run(tmp_path / "good", tiny_model_dir)
    with pytest.raises(AlignError, match="no trained weights yet"):
        served(str(run), "float32")
    (run / "merged").mkdir()
    (run / "merged" / "config.json").write_text("{}", encoding="utf-8")
    assert served(str(run), "float32") == Served(str(run / "merged"), "good")


@pytest.mark.parametrize("kind", ["run", "adapter"])
def test_an_adapter_is_merged_once_into_the_cache(
    adapter: Path, tiny_model_dir: Path, make_tiny_model: Callable[..., LlamaForCausalLM], cache: Path, kind: str
) -> None:
    """The folder in the cache computes what the adapter on its model does; a second call makes nothing."""
    source = as_run(adapter.parent, tiny_model_dir) if kind == "run" else adapter
    found = served(str(source), "float32")
    path = Path(found.path)
    assert path.is_relative_to(cache)
    made = (path / "config.json").stat().st_mtime_ns
    assert served(str(source), "float32") == found
    assert (path / "config.json").stat().st_mtime_ns == made
    assert served(str(source), "bfloat16").path != found.path
    from align.models.load import load_run

    ids = torch.tensor([[5, 7, 11]])
    with torch.no_grad():
        expected = load_run(str(adapter), dtype="float32").model(ids).logits
        logits = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
        base = make_tiny_model()(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert (expected - base).abs().max() > 1e-2
    assert not list(cache.glob("merged/*.partial"))


def test_a_recipe_means_its_run(
    tmp_path: Path, tiny_model_dir: Path, recipe_in: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_in(tmp_path, output=str(tmp_path / "out"))
    with pytest.raises(AlignError, match="train it first: align train"):
        served(str(recipe), "float32")
    run = as_run(tmp_path / "out", tiny_model_dir)
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}", encoding="utf-8")
    assert served(str(recipe), "float32").path == str(run / "model")


def test_a_reward_model_is_not_served(tmp_path: Path) -> None:
    (tmp_path / "reward.json").write_text("{}", encoding="utf-8")
    with pytest.raises(AlignError, match="name it by --reward"):
        served(str(tmp_path), "float32")


def test_all_wrong_options_are_told_at_once() -> None:
    options = Options(rewards={"a": "nowhere:f", "b": "align.rewards.rules:nothing"}, predicates=("os:nothing",))
    with pytest.raises(ConfigError) as wrong:
        check(Serve("model", max_num_seqs=4, options=options))
    text = str(wrong.value)
    for said in ("64 is over --max-num-seqs 4", "'nowhere'", "has no nothing", "os has no function nothing"):
        assert said in text


OPERATORS = """
import time

def one_argument(text):
    return True

def says_yes(text, complete):
    return "yes"

def hangs(text, complete):
    time.sleep(60)

def takes_nothing(text, complete):
    return False

def fine(text, complete):
    return True

def one_number(prompts, completions):
    return 0.5

def broken(prompts, completions):
    return [len(text) / 0 for text in completions]

def leaves(prompts, completions):
    raise SystemExit("not here")

def picky(prompts, completions):
    raise ValueError("no such row")

def judges_none(prompts, completions):
    return [None for _ in completions]

def never_ends(prompts, completions):
    time.sleep(60)

def same(prompts, completions, solution):
    return [float(text == right) for text, right in zip(completions, solution)]
"""


def test_functions_and_rules_are_called_once_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails on every text, or says the wrong thing; a rule may refuse a row, and one on columns is not called."""
    (tmp_path / "operators_own.py").write_text(OPERATORS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(launch, "RULE_SECONDS", 1.0)
    names = ("one_number", "broken", "leaves", "never_ends", "picky", "judges_none", "same")
    options = Options(
        rewards={name: f"operators_own:{name}" for name in names},
        predicates=tuple(
            f"operators_own:{name}" for name in ("one_argument", "says_yes", "hangs", "takes_nothing", "fine")
        ),
    )
    with pytest.raises(ConfigError) as wrong:
        check(Serve("model", port=_free(), options=options))
    found = [what for _, what in wrong.value.problems]
    for what, said in zip(
        found,
        (
            "one_number: the rule gave 0.5",
            "broken: row 0: the rule fails: ZeroDivisionError",
            "leaves: row 0: the rule fails: SystemExit: not here",
            "never_ends: took over 1 s on one short answer: let it end",
            "python:operators_own:one_argument: raised TypeError",
            "python:operators_own:says_yes: returned \"'yes'\", which is no bool",
            "python:operators_own:hangs: took over 1 s on ''",
            "python:operators_own:takes_nothing: nothing satisfies it",
        ),
        strict=True,
    ):
        assert what.startswith(said)
    assert not shared.cache_info().currsize


def _free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as tried:
        return int(tried.getsockname()[1])


def test_a_port_that_is_taken_is_told_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1 {port}: Address already in use; choose another"):
            check(Serve("model", port=port))
    with pytest.raises(ConfigError, match="--host, --port"):
        check(Serve("model", host="nowhere.invalid"))


def test_the_command_line_reaches_the_server_and_its_key_is_in_no_argument(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    became: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *given: became.extend(given))
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    command.serve(
        str(tiny_model_dir),
        port=8123,
        api_key="secret",
        reward=["nice=align.rewards.rules:everyday_answer"],
        dtype="float32",
        max_num_seqs=16,
        timeout=3.0,
    )
    _, line, environment = became
    assert "secret" not in " ".join(line)
    assert environment[launch.KEY_VARIABLE] == "secret"
    assert environment["OMP_NUM_THREADS"] == "5"  # the operator's own wins
    assert "align" in environment["VLLM_PLUGINS"].split(",")
    given = dict(pairwise(line))
    assert (given["--port"], given["--host"], given["--dtype"]) == ("8123", "127.0.0.1", "float32")
    assert given["--logprobs-mode"] == "processed_logits"
    assert "--enable-prompt-tokens-details" in line
    options = Options.of(json.loads(given["--additional-config"])["align"]["server"])
    assert options.rewards == {"nice": "align.rewards.rules:everyday_answer"}
    assert (options.max_particles, options.max_running, options.timeout) == (16, 16, 3.0)
    assert int(given["--max-num-seqs"]) == 16 + options.max_plain  # rows for all that are let in


def test_vllm_takes_the_arguments(tiny_model_dir: Path) -> None:
    """A release of vLLM that renames one of them fails here, and not when a server starts."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from align.decoding.vllm.machine import settings

    line = arguments(Serve(str(tiny_model_dir)), settings("float32"), Served(str(tiny_model_dir), "tiny"))
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(line)
    assert args.served_model_name == ["tiny"]
    assert args.allowed_origins == []
    assert args.max_model_len == -1
    assert args.enable_chunked_prefill is False
    assert args.trust_remote_code is False
    assert args.additional_config["align"]["server"]["max_particles"] == 64
    assert args.structured_outputs_config.backend == "guidance"


@pytest.mark.parametrize("given", [["nice"], ["=x"], ["nice="], ["a=m:f", "a=m:g"]])
def test_a_reward_has_a_name_of_its_own(given: list[str]) -> None:
    with pytest.raises(ConfigError, match="--reward"):
        command.serve("model", reward=given)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="none of auto, bfloat16"):
        command.serve("model", dtype="int8")
