"""Self-play losses: published vectors, identities of the game by enumeration, limits and invariances."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.losses.catalogue import LOSSES
from align.losses.pairwise import dpo, ipo, slic
from align.losses.selfplay import (
    all_pair_values,
    all_pairs,
    argmax_labels,
    draw_labels,
    gpo,
    gpo_pointwise,
    mean_scores,
    mixture_logps,
    nash_md_pg,
    sppo,
    sppo_pointwise,
)
from align.losses.types import PairLogps, SequenceLogps


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logps(total, length: int = 1) -> SequenceLogps:
    total = total if isinstance(total, torch.Tensor) else f64(total)
    return SequenceLogps(total, torch.full(total.shape, length))


def margin(h: float) -> tuple[PairLogps, PairLogps]:
    """A pair whose log-ratios differ by h."""
    return PairLogps(logps([h]), logps([0.0])), PairLogps(logps([0.0]), logps([0.0]))


# Biased rock, paper, scissors: three answers of one token, and the reference policy over them.
GAME = f64([[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]])
MU = f64([0.6, 0.3, 0.1])
NASH = {
    1.0: [0.6436598975, 0.2396233615, 0.116716741],
    0.1: [0.4534849783, 0.1488411615, 0.3976738603],
    0.05: [0.3255862078, 0.2146155573, 0.4597982349],
}
# Two steps over two tokens: (first token), (second after 0), (second after 1).
MU_STEPS = f64([[0.5, 0.5], [0.2, 0.8], [0.6, 0.4]])


def game_gradients(theta, tau, game=GAME, opponent=None, labels=lambda p: p):
    """Expected gradients in the logits ``theta``, each pair of answers weighed by its probability.

    Returns that of soft IPO on two draws of the opponent's policy (None: theta's own) and that of Nash-MD-PG on a draw
    of theta's against one of the opponent's.
    """
    theta = theta.clone().requires_grad_()
    log_pi, log_mu = theta.log_softmax(0), MU.log()
    pi = log_pi.detach().exp()
    opponent = pi if opponent is None else opponent
    y, other = map(f_long, zip(*itertools.product(range(3), range(3)), strict=True))
    policy = PairLogps(logps(log_pi[y]), logps(log_pi[other]))
    reference = PairLogps(logps(log_mu[y]), logps(log_mu[other]))
    pairs = ipo(policy, reference, labels(game[y, other]), beta=tau).loss
    single = nash_md_pg(policy.chosen, reference.chosen, labels(game[y, other]), beta=tau).loss
    (by_ipo,) = torch.autograd.grad((opponent[y] * opponent[other] * pairs).sum(), theta, retain_graph=True)
    (by_pg,) = torch.autograd.grad((pi[y] * opponent[other] * single).sum(), theta)
    return by_ipo, by_pg


def f_long(values) -> torch.Tensor:
    return torch.tensor(values)


# --- online IPO, DPO and SLiC ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tau", "ipo_loss", "dpo_loss", "slic_loss"),
    [(0.1, 18.49, 0.6587595555486971, 0.93), (1.0, 0.04, 0.4031860488854579, 0.3)],
)
def test_hard_labels(tau, ipo_loss, dpo_loss, slic_loss):
    """A margin of .7: (.7 - 1/(2 tau))^2, -log sigma(.7 tau) and 1 - .7 tau; a label of 1 is no label."""
    pair = margin(0.7)
    for sure in ((), (f64([1.0]),)):
        assert ipo(*pair, *sure, beta=tau).loss.item() == pytest.approx(ipo_loss, rel=1e-12)
        assert dpo(*pair, *sure, beta=tau).loss.item() == pytest.approx(dpo_loss, rel=1e-12)
        assert slic(*pair, *sure, beta=tau).loss.item() == pytest.approx(slic_loss, rel=1e-12)


def test_soft_labels():
    """At p = .8, tau = 1, margin .7: IPO (.7 - .3)^2 = .16; expected hard IPO .8 * .04 + .2 * 1.44 = .32.

    DPO .8 * .40318... + .2 * (.40318... + .7) = 0.5431860488854579; SLiC .8 * .3 + .2 * 1.7 = .58.
    """
    pair, p = margin(0.7), f64([0.8])
    assert ipo(*pair, p, beta=1.0).loss.item() == pytest.approx(0.16, rel=1e-12)
    hard = 0.8 * ipo(*pair, f64([1.0]), beta=1.0).loss + 0.2 * ipo(*pair, f64([0.0]), beta=1.0).loss
    assert hard.item() == pytest.approx(0.32, rel=1e-12)
    assert dpo(*pair, p, beta=1.0).loss.item() == pytest.approx(0.5431860488854579, rel=1e-12)
    assert slic(*pair, p, beta=1.0).loss.item() == pytest.approx(0.58, rel=1e-12)


@given(h=st.floats(-20, 20), p=st.floats(0, 1), tau=st.floats(0.05, 5))
def test_drawn_labels_keep_the_expected_gradient(h, p, tau):
    """Hard less soft IPO is p (1 - p) / tau^2 whatever the margin: a constant, so that the gradients agree."""
    pair = margin(h)
    hard = p * ipo(*pair, f64([1.0]), beta=tau).loss + (1 - p) * ipo(*pair, f64([0.0]), beta=tau).loss
    gap = (hard - ipo(*pair, f64([p]), beta=tau).loss).item()
    assert gap == pytest.approx(p * (1 - p) / tau**2, rel=1e-8, abs=1e-9 * (1 + h * h))


def test_drawn_labels_are_bernoulli():
    """20,000 draws at .3: a mean within 5 standard errors, 5 sqrt(.21/20000) = .0162. 0 and 1 are sure."""
    seed = torch.Generator().manual_seed(0)
    drawn = draw_labels(torch.full((20_000,), 0.3), seed)
    assert set(drawn.tolist()) == {0.0, 1.0}
    assert drawn.mean().item() == pytest.approx(0.3, abs=0.0162)
    assert torch.equal(drawn, draw_labels(torch.full((20_000,), 0.3), torch.Generator().manual_seed(0)))
    assert draw_labels(f64([0.0, 1.0])).tolist() == [0.0, 1.0]
    assert draw_labels(torch.tensor([0.5], dtype=torch.bfloat16)).dtype == torch.float32


def test_argmax_labels_and_ties():
    assert argmax_labels(f64([0.2, 0.5, 0.51, 1.0])).tolist() == [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("tau", list(NASH))
def test_the_equilibrium_is_stationary_and_argmax_labels_move_it(tau):
    """At the published equilibria both gradients vanish (to the ten digits given); under 1[p > 1/2] they do not."""
    theta = f64(NASH[tau]).log()
    for gradient in game_gradients(theta, tau):
        assert gradient.abs().max().item() < 2e-8 / tau
    for gradient in game_gradients(theta, tau, labels=argmax_labels):
        assert gradient.abs().max().item() > 5e-3


def test_gradient_identity_of_online_ipo():
    """Theta (.3, -.2, .5), tau .4: the gradient of online IPO is -4/tau that of P(pi > SG pi) - tau KL(pi || mu).

    The same by three ways: the loss, the policy-gradient surrogate times 4/tau, and autograd of the objective.
    """
    theta, tau = f64([0.3, -0.2, 0.5]), 0.4
    expected = f64([-1.1205755563, -0.4897577208, 1.6103332771])
    by_ipo, by_pg = game_gradients(theta, tau)
    torch.testing.assert_close(by_ipo, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(4 / tau * by_pg, by_ipo, rtol=0, atol=1e-14)
    theta.requires_grad_()
    pi = theta.softmax(0)
    objective = pi @ GAME @ pi.detach() - tau * (pi * (pi.log() - MU.log())).sum()
    (by_objective,) = torch.autograd.grad(-4 / tau * objective, theta)
    torch.testing.assert_close(by_objective, by_ipo, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("coefficient", "pi", "mixture"),
    [
        (
            0.125,
            [0.6678847076, 0.1914306951, 0.1406845973],
            [0.6614482987, 0.2032420053, 0.135309696],
        ),
        (0.5, None, NASH[1.0]),
    ],
)
def test_ipo_md_ends_where_its_mixture_is_the_equilibrium(coefficient, pi, mixture):
    """Tau = .5: pi is proportional to mu exp(p(. > pi_c) / tau), and pi_c is the equilibrium of tau / (1 - c).

    At c = .5 that is the equilibrium of tau = 1, so that pi comes from its mixture.
    """
    tau, mixture = 0.5, f64(mixture)
    theta = MU.log() + GAME @ mixture / tau
    if pi is not None:
        torch.testing.assert_close(theta.softmax(0), f64(pi), rtol=0, atol=1e-9)
    mixed = mixture_logps(theta, MU.log(), coefficient=coefficient).exp()
    torch.testing.assert_close(mixed, mixture, rtol=0, atol=1e-9)
    for gradient in game_gradients(theta, tau, opponent=mixture):
        assert gradient.abs().max().item() < 1e-8
    for gradient in game_gradients(mixture.log(), tau / (1 - coefficient)):
        assert gradient.abs().max().item() < 1e-8


def test_all_pairs_come_in_one_order():
    group = SequenceLogps(f64([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]]), torch.tensor([[1, 2, 3], [4, 5, 6]]))
    pairs = all_pairs(group)
    assert pairs.chosen.total.tolist() == [-1.0, -1.0, -2.0, -4.0, -4.0, -5.0]
    assert pairs.rejected.total.tolist() == [-2.0, -3.0, -3.0, -5.0, -6.0, -6.0]
    assert pairs.chosen.length.tolist() == [1, 1, 2, 4, 4, 5]
    assert pairs.rejected.length.tolist() == [2, 3, 3, 5, 6, 6]
    matrix = torch.arange(18.0).view(2, 3, 3)
    assert all_pair_values(matrix).tolist() == [1.0, 2.0, 5.0, 10.0, 11.0, 14.0]


# --- the mixture -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coefficient", "expected", "log_z"),
    [
        (0.125, [0.6206283048, 0.2379097258, 0.1414619693], -0.12289079339085389),
        (0.5, [0.3506753763, 0.3246623119, 0.3246623119], None),
    ],
)
def test_mixture_vectors(coefficient, expected, log_z):
    """Pi = (.7, .2, .1), mu = (.1, .3, .6); log Z is what normalising takes off at every token."""
    log_pi, log_mu = f64([0.7, 0.2, 0.1]).log(), f64([0.1, 0.3, 0.6]).log()
    mixed = mixture_logps(log_pi, log_mu, coefficient=coefficient)
    torch.testing.assert_close(mixed.exp(), f64(expected), rtol=0, atol=1e-10)
    constant = (1 - coefficient) * log_pi + coefficient * log_mu - mixed
    torch.testing.assert_close(constant, constant[:1].expand(3), rtol=0, atol=1e-14)
    if log_z is not None:
        assert constant[0].item() == pytest.approx(log_z, rel=1e-12)
    # Logits and log-probs mix alike: a constant of each model is normalised away.
    torch.testing.assert_close(mixture_logps(log_pi + 7, log_mu - 40, coefficient=coefficient), mixed)


def test_token_mixtures_are_not_the_mixture_of_sequences():
    """Pi = (.8, .2), (.9, .1), (.3, .7) against MU_STEPS at c = 1/2.

    First token: sqrt(.4) to sqrt(.1) is 2/3 to 1/3. After 0 sqrt(.18) to sqrt(.08) is .6 to .4, so .4 and .2666...
    """
    pi = f64([[0.8, 0.2], [0.9, 0.1], [0.3, 0.7]])
    step = mixture_logps(pi.log(), MU_STEPS.log(), coefficient=0.5).exp()
    by_token = (step[0][:, None] * step[1:]).flatten()
    torch.testing.assert_close(by_token, f64([0.4, 0.2666666667, 0.1483314774, 0.185001856]), rtol=0, atol=1e-10)
    sequences = [(p[0][:, None] * p[1:]).flatten().log() for p in (pi, MU_STEPS)]
    whole = mixture_logps(*sequences, coefficient=0.5).exp()
    torch.testing.assert_close(whole, f64([0.358387456, 0.2389249707, 0.179193728, 0.2234938453]), rtol=0, atol=1e-9)


def test_the_ends_of_the_mixture_are_exact_and_ruled_out_tokens_stay_out():
    """-inf weighs nothing at 0, where 0 * -inf would be NaN, and rules out everywhere else."""
    policy, reference = f64([0.3, -torch.inf, 1.0]), f64([-torch.inf, 0.2, 2.0])
    assert torch.equal(mixture_logps(policy, reference, coefficient=0.0), policy.log_softmax(-1))
    assert torch.equal(mixture_logps(policy, reference, coefficient=1), reference.log_softmax(-1))
    assert mixture_logps(policy, reference, coefficient=0.5).exp().tolist() == [0.0, 0.0, 1.0]
    policy.requires_grad_()
    mixture_logps(policy, f64([0.0, 0.0, 0.0]), coefficient=0.5)[[0, 2]].sum().backward()
    assert torch.isfinite(policy.grad).all()
    assert mixture_logps(torch.zeros(2, 4, 5).bfloat16(), torch.zeros(2, 4, 5), coefficient=0.1).shape == (2, 4, 5)


# --- Nash-MD-PG ------------------------------------------------------------------------------------------------------


def test_nash_md_pg_by_hand():
    """P = .8, log-ratio .5, tau .2: the coefficient is .3 - .1 = .2; S = -2, so the surrogate is .4."""
    total = f64([-2.0]).requires_grad_()
    out = nash_md_pg(logps(total), logps([-2.5]), f64([0.8]), beta=0.2)
    assert out.loss.item() == pytest.approx(0.4, rel=1e-12)
    assert out.rewards.tolist() == [[pytest.approx(0.2, rel=1e-12)]]
    out.loss.sum().backward()
    assert total.grad.item() == pytest.approx(-0.2, rel=1e-12)


def two_step_gradient(theta: torch.Tensor, coefficients) -> torch.Tensor:
    """Expected gradient in two-step logits of a surrogate of token log-probs and token log-ratios."""
    theta = theta.clone().requires_grad_()
    steps, reference = theta.log_softmax(1), MU_STEPS.log()
    terms = []
    for a, b in itertools.product(range(2), range(2)):
        tokens = torch.stack([steps[0, a], steps[1 + a, b]])
        ratios = tokens.detach() - torch.stack([reference[0, a], reference[1 + a, b]])
        terms.append(tokens.sum().detach().exp() * coefficients(tokens, ratios))
    return torch.autograd.grad(torch.stack(terms).sum(), theta)[0].flatten()


def test_the_kl_gradient_takes_the_log_ratio_of_the_whole_answer():
    """Logits (.5, 0), (-.7, 0), (-.6, 0) against MU_STEPS, p = 1/2 and tau = 1: the surrogate descends the KL alone.

    A coefficient per token, as in TRL's Nash-MD, is right in the last step and wrong before it: .1175 for .0999.
    """
    theta = f64([[0.5, 0.0], [-0.7, 0.0], [-0.6, 0.0]])
    true = f64([0.0999131918, -0.0999131918, 0.0947135953, -0.0947135953, -0.0868474058, 0.0868474058])
    shortcut = torch.cat([f64([0.1175018561, -0.1175018561]), true[2:]])

    def whole(tokens, ratios):
        policy = SequenceLogps(tokens.sum()[None], torch.tensor([2]))
        reference = SequenceLogps((tokens.detach() - ratios).sum()[None], torch.tensor([2]))
        return nash_md_pg(policy, reference, f64([0.5]), beta=1.0).loss[0]

    def by_token(tokens, ratios):
        length = torch.tensor([1, 1])
        policy, reference = SequenceLogps(tokens, length), SequenceLogps(tokens.detach() - ratios, length)
        return nash_md_pg(policy, reference, f64([0.5, 0.5]), beta=1.0).loss.sum()

    torch.testing.assert_close(two_step_gradient(theta, whole), true, rtol=0, atol=1e-10)
    torch.testing.assert_close(two_step_gradient(theta, by_token), shortcut, rtol=0, atol=1e-10)
    theta.requires_grad_()
    steps, reference = theta.log_softmax(1), MU_STEPS.log()
    joint = steps[0][:, None] + steps[1:]
    kl = (joint.exp() * (joint - reference[0][:, None] - reference[1:])).sum()
    torch.testing.assert_close(torch.autograd.grad(kl, theta)[0].flatten(), true, rtol=0, atol=1e-10)


# --- GPO and SPPO ----------------------------------------------------------------------------------------------------

SCORES = f64([[[0.0, 1.2, -0.4], [-1.2, 0.0, 0.8], [0.4, -0.8, 0.0]]])
RATIOS = [[0.5, -0.3, 0.1]]


def test_mean_scores_are_neither_doubled_nor_diluted():
    """The rows' sums .8, -.4, -.4 over two opponents; with the self-score of 0 over three.

    The public script takes s_ij - s_ji of a table that is antisymmetric already, twice the score, over K: 4/3 of ours.
    """
    torch.testing.assert_close(mean_scores(SCORES), f64([[0.4, -0.2, -0.2]]), rtol=0, atol=1e-15)
    own = mean_scores(SCORES, include_self=True)
    torch.testing.assert_close(own, f64([[0.8, -0.4, -0.4]]) / 3, rtol=0, atol=1e-15)
    public = (SCORES - SCORES.mT).sum(-1) / 3
    torch.testing.assert_close(public, f64([[0.5333333333, -0.2666666667, -0.2666666667]]), rtol=0, atol=1e-9)
    torch.testing.assert_close(public, mean_scores(SCORES) * 2 * (3 - 1) / 3)


def test_gpo_and_sppo_vectors():
    """Beta .1 and means over three: (.5 - 8/3)^2 = 4.694...; SPPO aims at (mean sigma(s) - 1/2) / .1 = .566..."""
    policy, previous = logps(RATIOS), logps([[0.0, 0.0, 0.0]])
    out = gpo_pointwise(policy, previous, mean_scores(SCORES, include_self=True), beta=0.1)
    torch.testing.assert_close(out.loss, f64([[4.6944444444, 1.0677777778, 2.0544444444]]), rtol=0, atol=1e-10)
    torch.testing.assert_close(out.rewards, f64([[0.05, -0.03, 0.01]]))
    rates = mean_scores(torch.sigmoid(SCORES) - 0.5, include_self=True) + 0.5
    aims = f64([[0.5661237446, -0.2618343412, -0.3042894034]])
    torch.testing.assert_close((rates - 0.5) / 0.1, aims, rtol=0, atol=1e-9)
    assert sppo_pointwise(logps(aims), previous, rates, beta=0.1).loss.max().item() < 1e-18
    torch.testing.assert_close(
        sppo_pointwise(policy, previous, rates, beta=0.1).loss, (f64(RATIOS) - aims) ** 2, rtol=0, atol=1e-9
    )


def test_gpo_on_differences_by_hand():
    """Scores (.4, -.2, -.2) at beta 1: misses h - s are (.1, -.1, .3), differences .2, -.2, -.4: mean .24/3 = .08."""
    out = gpo(logps(RATIOS), logps([[0.0] * 3]), mean_scores(SCORES), beta=1.0)
    assert out.loss.tolist() == [pytest.approx(0.08, rel=1e-12)]
    win_rates = f64([[0.9, 0.3, 0.3]])
    assert sppo(logps(RATIOS), logps([[0.0] * 3]), win_rates, beta=1.0).loss.tolist() == [pytest.approx(0.08)]


@given(logits=st.lists(st.floats(-2, 2), min_size=3, max_size=3), beta=st.floats(0.2, 5))
def test_the_closed_form_is_a_zero_of_the_differences_alone(logits, beta):
    """Pi_t exp(s / beta) / Z: differences lose log Z; each answer by itself misses by it, and by nothing else."""
    previous = f64(logits).log_softmax(0)
    scores = SCORES[0] @ previous.exp()
    step = previous + scores / beta
    log_z = step.logsumexp(0)
    policy = logps((step - log_z)[None])
    assert gpo(policy, logps(previous[None]), scores[None], beta=beta).loss.item() < 1e-24
    missed = gpo_pointwise(policy, logps(previous[None]), scores[None], beta=beta).loss
    torch.testing.assert_close(missed, (log_z**2).expand(1, 3), rtol=1e-9, atol=1e-15)


@given(
    misses=st.lists(st.floats(-5, 5), min_size=2, max_size=6),
    p=st.floats(0, 1),
    h=st.floats(-5, 5),
    beta=st.floats(0.1, 5),
)
def test_identities_of_the_regression(misses, p, h, beta):
    """Mean squared difference = twice the unbiased variance; SPPO on two answers is soft IPO at half its beta."""
    k = len(misses)
    loss = gpo(logps([misses]), logps([[0.0] * k]), f64([[0.0] * k]), beta=beta).loss.item()
    assert loss == pytest.approx(2 * f64(misses).var().item(), rel=1e-9, abs=1e-12)
    two = sppo(logps([[h, 0.0]]), logps([[0.0, 0.0]]), f64([[p, 1 - p]]), beta=beta).loss.item()
    assert two == pytest.approx(ipo(*margin(h), f64([p]), beta=beta / 2).loss.item(), rel=1e-9, abs=1e-12)


@given(
    skew=st.lists(st.floats(-3, 3), min_size=10, max_size=10),
    ratios=st.lists(st.floats(-3, 3), min_size=5, max_size=5),
    beta=st.floats(0.2, 5),
)
def test_sppo_on_means_over_the_whole_group_is_soft_ipo(skew, ratios, beta):
    """Gradients, pair by pair of five answers; with means over the other four they are IPO's at 4/5 of beta."""
    table = torch.zeros(1, 5, 5, dtype=torch.float64)
    i, j = torch.triu_indices(5, 5, 1)
    table[0, i, j] = f64(skew)
    p = torch.sigmoid(table - table.mT)
    total = f64([ratios]).requires_grad_()
    policy, previous = SequenceLogps(total, torch.ones(1, 5)), logps([[0.0] * 5])
    for own, strength in ((True, beta), (False, 0.8 * beta)):
        rates = mean_scores(p - 0.5, include_self=own) + 0.5
        (ours,) = torch.autograd.grad(sppo(policy, previous, rates, beta=beta).loss.sum(), total)
        pairs = ipo(all_pairs(policy), all_pairs(previous), all_pair_values(p), beta=strength)
        (theirs,) = torch.autograd.grad(pairs.loss.mean(), total)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_farthest_scores_of_many_answers():
    """20 scores of +-1e6 in turn at beta 1e-12: 100 of 190 pairs miss by 2e18, and the mean is 100/190 4e36."""
    group = SequenceLogps(torch.full((1, 20), -1.0, requires_grad=True), torch.ones(1, 20))
    loss = gpo(group, group, 1e6 * torch.tensor([[1.0, -1.0] * 10]), beta=1e-12).loss
    assert loss.item() == pytest.approx(100 / 190 * 4e36, rel=1e-6)
    loss.sum().backward()
    assert torch.isfinite(group.total.grad).all()


