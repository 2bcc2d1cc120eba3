"""The speed bench: FLOP in closed form and by torch's counter, lengths, batches, groups of a profile, tables."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import speed_data
import speed_flops
import speed_profile
import speed_tables

CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
SHAPE = speed_flops.Shape.of(CONFIG)
PAIRS = [(5, 3, 4), (2, 6, 1)]


def test_tokens_and_keys_of_a_pair() -> None:
    """Prompt 2, answers 1 and 2. Shared: 5 tokens; the prompt sees 1 + 2 keys, the answers 3 and 3 + 4. Apart: 7
    tokens, which see (1 + 2 + 3) + (1 + 2 + 3 + 4).
    """
    pairs = [(2, 1, 2)]
    assert (speed_flops.positions(pairs, True), speed_flops.positions(pairs, False)) == (5, 7)
    assert (speed_flops.seen(pairs, True), speed_flops.seen(pairs, False)) == (13, 16)


def test_a_step_by_hand() -> None:
    """One pair of 1, 1 and 1 tokens in one row: 3 tokens, 2 of them scored, 1 + 2 + 2 keys.

    A layer has 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 = 7680 weights, an adapter of rank 2 on it
    2 * (64 + 48 + 48 + 64 + 80 * 3) = 928.
    """
    pairs, trunk, head, attention = [(1, 1, 1)], 3 * 7680, 32 * 50, 3 * 32 * 5
    full = 2 * 3 * trunk + 2 * 2 * head + 4 * attention
    assert speed_flops.forward(SHAPE, pairs, True) == full
    assert speed_flops.step(SHAPE, pairs, shared=True, rank=None, reference=False) == 3 * full
    assert speed_flops.step(SHAPE, pairs, shared=True, rank=None, reference=True) == 4 * full
    assert speed_flops.forward(SHAPE, pairs, True, rank=2) == full + 2 * 3 * 3 * 928


def counted(model: torch.nn.Module, rows: int, tokens: int) -> tuple[int, int]:
    """FLOP of linear layers in the forward and in the backward pass, by torch's own count."""
    ids = torch.arange(rows * tokens).reshape(rows, tokens) % 50
    counts = []
    with FlopCounterMode(display=False) as counter:
        states = model(input_ids=ids).last_hidden_state.sum()
        counts.append(sum(linear(counter).values()))
        states.backward()
        counts.append(sum(linear(counter).values()) - counts[0])
    return counts[0], counts[1]


def linear(counter: FlopCounterMode) -> dict[Any, int]:
    """Positions and attention multiply by bmm and in kernels of their own."""
    return {
        op: n
        for op, n in counter.get_flop_counts()["Global"].items()
        if op in (torch.ops.aten.mm, torch.ops.aten.addmm)
    }


@pytest.mark.parametrize("rank", [None, 2])
def test_linear_layers_are_those_that_torch_counts(rank: int | None) -> None:
    """Without the head and attention, which torch counts otherwise, in a row of 6 tokens."""
    model: Any = LlamaForCausalLM(CONFIG)
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        model = model.get_base_model()
    bare = speed_flops.Shape(SHAPE.first, SHAPE.layer, SHAPE.layers, width=0, hidden=0, vocabulary=0)
    pairs = [(2, 3, 1)]
    expected = speed_flops.forward(bare, pairs, True, rank), speed_flops.backward(bare, pairs, True, rank)
    assert counted(model.model, 1, 6) == expected


def test_lengths_are_about_their_means_and_seeded() -> None:
    lengths = speed_data.PROFILES["hh"]
    pairs = speed_data.draw_pairs(lengths, 2000, seed=3)
    words = {name: [len(pair[name].split()) for pair in pairs] for name in ("prompt", "chosen", "rejected")}
    assert statistics.mean(words["prompt"]) == pytest.approx(200, rel=0.05)
    assert statistics.mean(words["chosen"]) + 1 == pytest.approx(70, rel=0.05)
    assert (min(words["prompt"]), max(words["prompt"])) == (50, 500)
    assert statistics.pstdev(words["prompt"]) > 80
    assert pairs == speed_data.draw_pairs(lengths, 2000, seed=3)
    assert pairs != speed_data.draw_pairs(lengths, 2000, seed=4)


def test_batches_hold_pairs_of_like_length_and_are_like_all_in_the_mean() -> None:
    lengths = list(range(200, 0, -1))
    first, *others = speed_data.grouped(lengths, batch=4, count=6, seed=0)
    assert sorted(lengths[place] for place in first) == [1, 2, 3, 4]
    assert all(max(of) - min(of) == 3 for of in ([lengths[place] for place in batch] for batch in others))
    assert len({place for batch in others for place in batch}) == 20
    assert statistics.mean(lengths[place] for batch in others for place in batch) == pytest.approx(100.5, abs=4)


def test_words_are_a_token_each(tmp_path: Path) -> None:
    pairs = speed_data.make_pairs("tldr", None, steps=2, batch=2, seed=0, file=tmp_path / "pairs.jsonl")
    texts = [json.loads(line) for line in pairs.file.read_text().splitlines()]
    words = [tuple(len(text[name].split()) for name in ("prompt", "chosen", "rejected")) for text in texts]
    assert pairs.sizes == [(p, w + 1, r + 1) for p, w, r in words]  # and an EOS
    assert len(pairs.sizes) == 4
    assert pairs.of_step(1) == pairs.sizes[2:]


