"""Weighted sums of losses, the table that they come from, and the carriers' checks."""

from __future__ import annotations

import pytest
import torch

from align.losses import LOSSES, Loss, PairLogps, SequenceLogps, combine, dpo, ln_dpo, sft, simpo

POLICY = ([-0.5, -1.0, -0.2], [-0.9, -0.3, -1.5, -0.8, -0.6])
REFERENCE = ([-0.7, -1.1, -0.4], [-0.8, -0.4, -1.2, -0.9, -0.5])


def logps(chosen: list[float], rejected: list[float]) -> PairLogps:
    return pairs([sum(chosen)], [sum(rejected)], [len(chosen)], [len(rejected)])


def pairs(chosen, rejected, chosen_length, rejected_length) -> PairLogps:
    def one(total, length) -> SequenceLogps:
        return SequenceLogps(torch.tensor(total, dtype=torch.float64), torch.tensor(length))

    return PairLogps(one(chosen, chosen_length), one(rejected, rejected_length))


def test_combination_by_hand():
    """0.8 DPO(.1) + 0.2 SFT on the published vector: 0.8 * 0.65394696731759 + 0.2 * 1.7/3; rewards: DPO's alone."""
    out = combine([Loss.of("dpo", weight=0.8, beta=0.1), Loss.of(sft, weight=0.2)], logps(*POLICY), logps(*REFERENCE))
    assert out.loss.item() == pytest.approx(0.8 * 0.65394696731759 + 0.2 * 1.7 / 3, rel=1e-12)
    assert out.metrics["loss/dpo"].item() == pytest.approx(0.65394696731759, rel=1e-12)
    assert out.metrics["loss/sft"].item() == pytest.approx(1.7 / 3, rel=1e-12)
    assert out.chosen_rewards.item() == pytest.approx(0.8 * 0.1 * 0.5, rel=1e-12)
    assert out.rejected_rewards.item() == pytest.approx(0.8 * 0.1 * -0.3, rel=1e-12)


def test_a_likelihood_term_gives_no_margin():
    """At the reference DPO's rewards are 0, whatever the likelihoods are; ranking terms add up (.1 + .2 = .3)."""
    policy, reference = logps(*POLICY), logps(*REFERENCE)
    out = combine([Loss.of("dpo"), Loss.of("sft")], policy, policy)
    assert out.rewards.tolist() == [[0.0, 0.0]]
    out = combine([Loss.of("dpo", beta=0.1), Loss.of("sft"), Loss.of("slic", beta=0.2)], policy, reference)
    assert out.chosen_rewards.item() == pytest.approx(0.3 * 0.5, rel=1e-12)


def test_without_a_ranking_term_the_rewards_are_all_terms():
    """0.25 SFT + 0.5 SFT: three quarters of the mean log-probs -1.7/3 and -4.1/5."""
    policy = logps(*POLICY)
    out = combine([Loss.of("sft", weight=0.25), Loss.of("sft", weight=0.5)], policy, None)
    assert out.chosen_rewards.item() == pytest.approx(0.75 * -1.7 / 3, rel=1e-12)
    assert out.rejected_rewards.item() == pytest.approx(0.75 * -4.1 / 5, rel=1e-12)


def test_two_terms_of_one_loss_keep_their_metrics():
    """Margins 0.08 and 1.6: the published values of DPO at beta 0.1 and 2."""
    out = combine([Loss.of("dpo", beta=0.1), Loss.of("dpo", beta=2.0)], logps(*POLICY), logps(*REFERENCE))
    assert list(out.metrics) == ["loss/dpo", "loss/dpo_2"]
    assert out.metrics["loss/dpo"].item() == pytest.approx(0.65394696731759, rel=1e-12)
    assert out.metrics["loss/dpo_2"].item() == pytest.approx(0.18390074088833896, rel=1e-12)


def test_one_loss_alone_is_itself():
    policy, reference = logps(*POLICY), logps(*REFERENCE)
    assert combine([Loss.of(dpo, beta=0.1)], policy, reference).metrics == {}
    halved = combine([Loss.of(dpo, weight=0.5, beta=0.1)], policy, reference)
    assert halved.loss.item() == pytest.approx(0.65394696731759 / 2, rel=1e-12)


def test_defaults_come_from_the_table():
    assert Loss.of("ln_dpo").settings == {"beta": 5.0}
    assert Loss.of("simpo", gamma=0.5).settings == {"beta": 2.0, "gamma": 0.5}
    assert Loss.of("sft").settings == {}
    assert Loss.of("sft").weight == 1.0


def test_a_loss_stays_as_it_is():
    loss = Loss.of("dpo", weight=0.5, beta=0.3)
    assert Loss.of(loss) is loss


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Loss.of("ln_dop"), "did you mean 'ln_dpo'"),
        (lambda: Loss.of("zzz"), "known losses: .*dpo, ln_dpo"),
        (lambda: Loss.of("dpo", betaa=1.0), "dpo has no setting betaa; it has: beta, label_smoothing"),
        (lambda: Loss.of("slic_hf", beta=1.0), "slic_hf has no setting beta; it has: delta, sft_weight"),
        (
            lambda: Loss.of(test_one_loss_alone_is_itself),
            r"not in the table of losses; .*\(pairwise_loss, .*, selfplay_loss or reward_loss\)",
        ),
        (lambda: Loss.of(Loss.of("dpo"), weight=1.0), "already, and weight came"),
        (lambda: Loss.of(Loss.of("dpo"), weight=0.5, beta=0.3), "already, and weight, beta came"),
        (lambda: Loss.of("dpo")(logps(*POLICY), None), "none was given"),
        (lambda: combine([], logps(*POLICY), None), "at least one"),
        (lambda: dpo(logps(*POLICY), logps(*REFERENCE), beta=0.0), "beta is 0.0"),
        (lambda: ln_dpo(logps(*POLICY), logps(*REFERENCE), beta=float("nan")), "beta is nan"),
        (lambda: simpo(logps(*POLICY), beta=1.0, gamma=-1.0), "gamma is -1.0"),
        (
            lambda: dpo(logps(*POLICY), pairs([-1.0], [-1.0], [4], [5]), beta=1.0),
            r"policy.chosen.length\[0\] is 3 and",
        ),
        (
            lambda: dpo(logps(*POLICY), pairs([-1.0] * 2, [-1.0] * 2, [3] * 2, [5] * 2), beta=1.0),
            r"policy.chosen has shape \(1,\) and reference.chosen has shape \(2,\)",
        ),
        (lambda: logps([float("nan")], [-1.0]), r"total\[0\] is nan"),
        (lambda: logps([-float("inf")], [-1.0]), r"total\[0\] is -inf"),
        (lambda: pairs([-1.0], [-1.0], [0], [1]), r"length\[0\] is 0"),
        (lambda: SequenceLogps(torch.zeros(2), torch.ones(3)), r"shape \(B,\)"),
        (
            lambda: PairLogps(logps(*POLICY).chosen, pairs([0.0] * 2, [0.0] * 2, [1] * 2, [1] * 2).chosen),
            "one of each",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_loss_has_its_facts():
    for info in LOSSES.values():
        assert info.paper.startswith("arXiv:")
        assert info.formula
        assert info.purpose
        assert ("beta" in info.parameters) == (info.default_beta is not None)
        assert info.laws is not None
        assert info.function.__doc__
