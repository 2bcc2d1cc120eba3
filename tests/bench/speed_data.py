"""What the speed bench trains on: models, pairs of seeded lengths, and the batches in which all ways meet them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from align.data.pairs import read_pairs
from align.data.tokenize import tokenize_pairs
from align.models.load import load_tokenizer, locate

NAME = "smollm2-135m-instruct"
MAX_LENGTH = 1024
SPREAD = 0.6
"""Of the logarithm of a length; real dialogues have about 0.8."""
BATCHES_GROUPED = 50
"""Pairs are sorted by length within so many batches, as transformers' group_by_length does."""
WORDS = ("the", "a", "house", "river", "light", "old", "small", "said", "went", "under", "before", "many", "day")


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt and of one answer."""

    prompt: int
    answer: int


PROFILES = {"hh": Lengths(200, 70), "uf": Lengths(120, 250), "tldr": Lengths(350, 35)}
DIALOGUES = "dialogues"


def draw_length(mean: int, rng: random.Random) -> int:
    """A log-normal length of about this mean, between a quarter of it and two and a half times it."""
    length = mean * math.exp(rng.gauss(-(SPREAD**2) / 2, SPREAD))
    return round(min(max(length, mean / 4), 2.5 * mean))


def draw_pairs(lengths: Lengths, count: int, seed: int) -> list[dict[str, str]]:
    """Pairs of words that are one token each; an answer's length counts its EOS."""
    rng = random.Random(seed)

    def text(tokens: int) -> str:
        return "".join(f" {rng.choice(WORDS)}" for _ in range(tokens))

    sizes = [
        [draw_length(mean, rng) for mean in (lengths.prompt, lengths.answer, lengths.answer)] for _ in range(count)
    ]
    return [{"prompt": text(p), "chosen": text(w - 1), "rejected": text(r - 1)} for p, w, r in sizes]


def grouped(lengths: Sequence[int], batch: int, count: int, seed: int) -> list[list[int]]:
    """Which pairs meet in each of ``count`` batches: a first one of the shortest pairs, which warms up, then others.

    Pairs are sorted by length and cut into batches, as group_by_length does; the others are spread evenly over those,
    so that their mean is that of all, and shuffled.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    cut = [order[start : start + batch] for start in range(0, len(order) - batch + 1, batch)]
    chosen = [cut[int((turn + 0.5) / (count - 1) * (len(cut) - 1))] for turn in range(count - 1)]
    random.Random(seed).shuffle(chosen)
    return [cut[-1], *chosen]


@dataclass(frozen=True)
class Pairs:
    """Pairs in the order in which they are trained on.

    Attributes:
        file: JSONL with prompt, chosen and rejected.
        batch: pairs a step.
        sizes: tokens of prompt, chosen and rejected answer of each.
    """

    file: Path
    batch: int
    sizes: list[tuple[int, int, int]]

    def of_step(self, step: int) -> list[tuple[int, int, int]]:
        """Sizes of the pairs of a step, counted from 0."""
        return self.sizes[step * self.batch : (step + 1) * self.batch]


def make_pairs(profile: str, dialogues: str | None, steps: int, batch: int, seed: int, file: Path) -> Pairs:
    """Write the pairs of ``steps`` steps, of a profile of lengths or of a folder of dialogues."""
    tokenizer = load_tokenizer(NAME)
    pool = max(BATCHES_GROUPED, steps) * batch
    if profile == DIALOGUES:
        if dialogues is None:
            raise SystemExit("real dialogues: name their folder with --dialogues")
        rows = read_pairs(dialogues).rows
        rows = random.Random(seed).sample(rows, min(pool, len(rows)))
        texts: list[dict[str, Any]] = [{"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in rows]
    else:
        texts = list(draw_pairs(PROFILES[profile], pool, seed))
    file.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    ids = tokenize_pairs(read_pairs(str(file)).rows, tokenizer, MAX_LENGTH).rows
    sizes = [(len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) for pair in ids]
    if len(sizes) != len(texts):
        raise SystemExit(f"{len(texts) - len(sizes)} of {len(texts)} pairs cannot be used")
    batches = grouped([p + max(w, r) for p, w, r in sizes], batch, steps, seed)
    order = [place for chosen in batches for place in chosen]
    file.write_text("".join(json.dumps(texts[place]) + "\n" for place in order), encoding="utf-8")
    return Pairs(file, batch, [sizes[place] for place in order])


def model_folder(model: str, folder: Path) -> str:
    """Where ``smollm2`` is; or ``tiny``, made in ``folder``: a head like SmolLM2's over four small layers, 13.4 M."""
    if model == "smollm2":
        return locate(NAME)
    tokenizer = load_tokenizer(NAME)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def config_of(folder: str) -> Any:
    """The configuration of the model there."""
    return AutoConfig.from_pretrained(folder)
