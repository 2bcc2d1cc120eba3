"""PAL: one reward an annotator. Numbers by hand, identities, opposed groups of annotators, and new ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from align.losses.pal import pal_hinge, pal_logistic
from align.rewards.pal import Pal, PalA, PalB, load_pal

USERS = [f"user {number}" for number in range(40)]


def by_hand(squared: bool = False) -> PalA:
    """Prototypes (1, 0) and (0, 2), omega (.3, -.2), answers as they are, in float64."""
    model = PalA(2, ["ann"], groups=2, dimension=2, squared=squared).double()
    model.projector = nn.Identity()
    with torch.no_grad():
        model.prototypes.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64))
        model.logits.weight.copy_(torch.tensor([[0.3, -0.2]], dtype=torch.float64))
    return model


LEFT, RIGHT = (torch.tensor([x], dtype=torch.float64) for x in ([0.9, 0.1], [0.2, 1.5]))


def test_ideal_point_by_hand():
    """By hand: w = (.6224593312, .3775406688), a = w^T P = (.6224593312, .7550813376); distances .711, .856."""
    model = by_hand()
    model.requires_grad_(False)
    w = model.weights(["ann"])
    assert w[0].tolist() == pytest.approx([0.6224593312, 0.3775406688])
    assert model.ideals(w, None)[0].tolist() == pytest.approx([0.6224593312, 0.7550813376])
    assert float(model.reward(LEFT, w)) == pytest.approx(-0.7114494934314505, abs=1e-12)
    assert float(model.reward(RIGHT, w)) == pytest.approx(-0.8563735750925815, abs=1e-12)
    delta = model(LEFT, RIGHT, ["ann"])
    assert float(delta) == pytest.approx(-0.14492408166113102, abs=1e-12)
    left, right = torch.tensor([-1]), torch.tensor([1])
    assert float(pal_hinge(delta, left).loss) == pytest.approx(0.855075918338869)
    assert float(pal_logistic(delta, left).loss) == pytest.approx(0.6233082190929368)
    assert float(pal_hinge(delta, right).loss) == pytest.approx(1.144924081661131)
    assert float(pal_logistic(delta, right).loss) == pytest.approx(0.7682323007540674, abs=1e-12)
    assert float(by_hand(squared=True)(LEFT, RIGHT, ["ann"]).detach()) == pytest.approx(
        -0.22721531841298181, abs=1e-12
    )


def test_angles_by_hand():
    """By hand: g = (.5, .5, 0), (0, -1, 1): logits (9.4062406251, 8.4425353752), P(right) .2761369557652055."""
    model = PalB(3, ["ann"], groups=2, dimension=3, depth=0).double()
    model.projector = nn.Identity()
    with torch.no_grad():
        model.logits.weight.copy_(torch.tensor([[0.3, -0.2]], dtype=torch.float64))
        for g, value in zip(model.prompt_maps, ([0.5, 0.5, 0.0], [0.0, -1.0, 1.0]), strict=True):
            g.enter.weight.zero_()
            g.enter.bias.copy_(torch.tensor(value))
        model.log_scale.copy_(torch.tensor(math.log(1 / 0.07), dtype=torch.float64))
    left, right = (torch.tensor([x], dtype=torch.float64) for x in ([0.4, 0.2, 0.1], [-0.1, 0.3, 0.8]))
    weights = model.requires_grad_(False).weights(["ann"])
    assert float(model.reward(left, weights, left)) == pytest.approx(9.4062406251)
    assert float(model.reward(right, weights, left)) == pytest.approx(8.4425353752)
    delta = model(left, right, ["ann"], left)
    assert float(torch.sigmoid(delta)) == pytest.approx(0.2761369557652055)
    assert float(pal_logistic(delta, torch.tensor([1])).loss) == pytest.approx(1.2868583197991021)
    with torch.no_grad():
        model.log_scale.fill_(50.0)
    assert float(model.reward(left, weights, left).abs()) <= 100


def models() -> list[Pal]:
    torch.manual_seed(0)
    made: list[Pal] = [
        PalA(6, USERS[:5], groups=3, dimension=4),
        PalA(6, USERS[:5], groups=3, dimension=4, prototypes="projected", squared=True),
        PalB(6, USERS[:5], groups=3, dimension=4),
    ]
    return made


@pytest.mark.parametrize("number", range(3))
def test_identities(number: int):
    """Swapping the answers negates delta; permuting prototypes and weights together changes nothing."""
    model = models()[number].double()
    left, right, prompts = torch.randn(3, 5, 6, dtype=torch.float64)
    delta = model(left, right, USERS[:5], prompts)
    torch.testing.assert_close(model(right, left, USERS[:5], prompts), -delta)
    assert torch.equal(model(left, left, USERS[:5], prompts), torch.zeros(5, dtype=torch.float64))
    weights = model.weights(USERS[:5])
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, dtype=torch.float64))
    gap = model.reward(right, weights, prompts) - model.reward(left, weights, prompts)
    torch.testing.assert_close(gap, delta)
    order = [2, 0, 1]
    with torch.no_grad():
        model.logits.weight.copy_(model.logits.weight[:, order].clone())
        if isinstance(model, PalA):
            model.prototypes.copy_(model.prototypes[order].clone())
        elif isinstance(model, PalB):
            model.prompt_maps = nn.ModuleList(model.prompt_maps[i] for i in order)
    torch.testing.assert_close(model(left, right, USERS[:5], prompts), delta)


def test_squared_distances_are_linear_in_the_ideal_point():
    """|x_l - a|^2 - |x_r - a|^2 = 2 <a, x_r - x_l> + |x_l|^2 - |x_r|^2."""
    model = by_hand(squared=True)
    a = model.ideals(model.weights(["ann"]), None)
    expected = 2 * (a * (RIGHT - LEFT)).sum() + (LEFT**2).sum() - (RIGHT**2).sum()
    assert model(LEFT, RIGHT, ["ann"]).item() == pytest.approx(expected.item(), abs=1e-12)


def test_one_group_is_one_reward_for_all():
    model = PalA(6, USERS, groups=1, dimension=3)
    assert torch.equal(model.weights(USERS), torch.ones(40, 1))


def test_the_gradient_at_the_ideal_point_is_zero():
    model = by_hand()
    x = model.ideals(model.weights(["ann"]), None).detach().requires_grad_()
    model.reward(x, model.weights(["ann"])).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_unknown_users_get_what_was_said():
    model = models()[0]
    known = model.weights(USERS[:5])
    with pytest.raises(ValueError, match="user 'eve' is unknown"):
        model.weights(["user 0", "eve"])
    mean = model.weights(["user 0", "eve"], unknown="mean")
    assert torch.equal(mean[0], known[0])
    torch.testing.assert_close(mean[1], known.mean(0))
    torch.testing.assert_close(model.weights(["eve"], unknown="uniform"), torch.full((1, 3), 1 / 3))
    nobody = torch.zeros(0, 6)
    assert torch.equal(model.fit_user(nobody, nobody, torch.zeros(0)), model.prior("uniform"))
    torch.testing.assert_close(model.fit_user(nobody, nobody, torch.zeros(0), prior="mean"), known.mean(0))


@pytest.mark.parametrize("number", range(3))
def test_fitting_a_user_changes_nothing_else(number: int):
    model = models()[number]
    before = copy.deepcopy(model.state_dict())
    left, right, prompts = torch.randn(3, 9, 6)
    wanted = torch.tensor([0.9, 0.05, 0.05])
    label = torch.sign(model.reward(right, wanted, prompts) - model.reward(left, wanted, prompts)).detach()
    weights = model.fit_user(left, right, label, prompts, steps=40)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
    assert not weights.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    delta = model.reward(right, weights, prompts) - model.reward(left, weights, prompts)
    start = model.reward(right, model.prior("uniform"), prompts) - model.reward(left, model.prior("uniform"), prompts)
    assert pal_logistic(delta, label).loss.mean().item() < pal_logistic(start, label).loss.mean().item()


def test_a_new_user_is_fitted_with_the_loss_that_the_model_was_trained_with(tmp_path: Path):
    """Both pairs are right by more than 1, the hinge's margin, so that it is 0 and the weights stay at the prior.

    f(x) = x and prototypes 0 and 4 on a line, prior (1/2, 1/2): a = 2, and of answers at 9 and 2 delta is 7. The
    logistic loss is not 0 yet, and pulls on.
    """
    left, right, label = torch.tensor([[9.0], [8.0]]), torch.tensor([[2.0], [2.5]]), torch.ones(2)
    fitted = {}
    for loss in ("hinge", "logistic"):
        model = PalA(1, ["ann"], groups=2, dimension=1, loss=loss)
        model.projector = nn.Identity()
        with torch.no_grad():
            model.prototypes.copy_(torch.tensor([[0.0], [4.0]]))
        fitted[loss] = model.fit_user(left, right, label)
        delta = torch.tensor([0.5, -2.0])
        assert torch.equal(
            model.losses(delta, label), {"hinge": pal_hinge, "logistic": pal_logistic}[loss](delta, label).loss
        )
    assert torch.equal(fitted["hinge"], torch.tensor([0.5, 0.5]))
    assert not torch.equal(fitted["logistic"], fitted["hinge"])
    PalA(1, ["ann"], groups=2, dimension=1, loss="hinge").save_pretrained(tmp_path)
    assert load_pal(tmp_path).loss == "hinge"


def test_few_shot_recovery_improves_with_pairs():
    """Fixed prototypes, K = 2, sure labels: accuracy .867, .949, .983, .992 or better from 2, 10, 100, 1000 pairs.

    Within two standard errors over 30 users whose weights are uniform on the simplex.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    for pairs in (2, 10, 100, 1000):
        accuracies = []
        for _ in range(30):
            model = PalA(8, ["none"], groups=2, dimension=8, squared=True)
            model.projector = nn.Identity()
            with torch.no_grad():
                model.prototypes.copy_(nn.functional.normalize(torch.randn(2, 8, generator=generator), dim=-1))
            share = torch.rand(1, generator=generator)
            truth = torch.cat([share, 1 - share])
            left, right = torch.randn(2, pairs + 500, 8, generator=generator)
            with torch.no_grad():
                label = torch.where(model.reward(right, truth) > model.reward(left, truth), 1, -1)
            fitted = model.fit_user(left[:pairs], right[:pairs], label[:pairs], steps=40, learning_rate=0.3)
            with torch.no_grad():
                delta = model.reward(right[pairs:], fitted) - model.reward(left[pairs:], fitted)
            accuracies.append(float(((delta * label[pairs:]) > 0).float().mean()))
        values = torch.tensor(accuracies)
        found.append((float(values.mean()), float(values.std()) / 30**0.5))
    for (mean, error), expected in zip(found, (0.867, 0.949, 0.983, 0.992), strict=True):
        assert mean > expected - 2 * error
    assert [mean for mean, _ in found] == sorted(mean for mean, _ in found)


