"""The reward shift of BCO: what it remembers, what it refuses, and one process against two."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from align.losses.binary import RewardShift, kto_kl
from align.losses.types import SequenceLogps

REWARDS = [0.8, -0.2, 1.5, -0.4, 0.3]
UP = [True, True, True, False, False]
reward = st.floats(-30, 30)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def shift_of(mode: str, *batches: tuple[list[float], list[bool]]) -> float:
    shift = RewardShift(mode)
    for rewards, up in batches:
        shift.update(tensor(*rewards), torch.tensor(up, dtype=torch.bool))
    return shift.value.item()


BATCHES = [[0.8, -0.2, 1.5, -0.4, 0.3], [1.0, 0.0, -0.5, 0.5], [2.0, -1.0, 0.4]]


def test_balanced_and_pooled():
    """Up: mean .7, down: mean -.05. Balanced .325; all five: 2/5 = .4."""
    assert shift_of("balanced_ema", (REWARDS, UP)) == pytest.approx(0.325, rel=1e-14)
    assert shift_of("pooled", (REWARDS, UP)) == pytest.approx(0.4, rel=1e-14)


def test_imbalance():
    """Nine up at 1 and one down at -1: the pooled mean .8 is at the thumbs up, the balanced one, 0, between."""
    batch = ([1.0] * 9 + [-1.0], [True] * 9 + [False])
    assert shift_of("pooled", batch) == pytest.approx(0.8, rel=1e-14)
    assert shift_of("balanced_ema", batch) == pytest.approx(0.0, abs=1e-15)


def test_pooled_is_the_mean_of_all_ever_seen():
    """2/5, 3/9, 4.4/12."""
    found = [shift_of("pooled", *((b, [i % 2 == 0 for i in range(len(b))]) for b in BATCHES[:n])) for n in (1, 2, 3)]
    assert found == pytest.approx([0.4, 0.3333333333, 0.3666666667], abs=1e-10)


def test_moving_average():
    """Batch means .4, .25, 1.4/3 at decay .9, weighted 1, .9, .81 from the last back.

    .4; (.25 + .36)/1.9 = .321053; (.466667 + .225 + .324)/2.71 = .374785. An average that starts at its first batch
    has a share of .9^t in it besides, and is at .4, .385, .393167: with that share put back, ours is there too.
    """
    shift, means = RewardShift("balanced_ema", decay=0.9), []
    for batch in BATCHES:
        shift.update(tensor(*batch), torch.ones(len(batch), dtype=torch.bool))
        means.append(shift.value.item())
    assert means == pytest.approx([0.4, 0.61 / 1.9, (1.4 / 3 + 0.225 + 0.324) / 2.71], rel=1e-12)
    kept = [0.9, 0.81, 0.729]
    started = [(1 - k) * mean + k * 0.4 for k, mean in zip(kept, means, strict=True)]
    assert started == pytest.approx([0.4, 0.385, 0.3931666667], abs=1e-10)


def test_an_absent_class_keeps_its_mean():
    """Up .7 and down -.05; then ups alone, at 1.7: up (1.7 + .9 * .7)/1.9 = 1.226316, and delta (1.226316 - .05)/2."""
    found = shift_of("balanced_ema", (REWARDS, UP), ([1.2, 2.2], [True, True]))
    assert found == pytest.approx(((1.7 + 0.63) / 1.9 - 0.05) / 2, rel=1e-12)


def test_before_both_classes_were_seen():
    """Nothing seen: 0. One class seen: its mean."""
    for mode in ("balanced_ema", "pooled"):
        value = RewardShift(mode).value
        assert (value.item(), value.shape, value.dtype) == (0.0, (), torch.float64)
        assert shift_of(mode, ([0.5, 0.7], [False, False])) == pytest.approx(0.6, rel=1e-12)
        assert shift_of(mode, ([], [])) == 0.0


@pytest.mark.parametrize("mode", ["balanced_ema", "pooled"])
@given(
    rows=st.lists(st.tuples(reward, st.booleans()), min_size=1, max_size=20).flatmap(
        lambda rows: st.tuples(st.just(rows), st.permutations(rows))
    )
)
def test_order_within_a_batch(mode, rows):
    one, other = (shift_of(mode, ([r for r, _ in batch], [up for _, up in batch])) for batch in rows)
    assert one == pytest.approx(other, rel=1e-12, abs=1e-12)


@given(rewards=st.lists(reward, min_size=1, max_size=12), constant=reward)
def test_the_shift_moves_with_the_rewards(rewards, constant):
    """BCO's loss is blind to a constant in the rewards. An average that starts at 0 would lag behind it."""
    up = [i % 3 != 0 for i in range(len(rewards))]
    batches = [(rewards[:5], up[:5]), (rewards[5:], up[5:])]
    moved = [([r + constant for r in batch], labels) for batch, labels in batches]
    for mode in ("balanced_ema", "pooled"):
        assert shift_of(mode, *moved) == pytest.approx(shift_of(mode, *batches) + constant, abs=1e-9)