def test_groups_of_a_profile() -> None:
    group = speed_profile.group_of
    assert group(["aten::mm", "aten::linear"], [[40, 32], [32, 48]]) == speed_profile.TRUNK
    assert group(["aten::mm", "in: scales and sums of the adapter"], [[40, 32], [32, 16]]) == speed_profile.ADAPTER
    assert group(["aten::mm", "_TokenLogps"], [[40, 32], [32, 48]]) == "head"
    assert group(["aten::mm", "in: reference"], [[40, 32], [32, 48]]) == "reference"
    assert group(["aten::mul", "in: norms", "in: positions, copies for attention"], []) == "norms"
    assert group(["aten::mul"], []) == speed_profile.REST


def test_a_profile_has_all_time_and_puts_gradients_where_their_values_are() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    speed_profile.mark_modules(model)
    with torch.profiler.profile(record_shapes=True) as recorded:
        model.model(input_ids=torch.arange(40)[None]).last_hidden_state.sum().backward()
    events = recorded.events()
    rows = speed_profile.rows_of(events)
    seconds = {row["group"]: row["seconds"] for row in rows if "group" in row}
    whole = max(event.time_range.end for event in events) - min(event.time_range.start for event in events)
    assert sum(seconds.values()) == pytest.approx(whole / 1e6)
    assert {speed_profile.TRUNK, "attention", "norms", "activations", speed_profile.OUTSIDE} <= seconds.keys()
    assert "head" not in seconds
    within = {(row["within"], row["operation"]) for row in rows if "operation" in row}
    assert not any("silu" in name and group != "activations" for group, name in within)


def row(way: str, turn: int, seconds: float, **more: float) -> dict[str, Any]:
    return {"part": "lora/hh", "way": way, "round": turn, "seconds": seconds, "peak": 2048, "pairs": 4} | {
        "tokens": 1000,
        "flops": 40e9,
        "rate": 80.0,
        **more,
    }


def ready(way: str, reference: float) -> dict[str, Any]:
    return {"part": "lora/hh", "way": way, "built": 9.0, "reference": reference, "loaded": 1000, "pairs": 12} | {
        "tokens": 2500
    }


ABOUT = {"part": "lora/hh", "about": "a machine", "rates": {"float32": 100.0}, "pairs": 4, "rounds": 3}


def test_ratios_are_of_the_same_round_and_an_epoch_has_a_pass_of_the_reference() -> None:
    """TRL 3, 4 and 6 s, ours 2, 1 and 3: 1.5, 4 and 2. With passes of 5 and 2.5 s over 2,500 tokens, of which a step
    has 1,000: (3 + 2) / (2 + 1), (4 + 2) / (1 + 1), (6 + 2) / (3 + 1). 40 GFLOP in 2 s are a fifth of 100 a second.
    """
    rows = [ABOUT, ready("TRL, best settings", 5.0), ready("Align", 2.5)]
    rows += [row("TRL, best settings", turn, s, peak=4096) for turn, s in enumerate((3, 4, 6), start=1)]
    rows += [row("Align", turn, s) for turn, s in enumerate((2, 1, 3), start=1)]
    rows += [{"part": "lora/hh", "finished": 20.0}]
    lines = speed_tables.tables(rows, ["lora/hh", "full/hh"])
    (first,) = [line for line in lines if line.startswith("| an adapter, prompts of 200 tokens")]
    assert first.split(" | ")[1:] == ["2.00 (1.50 to 4.00)", "2.00 (1.67 to 3.00)", "", "", "0.50", "20 % |"]
    (theirs,) = [line for line in lines if line.startswith("| TRL, best settings |")]
    assert theirs.split(" | ")[1:] == [
        *("4.0 (3.0 to 6.0)", "1.00", "250", "2.0", "4.00", "10 %", "2.00 (1.50 to 4.00)", "2.00 (1.67 to 3.00) |"),
    ]


def test_a_part_that_did_not_end_has_no_table() -> None:
    rows = [ABOUT, ready("Align", 0.0), row("Align", 1, 2.0)]
    assert speed_tables.tables(rows, ["lora/hh"]) == []


def test_a_sweep_is_compared_as_a_whole() -> None:
    """30 + 20 seconds with the cache, 35 + 40 without."""
    runs = [(0.1, True, 30), (0.1, False, 35), (0.2, True, 20), (0.2, False, 40)]
    rows: list[dict[str, Any]] = [{"beta": b, "cache": cache, "seconds": s, "built": 1} for b, cache, s in runs]
    assert speed_tables.sweep(rows)[-1] == "The sweep is 1.50 times as fast."
    whole = [{**row, "part": "sweep"} for row in [ABOUT, *rows, {"finished": 125.0}]]
    assert "The sweep is 1.50 times as fast." in speed_tables.tables(whole, ["sweep"])


def test_curves_say_how_far_they_are_apart() -> None:
    rows = [{"pairs": 2}, {"step": 0, "theirs": 0.5, "ours": 0.5}, {"step": 1, "theirs": 0.4, "ours": 0.4004}]
    assert speed_tables.curves(rows)[0] == "2 steps of 2 pairs in float32: relative difference 1.0e-03 at most."
