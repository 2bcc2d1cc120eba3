"""Training of PAL models on embeddings: opposed groups are found, and users who are not in a batch stay put."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from align.config.schema import PalSpec
from align.rewards.pal import PalA, PalB
from align.trainers.build_pal import trained
from align.trainers.pal import Judgements, train_linear, train_pal

USERS = [f"user {number}" for number in range(20)]
MAJORITY = 14


def judgements(pairs: int, noise: float, seed: int, scale: Tensor | None = None) -> Judgements:
    """Fourteen users like the first coordinate, six dislike it; 2,000 answers, ``pairs`` judgements each."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(2000, 6, generator=generator)
    left, right = torch.randint(2000, (2, len(USERS) * pairs), generator=generator)
    right = torch.where(left == right, (right + 1) % 2000, right)
    users = [user for user in USERS for _ in range(pairs)]
    side = torch.tensor([1 if USERS.index(user) < MAJORITY else -1 for user in users])
    label = torch.where(points[right, 0] > points[left, 0], side, -side)
    label = torch.where(torch.rand(len(users), generator=generator) < noise, -label, label)
    answers = points if scale is None else points * scale + 7
    return Judgements(answers, torch.ones(2000, 6), left, right, label, users)


def expected_accuracy(delta: Tensor, data: Judgements, noise: float) -> float:
    """On labels of this noise, of a model that agrees with the sure labels in a share c: c (1 - e) + (1 - c) e."""
    agreement = float(((delta * data.label) > 0).float().mean())
    return agreement * (1 - noise) + (1 - agreement) * noise


@pytest.mark.parametrize("kind", [PalA, PalB])
def test_two_opposed_groups(kind: type):
    """Groups .7 : .3, noise .1: one group gets at most .66, two within .02 of .9, and the weights tell the groups."""
    torch.manual_seed(0)
    # One coordinate a thousand times as loud as the one that counts: calibration makes them alike.
    scale = torch.tensor([1.0, 1000.0, 1.0, 1.0, 1.0, 1.0])
    train, test = judgements(150, 0.1, 0, scale), judgements(200, 0.0, 1, scale)
    found = {}
    for groups in (1, 2):
        model = kind(6, USERS, groups=groups, dimension=6, depth=1)
        train_pal(model, train, epochs=16, batch_size=128, projectors=1e-2, users=1e-1)
        with torch.no_grad():
            left, right, prompts = test.pairs()
            found[groups] = expected_accuracy(model(left, right, test.users, prompts), test, 0.1)
    assert found[1] <= 0.66 + 0.01
    assert found[2] >= 0.88
    chosen = model.weights(USERS).argmax(-1)
    assert len(set(chosen[:MAJORITY].tolist())) == len(set(chosen[MAJORITY:].tolist())) == 1
    assert chosen[0] != chosen[-1]


def test_linear_reward_reaches_the_majority():
    """One linear reward: .7 of sure labels at most, and it comes close."""
    train, test = judgements(150, 0.1, 0), judgements(200, 0.0, 1)
    reward = train_linear(train, penalty=1e-3)
    left, right, _ = test.pairs()
    agreement = float((((reward(right) - reward(left)) * test.label) > 0).float().mean())
    assert 0.66 <= agreement <= 0.705


def test_users_outside_a_batch_stay_put():
    """After an epoch on user 0 alone, whose moments others do not share, all others have the weights they had."""
    data = judgements(20, 0.0, 0)
    model = PalA(6, USERS, groups=2, dimension=4)
    train_pal(model, data, epochs=1)
    before = model.logits.weight.detach().clone()
    train_pal(model, data.of(["user 0"]), epochs=3, batch_size=4)
    after = model.logits.weight.detach()
    assert torch.equal(after[1:], before[1:])
    assert not torch.equal(after[0], before[0])


def test_the_same_seed_trains_alike_and_training_can_stop():
    data = judgements(10, 0.1, 0)
    states, losses = [], []
    for _ in range(2):
        torch.manual_seed(3)
        model = PalA(6, USERS, groups=2, dimension=4)
        seen: list[float] = []

        def after_epoch(epoch: int, loss: float, seen: list[float] = seen) -> bool:
            seen.append(loss)
            return epoch == 2

        train_pal(model, data, epochs=9, after_epoch=after_epoch)
        states.append(model.state_dict())
        losses.append(seen)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_the_recipe_s_loss_is_the_model_s():
    data, seen = judgements(5, 0.0, 0), {}
    for loss in ("logistic", "hinge"):
        spec = PalSpec(loss=loss, epochs=1, dimension=4)
        model = trained(spec, data, 2, 0, lambda _, values, loss=loss: seen.update({loss: values["loss"]}))
        assert model.loss == loss
    assert seen["logistic"] != seen["hinge"]


def test_what_cannot_be_trained():
    data = judgements(2, 0.0, 0)
    with pytest.raises(ValueError, match="no judgements"):
        train_pal(PalA(6, USERS, groups=2, dimension=4), data.part([]))
    with pytest.raises(ValueError, match="no judgements"):
        train_linear(data.part([]))
    with pytest.raises(ValueError, match="'user 19' is unknown"):
        train_pal(PalA(6, USERS[:-1], groups=2, dimension=4), data, batch_size=1000)
    with pytest.raises(ValueError, match="one of each a judgement"):
        Judgements(data.answers, data.prompts, data.left, data.right[:1], data.label, data.users)
