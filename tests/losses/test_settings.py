"""Settings of a user's loss are checked by their own annotations, whatever the others say."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest
import torch

from align.config.losses import _check_settings
from align.losses import LOSSES, Loss, LossOutput, PairLogps, SequenceLogps
from align.losses.catalogue import pairwise_loss
from align.losses.checks import Positive, setting_hints

if TYPE_CHECKING:
    from torch import Tensor as Absent

FACTS: dict[str, Any] = {"reference": False, "paper": "-", "formula": "-", "purpose": "-"}


pytestmark = pytest.mark.usefixtures("table_as_before")


def pairs() -> PairLogps:
    one = SequenceLogps(torch.tensor([-1.0]), torch.tensor([1]))
    return PairLogps(one, one)


def output(policy: PairLogps) -> LossOutput:
    return LossOutput.from_rewards(policy.chosen.total, policy.chosen.total, policy.rejected.total)


def test_annotations_of_tensors_are_not_looked_at():
    """A name for type checking alone, and one that only the enclosing function knows."""
    Local = Absent if TYPE_CHECKING else torch.Tensor  # noqa: N806

    @pairwise_loss("users", default_beta=1.0, **FACTS)
    def users(policy: PairLogps, preference: Absent | None = None, margin: Local | None = None, *, beta: Positive):
        return output(policy)

    assert users(pairs(), beta=1.0).loss.tolist() == [-1.0]
    for call in (lambda: users(pairs(), beta=-1), lambda: Loss.of(users, beta=-1)):
        with pytest.raises(ValueError, match="beta is -1: it must be positive"):
            call()
    assert _check_settings("users", {"beta": 2.0}, "loss") == []


def test_a_setting_whose_annotation_cannot_be_resolved_is_named_at_the_decorator():
    with pytest.raises(ValueError, match=r"users: the annotation of limit, 'Absent', cannot be resolved .*Absent"):

        @pairwise_loss("users", default_beta=None, **FACTS)
        def users(policy: PairLogps, *, first: float = 1.0, limit: Absent) -> LossOutput:
            return output(policy)

    assert "users" not in LOSSES


def test_metadata_that_is_no_check_is_passed_over():
    @pairwise_loss("users", default_beta=1.0, **FACTS)
    def users(
        policy: PairLogps,
        *,
        beta: Annotated[float, "per nat"],
        penalty: Annotated[Positive, "per token"] = 1.0,
        mode: Annotated[Literal["a", "b"], "of two"] = "a",
    ) -> LossOutput:
        return output(policy)

    users(pairs(), beta=-1.0)
    for setting, value, rule in (
        ("beta", "x", "must be a number"),
        ("penalty", 0, "must be positive"),
        ("mode", "c", "one of a, b"),
    ):
        with pytest.raises(ValueError, match=f"{setting} is {value!r}.*{rule}"):
            users(pairs(), **{"beta": 1.0, setting: value})


@pytest.mark.parametrize("value", ["x", 2.0, True, None])
def test_a_whole_number(value):
    @pairwise_loss("users", default_beta=None, **FACTS)
    def users(policy: PairLogps, *, k: int = 3, limit: float | None = None, anything=None) -> LossOutput:
        return output(policy)

    users(pairs(), k=-2, limit="as it is", anything="goes")
    with pytest.raises(ValueError, match=re.escape(f"k is {value!r}: it must be a whole number")):
        users(pairs(), k=value)
    assert setting_hints(users) == {"k": int, "limit": float | None, "anything": Any}
