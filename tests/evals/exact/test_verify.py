"""The lab: every loss and sampler has a target and reaches it, and a wrong loss does not."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from align.evals.exact.decoding_targets import DECODERS
from align.evals.exact.descent import train_pairs
from align.evals.exact.pal_targets import PAL
from align.evals.exact.reward_targets import best_order, noisy_gap
from align.evals.exact.rows import Row, Stack
from align.evals.exact.solvers import normalised, odds, per_token
from align.evals.exact.targets import TARGETS
from align.evals.exact.transform_targets import TRANSFORMS, regularised
from align.evals.exact.verify import make_stack, names, verify
from align.evals.exact.worlds import make_world, total_variation
from align.losses import LOSSES, Loss, LossOutput, PairLogps
from align.losses.catalogue import LossInfo
from align.rewards.transforms import LogSigmoidCentered, RawSum


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def timed(name: str) -> tuple[list[Row], float]:
    """The rows of a loss, found once, and the processor's seconds that they took."""
    began = time.process_time()
    return verify(name, Stack()), time.process_time() - began


def test_every_loss_and_sampler_declares_its_target() -> None:
    assert set(TARGETS) == {*LOSSES, *TRANSFORMS, *PAL, *DECODERS}
    assert all(target.statement for target in TARGETS.values())


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_loss_and_sampler_reaches_its_target(name: str) -> None:
    rows, _ = timed(name)
    assert rows
    assert not [row for row in rows if row.status == "miss"]
    assert any(row.status == "pass" for row in rows)
    assert all(row.tolerance is None or row.tolerance <= 1e-3 for row in rows)
    assert not [row.quantity for row in rows if len(row.quantity) > 31]  # a line of 80 columns holds no more


def test_the_whole_is_quick() -> None:
    """In seconds of one processor, so that what else the machine does is not counted."""
    assert sum(timed(name)[1] for name in TARGETS) < 90


@pytest.mark.parametrize(
    "name", ["dpo", "orpo", "bco", "nash_md_pg", "gpm", "all_of", "pal", "awrs_recursive", "masking"]
)
def test_single_precision_has_a_tolerance_of_its_own(name: str) -> None:
    assert not [row for row in verify(name, make_stack("cpu", "float32")) if row.status == "miss"]


@pytest.mark.parametrize("name", ["dpo", "ln_dpo", "cpo", "r_dpo", "pal"])
def test_another_world_is_as_good(name: str) -> None:
    assert not [row for row in verify(name, Stack(seed=11)) if row.status == "miss"]


