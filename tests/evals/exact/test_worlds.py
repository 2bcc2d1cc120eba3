"""Worlds and games: what is enumerated is a distribution, and the known equilibria come out."""

from __future__ import annotations

import pytest
import torch

from align.evals.exact.games import (
    biased_rock_paper_scissors,
    circular_labels,
    fixed_point,
    nash,
    nash_md,
    sequence_mixture,
    token_mixture,
)
from align.evals.exact.worlds import make_world, total_variation


def test_answers_are_every_sequence_up_to_the_limit_once() -> None:
    """Two tokens and EOS, three steps: EOS; a EOS, b EOS; and 4 prefixes with 3 ends each: 15 answers of 1 to 3."""
    world = make_world(seed=0)
    assert world.length.tolist() == [1, 2, 2, *[3] * 12]
    torch.testing.assert_close(world.mu.sum(-1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-14)


def test_any_distribution_is_a_table() -> None:
    world = make_world(seed=1)
    wanted = torch.rand(2, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = wanted / wanted.sum(-1, keepdim=True)
    assert total_variation(world.sequence_logps(world.table(wanted)).exp(), wanted) < 1e-15


def test_labels_are_bradley_terry() -> None:
    world = make_world(seed=2)
    logits = world.labels.logit()
    torch.testing.assert_close(logits[:, 3, 5], world.reward[:, 3] - world.reward[:, 5], rtol=0, atol=1e-12)


@pytest.mark.parametrize("argument", [{"prompts": 0}, {"alphabet": 0}, {"steps": 0}])
def test_a_world_without_a_part_is_none(argument: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="a world needs"):
        make_world(seed=0, **argument)


@pytest.mark.parametrize(
    ("tau", "wanted", "win_rate"),
    [
        (1.0, (0.6436598975, 0.2396233615, 0.1167167410), 0.51921826),
        (0.1, (0.4534849783, 0.1488411615, 0.3976738603), 0.55578946),
        (0.05, (0.3255862078, 0.2146155573, 0.4597982349), 0.53726312),
    ],
)
def test_nash_of_biased_rock_paper_scissors(tau: float, wanted: tuple[float, ...], win_rate: float) -> None:
    p, mu = biased_rock_paper_scissors()
    found = nash(p, mu, tau)
    torch.testing.assert_close(found[0], torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-9)
    assert float(found[0] @ p[0] @ mu[0]) == pytest.approx(win_rate, abs=1e-8)


def test_tabular_nash_md_ends_beside_the_equilibrium_for_a_step_that_is_not_small() -> None:
    p, mu = biased_rock_paper_scissors()
    wanted = torch.tensor([[0.6437922039, 0.2395806657, 0.1166271303]], dtype=torch.float64)
    torch.testing.assert_close(nash_md(p, mu, 1.0, step=0.02, iterations=3000), wanted, rtol=0, atol=1e-9)


def test_ipo_md_makes_its_mixture_the_equilibrium_of_a_stronger_game() -> None:
    p, mu = biased_rock_paper_scissors()
    mixture = sequence_mixture(mu, 0.125)
    policy = fixed_point(p, mu, 0.5, mixture)
    wanted = torch.tensor([[0.6678847076, 0.1914306951, 0.1406845973]], dtype=torch.float64)
    torch.testing.assert_close(policy, wanted, rtol=0, atol=1e-9)
    assert total_variation(mixture(policy), nash(p, mu, 0.5 / 0.875)) < 1e-10


def test_mixtures_of_tokens_and_of_answers_differ_on_two_tokens_alone() -> None:
    one, two = (make_world(seed=0, prompts=1, alphabet=1, steps=steps) for steps in (1, 2))
    for world, differ in ((one, False), (two, True)):
        policy = (world.log_mu + world.reward).softmax(-1)
        gap = total_variation(token_mixture(world, 0.5)(policy), sequence_mixture(world.mu, 0.5)(policy))
        assert (gap > 1e-3) == differ, gap
        assert total_variation(token_mixture(world, 0.0)(policy), policy) < 1e-14


def test_circular_labels_are_a_game() -> None:
    p = circular_labels(2, 5, seed=3)
    torch.testing.assert_close(p + p.transpose(1, 2), torch.ones_like(p))