def judgements(pairs: int, majority: float, noise: float, seed: int) -> tuple[Tensor, Tensor, list[str], Tensor]:
    """Two opposed groups of 40 users: the majority prefers what has more of the first number, the others less."""
    generator = torch.Generator().manual_seed(seed)
    count = len(USERS) * pairs
    left, right = torch.randn(2, count, 4, generator=generator)
    who = [number for number in range(len(USERS)) for _ in range(pairs)]
    side = torch.tensor([1 if number < majority * len(USERS) else -1 for number in who])
    label = torch.where(right[:, 0] > left[:, 0], side, -side)
    label = torch.where(torch.rand(count, generator=generator) < noise, -label, label)
    return left, right, [USERS[number] for number in who], label


def accuracy(make: Callable[[int], Pal], groups: int, noise: float) -> tuple[float, Tensor]:
    """Expected accuracy on fresh labels of this noise, and each user's weights.

    Agreement c with noiseless labels of 12,000 fresh pairs is an accuracy of c (1 - e) + (1 - c) e on noisy ones.
    """
    torch.manual_seed(0)
    model = make(groups)
    left, right, users, label = judgements(100, 0.7, noise, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(250):
        optimizer.zero_grad()
        pal_logistic(model(left, right, users, torch.ones_like(left)), label).loss.mean().backward()
        optimizer.step()
    left, right, users, label = judgements(300, 0.7, 0.0, seed=2)
    with torch.no_grad():
        agreement = float(((model(left, right, users, torch.ones_like(left)) * label) > 0).float().mean())
        return agreement * (1 - noise) + (1 - agreement) * noise, model.weights(USERS)


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: PalA(4, USERS, groups=groups, dimension=4, depth=0, squared=True),
        lambda groups: PalA(4, USERS, groups=groups, dimension=4, depth=0, prototypes="projected"),
        lambda groups: PalB(4, USERS, groups=groups, dimension=4, depth=0),
    ],
    ids=["ideal-direct", "ideal-projected", "angle"],
)
def test_two_opposed_groups(make: Callable[[int], Pal]):
    """Groups .7 : .3, noise .1: one reward gets at most .7 .9 + .3 .1 = .66; two prototypes get within .02 of .9."""
    one, _ = accuracy(make, 1, 0.1)
    two, weights = accuracy(make, 2, 0.1)
    assert one <= 0.66 + 0.005  # two standard errors of 12,000 pairs, times 1 - 2 e
    assert two >= 0.88
    group = weights.argmax(-1)
    assert set(group[:28].tolist()) != set(group[28:].tolist())
    assert len(set(group[:28].tolist())) == len(set(group[28:].tolist())) == 1