@pytest.mark.parametrize("mode", ["balanced_ema", "pooled"])
def test_state_comes_back(mode, tmp_path):
    """A run that is interrupted after the first batch goes on as one that was not."""
    whole, before = RewardShift(mode), RewardShift(mode)
    for shift in (whole, before):
        shift.update(tensor(*REWARDS), torch.tensor(UP))
    torch.save(before.state_dict(), tmp_path / "shift.pt")
    after = RewardShift(mode)
    after.load_state_dict(torch.load(tmp_path / "shift.pt", weights_only=True))
    for shift in (whole, after):
        shift.update(tensor(1.0, 0.1, -3.0), torch.tensor([True, False, False]))
    assert torch.equal(whole.value, after.value)
    assert not list(whole.parameters())
    other = RewardShift("pooled" if mode == "balanced_ema" else "balanced_ema")
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(whole.state_dict())


@pytest.mark.parametrize("mode", ["balanced_ema", "pooled"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_reward_changes_nothing(mode, bad):
    shift = RewardShift(mode)
    shift.update(tensor(*REWARDS), torch.tensor(UP))
    before = {name: value.clone() for name, value in shift.state_dict().items()}
    with pytest.raises(ValueError, match=r"rewards\[1\] is -?(nan|inf): it must be finite"):
        shift.update(tensor(0.1, bad, 0.2), torch.tensor([True, True, False]))
    assert all(torch.equal(before[name], value) for name, value in shift.state_dict().items())


def test_bf16_rewards_are_counted_exactly():
    """1,026 ups at 1 and 2 downs at 0, in two batches: 513/514. Numbers of that size are 4 apart in bf16."""
    shift = RewardShift("pooled")
    for _ in range(2):
        rewards = torch.cat([torch.ones(513), torch.zeros(1)]).bfloat16()
        shift.update(rewards, rewards > 0)
    assert shift.count.tolist() == [2.0, 1026.0]
    assert shift.value.item() == pytest.approx(513 / 514, rel=1e-15)


def test_the_update_takes_no_gradient():
    rewards = tensor(*REWARDS).requires_grad_()
    shift = RewardShift()
    shift.update(rewards, torch.tensor(UP))
    assert not shift.value.requires_grad


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: RewardShift("ema"), "mode is 'ema': it is one of balanced_ema, pooled"),
        (lambda: RewardShift(decay=1.0), "decay is 1.0: it must be in [0, 1)"),
        (lambda: RewardShift(decay=math.nan), "decay is nan"),
        (lambda: RewardShift().update(tensor(1, 2), torch.tensor([1, 0])), "label is torch.int64"),
        (lambda: RewardShift().update(tensor(1, 2), torch.tensor([True])), "not (2,) and (1,)"),
        (lambda: RewardShift().update(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.bool)), "not (2, 1)"),
    ],
)
def test_bad_input_to_the_shift(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)


def shares_of(rank: int, batches: list[tuple[list[float], list[bool]]]) -> dict[str, Any]:
    """In each process: its share of three batches (of the last, none for one of them), then one bad on process 1."""
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for mode in ("balanced_ema", "pooled"):
        shift = RewardShift(mode)
        found[mode] = []
        for rewards, up in batches:
            shift.update(tensor(*rewards), torch.tensor(up, dtype=torch.bool))
            found[mode].append(shift.value.item())
        try:
            shift.update(tensor(0.5, math.nan if rank else 0.7), torch.tensor([True, False]))
        except ValueError as error:
            found[mode] += [str(error), shift.value.item()]
    ratio = tensor(*batches[0][0])
    length = torch.ones(len(ratio))
    found["kl"] = kto_kl(SequenceLogps(ratio, length), SequenceLogps(0 * ratio, length)).item()
    dist.destroy_process_group()
    return found


def test_two_processes_equal_one(tmp_path, two_processes):
    """The shares differ in size and in what thumbs they hold: sums and counts are added up, not means."""
    batches = [(REWARDS, UP), ([1.0, 0.0, -0.5], [True, False, False]), ([2.0, -1.0], [True, True])]
    cuts = [2, 1, 2]
    shares = [
        [(r[:cut], up[:cut]) for (r, up), cut in zip(batches, cuts, strict=True)],
        [(r[cut:], up[cut:]) for (r, up), cut in zip(batches, cuts, strict=True)],
    ]

    def each() -> None:
        rank = int(os.environ["RANK"])
        (tmp_path / f"{rank}.json").write_text(json.dumps(shares_of(rank, shares[rank])))

    two_processes(each)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for mode in ("balanced_ema", "pooled"):
        one = [shift_of(mode, *batches[:n]) for n in (1, 2, 3)]
        for rank, reason in enumerate(("of another process", "rewards[1] is nan: it must be finite")):
            assert found[rank][mode][:3] == pytest.approx(one, rel=1e-13)
            assert reason in found[rank][mode][3]
            assert found[rank][mode][4] == found[rank][mode][2]
    assert [one["kl"] for one in found] == pytest.approx([0.4, 0.4], rel=1e-13)