def test_gpo_at_four_times_the_beta_is_sppo_for_small_scores():
    """Sigma(s) - 1/2 = s/4 - s^3/48 + ...: at |s| of 1e-3 the losses agree to 1e-6 relative."""
    policy, previous, small = logps(RATIOS), logps([[0.0] * 3]), SCORES * 1e-3
    rates = mean_scores(torch.sigmoid(small) - 0.5) + 0.5
    torch.testing.assert_close(
        sppo(policy, previous, rates, beta=1e-3).loss,
        gpo(policy, previous, mean_scores(small), beta=4e-3).loss,
        rtol=1e-6,
        atol=0,
    )


# --- laws ------------------------------------------------------------------------------------------------------------

PREVIOUS = [[-4.0, -6.0, -3.0], [-2.0, -1.0, -9.0]]
POLICY = [[-3.5, -6.3, -2.9], [-2.5, -0.8, -8.0]]
TARGETS = [[0.3, 0.9, 0.1], [0.6, 0.5, 0.2]]
REGRESSIONS = [gpo, gpo_pointwise, sppo, sppo_pointwise]


@pytest.mark.parametrize("loss", REGRESSIONS)
def test_gradient_equals_finite_differences(loss):
    total = f64(POLICY).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: loss(logps(x, 5), logps(PREVIOUS, 5), f64(TARGETS), beta=0.5).loss, total
    )


