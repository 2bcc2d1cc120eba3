"""Two processes with half the batch each: BCO's shift, loss and gradient are those of one with the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from align.losses import Loss
from align.trainers.thumbs import ThumbsTrainer
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig

folder, output, processes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
answers = [" thing is there", " cat", " fell", " in the garden, then another", " she is", " an ant", " no", " think"]
up = (0, 1, 2, 4, 6)
rows = [{"prompt": f"say {n}", "completion": answer, "label": n in up} for n, answer in enumerate(answers)]
words = lambda texts: torch.tensor([[float(int(text[-1]) > 3), 1.0] for text in texts])
for name, loss, accumulate, match in (
    ("bco", "bco", 1, words), ("bco_accumulated", "bco", 2, False), ("kto", Loss.of("kto", beta=0.5), 1, False)
):
    trainer = ThumbsTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        args=KTOConfig(
            str(output / name), per_device_train_batch_size=4 // processes if name != "bco_accumulated" else 2,
            gradient_accumulation_steps=accumulate if processes == 1 else 1,
            max_steps=3, learning_rate=1e-3, logging_steps=1, lr_scheduler_type="constant", report_to="none",
            use_cpu=True, bf16=False, save_strategy="no", gradient_checkpointing=False, disable_tqdm=True, seed=3,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        loss=loss,
        match_prompts=match,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        (output / f"{name}.json").write_text(json.dumps(log))
"""


def test_two_processes_equal_one(tmp_path, tiny_model_dir):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    launchers = {1: [], 2: ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]}
    logs = {}
    for processes, launcher in launchers.items():
        output = tmp_path / str(processes)
        output.mkdir()
        done = subprocess.run(
            [sys.executable, *launcher, str(script), str(tiny_model_dir), str(output), str(processes)],
            capture_output=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        logs[processes] = {path.stem: json.loads(Path(path).read_text()) for path in output.glob("*.json")}
    assert set(logs[1]) == set(logs[2]) == {"bco", "bco_accumulated", "kto"}
    compared = {
        "bco": ("loss", "grad_norm", "bco/shift", "bco/weight_down", "rewards/margins", "thumbs/accuracy"),
        # Metrics of micro-batches are averaged as they are, and a class mean over two rows is another than over four.
        "bco_accumulated": ("loss", "grad_norm", "bco/shift", "bco/mean_up", "bco/mean_down"),
        # Answers are rotated within the batch of a process, so that the KL is of other pairs from the second step on.
        "kto": ("loss", "rewards/chosen", "logps/chosen"),
    }
    for kind, names in compared.items():
        for one, two in list(zip(logs[1][kind], logs[2][kind], strict=True))[: 1 if kind == "kto" else 3]:
            for name in names:
                assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), (kind, name)
