"""Where a baseline of Transfer-Q* runs beside a policy in vLLM, by what it is and by device.

``tests/decoding/vllm/test_transfer_q.py`` starts what is chosen here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.baselines import place_of

PLAIN = {"peft_type": "LORA", "r": 12, "bias": "none", "use_dora": False, "modules_to_save": None}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def adapter(folder: Path, base: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    config = {**PLAIN, "base_model_name_or_path": str(base), **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_server_and_the_policy_itself_run_where_they_are(base: Path) -> None:
    for device in ("cpu", "cuda"):
        assert place_of(str(base), "https://there:80#big", device).way == "server"
        assert place_of(str(base), str(base), device).way == "same"


def test_on_a_cpu_two_engines_and_on_a_gpu_an_adapter_where_it_can_be(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    own = adapter(run / "adapter", base)
    (run / "config.resolved.yaml").write_text(yaml.safe_dump({"model": {"name": str(base)}}))
    for name in (own, run):
        assert (place_of(str(base), str(name), "cpu").way, place_of(str(base), str(name), "cpu").options) == (
            "engine",
            {},
        )
        place = place_of(str(base), str(name), "cuda")
        assert (place.way, place.path) == ("adapter", str(own))
        assert place.options == {"enable_lora": True, "max_lora_rank": 16}  # the next that vLLM knows


def test_what_is_no_plain_adapter_of_the_policys_model_has_an_engine_of_its_own(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    own = adapter(tmp_path / "plain", base)
    assert place_of(str(base), str(own), "cuda").way == "adapter"
    strange = [
        adapter(tmp_path / str(number), base, **changes)
        for number, changes in enumerate(
            ({"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"peft_type": "LOHA"})
        )
    ]
    pairs = [(base, one) for one in strange] + [(base, other), (other, own), (own, base)]
    for model, baseline in pairs:
        place = place_of(str(model), str(baseline), "cuda")
        assert place.way == "engine", baseline
        assert place.options["gpu_memory_utilization"] < 0.5