@pytest.mark.parametrize("number", range(3))
def test_what_is_saved_comes_back(tmp_path: Path, number: int):
    model = models()[number]
    model.save_pretrained(tmp_path)
    back = load_pal(tmp_path)
    assert type(back) is type(model)
    left, right, prompts = torch.randn(3, 5, 6)
    assert torch.equal(back(left, right, USERS[:5], prompts), model(left, right, USERS[:5], prompts))


def test_parts_learn_at_their_own_rates():
    groups = {group["lr"]: group for group in models()[2].parameter_groups()}
    assert sorted(groups) == [1e-4, 5e-3, 1e-1]
    assert sum(len(group["params"]) for group in groups.values()) == len(list(models()[2].parameters()))
    assert [p.shape for p in groups[5e-3]["params"]] == [(5, 3)]
    assert len(groups[1e-1]["params"]) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"groups": 0}, "groups is 0"),
        ({"dimension": 0}, "dimension is 0"),
        ({"users": []}, "users is 0"),
        ({"users": ["ann", "ann"]}, "stands twice"),
        ({"prototypes": "free"}, "prototypes is 'free'"),
    ],
)
def test_models_that_cannot_be(wrong: dict[str, object], message: str):
    given = {"width": 4, "users": ["ann"], "groups": 2, "dimension": 3, **wrong}
    with pytest.raises(ValueError, match=message):
        PalA(**given)  # type: ignore[arg-type]