@pytest.mark.parametrize("loss", [gpo, sppo])
def test_differences_do_not_know_a_prompts_constants(loss):
    """A constant of a prompt in the log-probs, or in the scores, changes nothing; not so the published forms."""
    base = loss(logps(POLICY), logps(PREVIOUS), f64(TARGETS), beta=0.5).loss
    moved = f64(POLICY) + f64([[0.7], [-3.0]])
    torch.testing.assert_close(loss(logps(moved), logps(PREVIOUS), f64(TARGETS), beta=0.5).loss, base)
    torch.testing.assert_close(loss(logps(POLICY), logps(PREVIOUS), f64(TARGETS) + 0.05, beta=0.5).loss, base)
    pointwise = LOSSES[f"{loss.__name__}_pointwise"].function
    before = pointwise(logps(POLICY), logps(PREVIOUS), f64(TARGETS), beta=0.5).loss
    assert (pointwise(logps(moved), logps(PREVIOUS), f64(TARGETS), beta=0.5).loss - before).abs().max() > 0.1


@pytest.mark.parametrize("loss", REGRESSIONS)
@given(order=st.permutations(range(3)), shift=st.floats(-10, 10))
def test_answers_in_another_order(loss, order, shift):
    """Answers and targets permuted together: the same losses. So with a constant in policy and previous alike."""
    base = loss(logps(POLICY), logps(PREVIOUS), f64(TARGETS), beta=0.5)
    moved = loss(
        logps(f64(POLICY)[:, order] + shift), logps(f64(PREVIOUS)[:, order] + shift), f64(TARGETS)[:, order], beta=0.5
    )
    expected = base.loss if base.loss.ndim == 1 else base.loss[:, order]
    torch.testing.assert_close(moved.loss, expected)
    torch.testing.assert_close(moved.rewards, base.rewards[:, order])