def test_a_wrong_loss_misses() -> None:
    """DPO with a twentieth of beta too much ends 0.01 or more from mu exp(r/beta)/Z."""

    def wrong(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
        ratio = [a.total - b.total for a, b in zip(vars(policy).values(), vars(reference).values(), strict=True)]
        z = 1.05 * beta * (ratio[0] - ratio[1])
        return LossOutput.from_rewards(-F.logsigmoid(z), ratio[0], ratio[1])

    info = LossInfo("pair", "wrong", wrong, True, 0.5, "", "", "")
    world, stack = make_world(seed=0), Stack()
    exact = normalised(world.log_mu + world.reward / 0.5)
    row = Row.policy("wrong", "", exact, train_pairs(Loss(info), world, stack), world.reward, stack.tolerance(1e-3))
    assert row.status == "miss"
    assert row.distance > 0.01


def test_another_kl_coefficient_is_no_posterior() -> None:
    """Three answers of one token, mu = (1/2, 1/4, 1/4), r - r_ref = (0, log 3, -log 3), so p = (1/2, 3/4, 1/4): the
    posterior is mu p / Z = (1/2, 3/8, 1/8); at gamma 1/2 training goes to mu p^2 / Z = (8, 9, 1) / 18.
    """
    world = make_world(seed=0, prompts=1, steps=1)
    logits = torch.tensor([[[0.5, 0.25, 0.25]]], dtype=torch.float64).log()
    answers = replace(world, reference=logits)
    taken = world.tokens[:, 0]
    columns = {"r": torch.tensor([0.0, math.log(3), -math.log(3)], dtype=torch.float64)[taken][None]}
    for gamma, wanted in ((1.0, [1 / 2, 3 / 8, 1 / 8]), (0.5, [8 / 18, 9 / 18, 1 / 18])):
        exact = torch.tensor(wanted, dtype=torch.float64)[taken][None]
        ours = regularised(LogSigmoidCentered("r", 0.0), answers, columns, gamma, Stack())
        assert max(total_variation(policy, exact) for policy in ours) < 1e-6
    raw = regularised(RawSum(["r"]), answers, columns, 1.0, Stack())[0]
    assert raw[0].tolist() == pytest.approx((torch.tensor([6.0, 9.0, 1.0]) / 16)[taken].tolist(), abs=1e-6)


def test_dividing_by_z_is_not_the_optimum_of_ln_dpo() -> None:
    """Lengths 1 and 2, mu = 1/2 each, r/beta = (log 2, 0): with c = -log x, ``x^-1 + x^-2 / 2 = 1`` gives
    x = (1 + sqrt 3)/2, so pi = (sqrt 3 - 1, 2 - sqrt 3) = (0.7321, 0.2679); dividing by Z gives (2/3, 1/3).
    """
    rate, length = torch.tensor([[math.log(2), 0.0]], dtype=torch.float64), torch.tensor([1, 2])
    log_mu = torch.full((1, 2), math.log(0.5), dtype=torch.float64)
    found = per_token(rate, length, log_mu)
    assert found[0].tolist() == pytest.approx([math.sqrt(3) - 1, 2 - math.sqrt(3)], abs=1e-12)
    divided = normalised(log_mu + length * rate)
    assert total_variation(found, divided) == pytest.approx(math.sqrt(3) - 1 - 2 / 3, abs=1e-12)


def test_odds_of_two_one_token_answers() -> None:
    """Length 1: sigma(r_1 + c) + sigma(r_2 + c) = 1 has c = -(r_1 + r_2)/2, so pi_1 = sigma((r_1 - r_2)/2)."""
    found = odds(torch.tensor([[1.0, -0.5]], dtype=torch.float64), torch.tensor([1, 1]))
    assert float(found[0, 0]) == pytest.approx(1 / (1 + math.exp(-0.75)), abs=1e-12)


def test_no_order_ranks_a_cycle() -> None:
    assert [best_order(k) for k in (3, 4, 5)] == [2 / 3, 3 / 4, 4 / 5]


def test_gap_of_margins_at_noise() -> None:
    """Without a margin the log-odds, log 4; with margin 3 where both slopes meet."""
    assert noisy_gap(0.2, 0.0) == pytest.approx(math.log(4), abs=1e-12)
    gap = noisy_gap(0.2, 3.0)
    assert 0.8 / (1 + math.exp(gap - 3)) == pytest.approx(0.2 / (1 + math.exp(-gap - 3)), abs=1e-12)


def test_rows_judge() -> None:
    assert Row.number("a", "b", 1.0, 1.0005, 1e-3).status == "pass"
    assert Row.number("a", "b", 1.0, 1.01, 1e-3).status == "miss"
    assert Row.number("a", "b", 1.0, math.nan, 1e-3).status == "miss"
    assert Row.number("a", "b", 1.0, 2.0, None).status == "told"
    assert Row.at_least("a", "b", 8.0, 7.9).status == "miss"
    assert Row.at_least("a", "b", 8.0, math.nan).status == "miss"
    assert [Row.over("a", "b", 0.5, ours).status for ours in (0.51, 0.5, math.nan)] == ["pass", "miss", "miss"]
    assert Row.at_most("a", "b", 1e-3, 1e-9).status == "pass"
    nan = torch.full((1, 2), math.nan)
    half = torch.full((1, 2), 0.5)
    assert Row.policy("a", "b", half, [half, nan], torch.zeros(1, 2), 1e-3).status == "miss"


def test_a_loss_that_breaks_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "lost", LOSSES["dpo"])
    assert verify("lost", Stack())[0].status == "miss"


def test_names_and_stacks_that_are_not_there() -> None:
    assert names() == [*LOSSES, *TRANSFORMS, *PAL, *DECODERS]
    assert names(["ipo", "dpo"]) == ["dpo", "ipo"]
    with pytest.raises(ValueError, match="did you mean 'ln_dpo'"):
        names(["lndpo"])
    with pytest.raises(ValueError, match="float64, float32"):
        make_stack("cpu", "bfloat16")
    with pytest.raises(ValueError, match="device nowhere cannot hold"):
        make_stack("nowhere", "float32")
