"""Make the quickstart's preference pairs from the quickstart's own model.

The requests of ``quickstart_prompts.yaml`` are put to SmolLM2-135M-Instruct, which answers each six times at
temperature 0.5. Answers that it did not end by itself are left out, the published rule
``align.rewards.rules.everyday_answer`` scores the others, and of those a good one and a worse one of about the same
length make a pair. A request without such a pair is left out.

    python recipes/data/make_quickstart_pairs.py --candidates candidates.jsonl

writes ``quickstart_train.jsonl`` and ``quickstart_heldout.jsonl`` beside this file. An interrupted run goes on from
the candidates that it has; with all candidates there, only the pairs are made anew. Sampling takes about twenty
minutes on one recent core (bfloat16).

Determinism: each prompt draws from its own seed, batches and their order are fixed, and one thread samples, so the
same kind of processor with the same versions of torch and transformers gives the same files. Elsewhere the last bits
of a matrix product differ, and with them many answers; requests, split and the choice of pairs from given answers are
the same everywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from align.models.packaged import packaged_model
from align.rewards.rules import everyday_answer

HERE = Path(__file__).parent
MODEL = "smollm2-135m-instruct"
ANSWERS = 6
TEMPERATURE = 0.5
MAX_NEW_TOKENS = 90
PROMPTS_PER_BATCH = 16
MIN_REWARD = 0.4  # of the chosen answer
MIN_GAP = 0.2  # between the two rewards
LENGTH_COST = 0.5  # reward given up for an e-fold in length between the two answers
MAX_TOKENS = 256  # of a prompt with both answers


@dataclass(frozen=True)
class Request:
    """One prompt: its task, the subject that its template was filled with, and ``train`` or ``heldout``."""

    task: str
    subject: str
    split: str
    prompt: str


@dataclass(frozen=True)
class Answer:
    """One sampled answer; ``finished`` if the model ended it by itself."""

    text: str
    finished: bool


def requests() -> list[Request]:
    """All requests, two per subject, in a fixed order; every fifth subject of a task is held out."""
    tasks = yaml.safe_load((HERE / "quickstart_prompts.yaml").read_text(encoding="utf-8"))
    found = []
    for task, parts in tasks.items():
        templates = parts["templates"]
        for index, subject in enumerate(parts["subjects"]):
            split = "heldout" if index % 5 == 4 else "train"
            for template in (templates[index % len(templates)], templates[(index + 1) % len(templates)]):
                found.append(Request(task, subject, split, template.format(subject)))
    return found


def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: int = ANSWERS
) -> list[list[Answer]]:
    """``answers`` samples per prompt from the model's own distribution at ``TEMPERATURE``, nothing cut from it.

    Row r, step t turns one uniform number into a token by the inverse of the cumulative distribution; the numbers
    come from a generator seeded by the prompt. Prompts are read once and shared by their answers; rows that ended
    leave the batch.
    """
    chats = [[user(prompt)] for prompt in prompts]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    uniform = torch.cat([_uniform(prompt, answers) for prompt in prompts])
    mask = batch["attention_mask"]
    output = model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=_positions(mask), logits_to_keep=1)
    cache, logits = output.past_key_values, output.logits[:, -1].repeat_interleave(answers, dim=0)
    cache.batch_repeat_interleave(answers)
    mask = mask.repeat_interleave(answers, dim=0)

    rows = torch.arange(len(uniform))
    tokens = torch.full(uniform.shape, tokenizer.eos_token_id)
    for step in range(MAX_NEW_TOKENS):
        drawn = _draw(logits, uniform[rows, step])
        tokens[rows, step] = drawn
        going = (drawn != tokenizer.eos_token_id).nonzero()[:, 0]
        if len(going) == 0 or step + 1 == MAX_NEW_TOKENS:
            break
        if len(going) < len(rows):
            cache.batch_select_indices(going)
            rows, mask, drawn = rows[going], mask[going], drawn[going]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        output = model(
            input_ids=drawn[:, None],
            attention_mask=mask,
            position_ids=_positions(mask)[:, -1:],
            past_key_values=cache,
        )
        logits = output.logits[:, -1]
    texts = [_answer(row.tolist(), tokenizer) for row in tokens]
    return [texts[start : start + answers] for start in range(0, len(texts), answers)]


def _uniform(prompt: str, answers: int) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7], "big")
    return torch.rand(answers, MAX_NEW_TOKENS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def _draw(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    cumulative = (logits.float() / TEMPERATURE).softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]


def _answer(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> Answer:
    finished = tokenizer.eos_token_id in tokens
    if finished:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
    return Answer(tokenizer.decode(tokens).strip(), finished)


def batches(found: Sequence[Request]) -> list[list[str]]:
    """Prompts in fixed batches, those of similar length together so that little is padding."""
    prompts = sorted((request.prompt for request in found), key=lambda prompt: (len(prompt), prompt))
    return [prompts[start : start + PROMPTS_PER_BATCH] for start in range(0, len(prompts), PROMPTS_PER_BATCH)]


def collect(found: Sequence[Request], file: Path) -> dict[str, list[Answer]]:
    """The sampled answers by prompt; batches that ``file`` does not hold in full are sampled and appended."""
    candidates = _read_candidates(file)
    missing = [batch for batch in batches(found) if not all(prompt in candidates for prompt in batch)]
    if not missing:
        return candidates
    torch.set_num_threads(1)  # the order of a sum, and so its last bits, depends on the number of threads
    folder = packaged_model(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with file.open("a", encoding="utf-8") as out, torch.inference_mode():
        for batch in track(missing, description="sampling answers"):
            for prompt, answers in zip(batch, sample(model, tokenizer, batch), strict=True):
                candidates[prompt] = answers
                line = {"prompt": prompt, "answers": [asdict(answer) for answer in answers]}
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
            out.flush()
    return candidates


def _read_candidates(file: Path) -> dict[str, list[Answer]]:
    if not file.exists():
        return {}
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:  # the last line was cut by an interruption
        file.write_text(whole, encoding="utf-8")
    lines = (json.loads(line) for line in whole.split("\n") if line)
    return {line["prompt"]: [Answer(**answer) for answer in line["answers"]] for line in lines}


def pair(request: Request, answers: Sequence[Answer], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """The row for a request, or None if no two of its answers make a pair.

    Of all pairs with a chosen reward of at least ``MIN_REWARD`` and a gap of at least ``MIN_GAP``, the one with the
    largest gap less ``LENGTH_COST * |log(length ratio)|``: neither side is the longer one by rule.
    """
    texts = sorted({answer.text for answer in answers if answer.finished and answer.text})
    rewards = dict(zip(texts, everyday_answer([request.prompt] * len(texts), texts), strict=True))
    lengths = {text: len(tokenizer.encode(text, add_special_tokens=False)) + 1 for text in texts}  # with the end token
    prompt = [user(request.prompt)]
    room = MAX_TOKENS - len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])

    def value(chosen: str, rejected: str) -> float:
        return rewards[chosen] - rewards[rejected] - LENGTH_COST * abs(math.log(lengths[chosen] / lengths[rejected]))

    pairs = [
        (chosen, rejected)
        for chosen, rejected in permutations(texts, 2)
        if rewards[chosen] >= MIN_REWARD
        and rewards[chosen] - rewards[rejected] >= MIN_GAP
        and lengths[chosen] + lengths[rejected] <= room
    ]
    if not pairs:
        return None
    chosen, rejected = max(pairs, key=lambda pair: value(*pair))
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "task": request.task,
        "chosen_reward": round(rewards[chosen], 6),
        "rejected_reward": round(rewards[rejected], 6),
    }


def user(text: str) -> dict[str, str]:
    """A chat message of the user."""
    return {"role": "user", "content": text}


def main() -> None:
    """Sample what is missing, choose the pairs, write both files and say what is in them."""
    parser = argparse.ArgumentParser(description="Make the quickstart's preference pairs.")
    parser.add_argument("--candidates", type=Path, required=True, help="file of sampled answers, read and extended")
    parser.add_argument(
        "--output", type=Path, default=HERE, help="folder of the two files (default: beside this script)"
    )
    args = parser.parse_args()
    candidates = collect(requests(), args.candidates)
    tokenizer = AutoTokenizer.from_pretrained(packaged_model(MODEL))
    mixed = sorted(requests(), key=lambda request: hashlib.sha256(request.prompt.encode()).digest())
    for split in ("train", "heldout"):
        asked = [request for request in mixed if request.split == split]
        rows = [row for request in asked if (row := pair(request, candidates[request.prompt], tokenizer))]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.output / f"quickstart_{split}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{split}: {len(rows)} pairs of {len(asked)} requests", dict(Counter(row["task"] for row in rows)))


if __name__ == "__main__":
    main()