@pytest.mark.parametrize("loss", REGRESSIONS)
def test_rows_do_not_touch_each_other(loss):
    together = loss(logps(POLICY), logps(PREVIOUS), f64(TARGETS), beta=0.5).loss
    for row in range(2):
        alone = loss(logps([POLICY[row]]), logps([PREVIOUS[row]]), f64([TARGETS[row]]), beta=0.5).loss
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("loss", REGRESSIONS)
def test_gradients_flow_through_the_policy_alone(loss):
    """On policy the previous iterate is the policy: h = 0, and the targets still pull."""
    policy, targets = f64(POLICY).requires_grad_(), f64(TARGETS).requires_grad_()
    out = loss(logps(policy), logps(policy), targets, beta=0.5)
    out.loss.sum().backward()
    assert targets.grad is None
    assert policy.grad.abs().max(1).values.min().item() > 0.1
    assert not out.rewards.requires_grad


def test_the_coefficient_of_nash_md_pg_is_detached():
    policy, reference, p = (f64(x).requires_grad_() for x in ([-2.0, -3.0], [-2.5, -1.0], [0.8, 0.1]))
    out = nash_md_pg(logps(policy), logps(reference), p, beta=0.2)
    out.loss.sum().backward()
    assert torch.equal(policy.grad, -out.rewards[:, 0])
    assert reference.grad is None
    assert p.grad is None


