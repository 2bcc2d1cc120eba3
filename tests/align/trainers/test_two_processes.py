"""Two processes with half the batch each: the loss, gradient and metrics of one process with the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys
from pathlib import Path
from align.trainers.pair import PairTrainer
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

folder, output, batch = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
rows = [
    {"prompt": "the inner", "chosen": " thing is there", "rejected": " cat"},
    {"prompt": "an apple", "chosen": " fell", "rejected": " in the garden, then another"},
    {"prompt": "there", "chosen": " she is", "rejected": " they are an ant"},
    {"prompt": "a hint then:", "chosen": " think again", "rejected": " no"},
]
for name, peft in (("full", None), ("lora", LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))):
    trainer = PairTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        args=DPOConfig(
            str(output / name), per_device_train_batch_size=batch, max_steps=3, learning_rate=1e-3, logging_steps=1,
            lr_scheduler_type="constant", report_to="none", use_cpu=True, bf16=False, save_strategy="no",
            gradient_checkpointing=False, disable_tqdm=True, seed=3, beta=0.5,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=peft,
        loss="dpo",
    )
    trainer.train()
    if trainer.is_world_process_zero():
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        (output / f"{name}.json").write_text(json.dumps(log))
"""


def test_two_processes_equal_one(tmp_path, tiny_model_dir):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    launchers = {"one": ([], 4), "two": (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], 2)}
    logs = {}
    for name, (launcher, batch) in launchers.items():
        output = tmp_path / name
        output.mkdir()
        subprocess.run(
            [sys.executable, *launcher, str(script), str(tiny_model_dir), str(output), str(batch)],
            check=True,
            capture_output=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        logs[name] = {kind: json.loads(Path(output / f"{kind}.json").read_text()) for kind in ("full", "lora")}
    for kind in ("full", "lora"):
        for one, two in zip(logs["one"][kind], logs["two"][kind], strict=True):
            for key in (k for k in one if not k.startswith("perf/") and k != "num_tokens"):
                assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), (kind, key)
        # Padding differs between the processes and is not counted.
        assert logs["two"][kind][-1]["num_tokens"] == logs["one"][kind][-1]["num_tokens"]