def test_rows_that_cannot_be_used():
    model, angle = models()[0], models()[2]
    x = torch.randn(2, 6)
    with pytest.raises(ValueError, match="2 pairs and 1 users"):
        model(x, x, ["user 0"])
    with pytest.raises(ValueError, match=r"right has shape \(1, 6\)"):
        model(x, x[:1], USERS[:2])
    with pytest.raises(ValueError, match=r"left has shape \(2, 5\)"):
        model(x[:, :5], x, USERS[:2])
    with pytest.raises(ValueError, match=r"answers\[1, 0\] is nan"):
        model.reward(torch.tensor([[0.0] * 6, [math.nan] * 6]), model.prior("mean"))
    with pytest.raises(ValueError, match="not on the simplex"):
        model.reward(x, torch.tensor([0.5, 0.5, 0.5]))
    with pytest.raises(ValueError, match="PalB reads the prompt"):
        angle(x, x, USERS[:2])
    with pytest.raises(ValueError, match="label"):
        model.fit_user(x, x, torch.tensor([0, 1]))


def test_calibration_reads_embeddings_as_if_they_were_standardised():
    """A calibrated model on 3 x + 5 is the uncalibrated one on standardised x; saved and loaded it stays so."""
    for model in models():
        x = torch.randn(50, 6)
        z = (x - x.mean(0)) / x.std(0)
        plain = copy.deepcopy(model)
        model.calibrate(3 * x + 5, 3 * x + 5)
        weights = model.weights(["user 0"] * 50)
        torch.testing.assert_close(model.reward(3 * x + 5, weights, 3 * x + 5), plain.reward(z, weights, z))


def test_a_coordinate_that_never_moved_is_not_the_loudest():
    """One coordinate is constant in training: a change of 1 in it counts 20 mean deviations."""
    model = models()[0]
    x = torch.randn(500, 6)
    x[:, 0] = 0
    model.calibrate(x)
    assert float(model.projector.spread[0]) == pytest.approx(0.05 * float(x.std(0).mean()))
    model.calibrate(torch.ones(3, 6))
    assert torch.equal(model.projector.spread, torch.ones(6))
    with pytest.raises(ValueError, match="1 embeddings"):
        model.calibrate(torch.ones(1, 6))


def test_arguments_that_make_no_model_are_named(tmp_path):
    with pytest.raises(ValueError, match="depth is -1: at least 0"):
        PalA(4, ["a"], groups=2, dimension=3, depth=-1)
    model = PalA(4, ["a"], groups=2, dimension=3)
    answers = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="loss is 'bce': it must be logistic or hinge"):
        PalA(4, ["a"], groups=2, dimension=3, loss="bce")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps is -1: at least 1"):
        model.fit_user(answers, answers, torch.ones(2), steps=-1)
    with pytest.raises(ValueError, match="so it holds no PAL model"):
        load_pal(tmp_path)