@pytest.mark.parametrize("loss", REGRESSIONS)
def test_extreme_log_ratios_are_finite(loss):
    total = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    out = loss(logps(total), logps(torch.zeros(1, 3)), torch.tensor([[0.0, 1.0, 0.5]]), beta=1e-3)
    out.loss.sum().backward()
    assert torch.isfinite(out.loss).all()
    assert torch.isfinite(total.grad).all()


@pytest.mark.parametrize("loss", REGRESSIONS)
def test_bf16_inputs_compute_in_float32(loss):
    """Halves are exact in bf16."""

    def at(dtype):
        policy, previous, targets = (torch.tensor([x], dtype=dtype) for x in ([-4.5, -6.0], [-4.0, -6.5], [0.5, 1.0]))
        return loss(logps(policy), logps(previous), targets, beta=0.5).loss

    assert at(torch.bfloat16).dtype == torch.float32
    assert torch.equal(at(torch.bfloat16), at(torch.float32))


GROUP, ONE = logps(PREVIOUS), logps([-1.0, -2.0])
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nash_md_pg(ONE, ONE, f64([0.5, 1.2]), beta=0.1), r"preference\[1\] is 1.2: a probability"),
        (lambda: nash_md_pg(ONE, ONE, f64([NAN, 0.5]), beta=0.1), r"preference\[0\] is nan"),
        (lambda: nash_md_pg(ONE, ONE, f64([0.5]), beta=0.1), r"preference has shape \(1,\) and must have \(2,\)"),
        (lambda: nash_md_pg(ONE, ONE, f64([0.5, 0.5]), beta=0.0), "beta is 0.0: it must be positive"),
        (
            lambda: nash_md_pg(ONE, logps([-1.0]), f64([0.5, 0.5]), beta=0.1),
            r"policy has shape \(2,\) and reference has",
        ),
        (lambda: nash_md_pg(GROUP, GROUP, f64(TARGETS), beta=0.1), r"policy has shape \(2, 3\) and must have \(B,\)"),
        (lambda: gpo(ONE, ONE, f64([0.1, 0.2]), beta=0.1), r"policy has shape \(2,\) and must have \(B, K\)"),
        (lambda: gpo(logps([[-1.0]]), logps([[-1.0]]), f64([[0.0]]), beta=0.1), "policy has 1 answers a prompt"),
        (lambda: gpo(GROUP, GROUP, f64([[0.0, INF, 0.0], [0.0] * 3]), beta=0.1), r"scores\[0, 1\] is inf"),
        (lambda: gpo(GROUP, GROUP, f64([0.0]), beta=0.1), r"scores has shape \(1,\)"),
        (lambda: gpo(GROUP, GROUP, f64(TARGETS), beta=-1.0), "beta is -1.0"),
        (lambda: gpo_pointwise(GROUP, GROUP, f64(TARGETS), beta=NAN), "beta is nan"),
        (
            lambda: gpo_pointwise(GROUP, logps(PREVIOUS, 2), f64(TARGETS), beta=1.0),
            r"policy.length\[0, 0\] is 1 and previous.length\[0, 0\] is ",
        ),
        (lambda: sppo(GROUP, GROUP, f64([[0.5] * 3, [0.5, -0.1, 0.5]]), beta=1.0), r"win_rates\[1, 1\] is -0.1"),
        (lambda: sppo_pointwise(GROUP, GROUP, f64([[0.5]]), beta=1.0), r"win_rates has shape \(1, 1\)"),
        (lambda: all_pairs(ONE), r"group has shape \(2,\) and must have \(B, K\)"),
        (lambda: all_pairs(logps([[-1.0]])), "group has 1 answers a prompt: pairs take two or more"),
        (lambda: all_pair_values(f64([[0.5]])), r"matrix has shape \(1, 1\) and must have \(B, K, K\)"),
        (lambda: all_pair_values(torch.zeros(1, 2, 3)), r"matrix has shape \(1, 2, 3\)"),
        (lambda: mean_scores(torch.zeros(1, 1, 1)), "scores has 1 answers a prompt"),
        (lambda: mean_scores(GAME[None]), r"scores\[0, 0, 0\] is 0.5 and its mirror image 0.5"),
        (lambda: mean_scores(SCORES * NAN), r"scores\[0, 0, 0\] is nan"),
        (lambda: draw_labels(f64([0.5, -0.5])), r"preference\[1\] is -0.5"),
        (lambda: argmax_labels(f64([2.0])), r"preference\[0\] is 2.0"),
        (lambda: mixture_logps(MU, MU, coefficient=1.5), r"coefficient is 1.5: it must be in \[0, 1\]"),
        (lambda: mixture_logps(MU, MU, coefficient=NAN), "coefficient is nan"),
        (lambda: mixture_logps(MU, MU[:2], coefficient=0.5), r"shape \(3,\) and \(2,\).*one vocabulary"),
        (lambda: mixture_logps(MU, MU * NAN, coefficient=0.5), r"reference\[0\] is nan"),
        (lambda: mixture_logps(f64([0.0, INF]), f64([0.0, 0.0]), coefficient=0.5), r"policy\[1\] is inf"),
        (lambda: mixture_logps(f64([[0.0, -INF]]), f64([[-INF, 0.0]]), coefficient=0.5), r"reference\[0\] leave no"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_table_has_them():
    for name in ("nash_md_pg", "gpo", "gpo_pointwise", "sppo", "sppo_pointwise", "mdpo"):
        info = LOSSES[name]
        assert info.kind == "selfplay"
        assert info.laws is not None
        assert ("beta" in info.parameters) == (info.default_beta is not None)
