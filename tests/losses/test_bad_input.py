"""Bad input to every loss of the table is a ValueError that names argument, row and rule; NaN never passes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from align.evals.exact.drawn import Batch, Subject, draw
from align.losses import LOSSES, Loss, PairLogps, SequenceLogps, find_loss
from align.losses.types import UnpairedLogps

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "logic": {
        "logic": "implies(and(Ref(w), M(l)), and(Ref(l), M(w)))",
        "where": "xor(and(Ref(w), M(l)), and(Ref(l), M(w)))",
    }
}
SUBJECTS = {name: Subject(find_loss(name), SETTINGS.get(name, {})) for name in LOSSES}
NOT_FINITE = (math.nan, math.inf, -math.inf)
PROBABILITIES = ("preference", "win_rates")


def whole(subject: Subject) -> Batch:
    """A batch with everything that the loss may be given."""
    for seed in range(100):
        batch = draw(subject, torch.Generator().manual_seed(seed))
        if all(name in batch.values or name == "reference" for name in subject.parameters):
            return batch
    raise AssertionError("no draw has every optional parameter")


def inputs(*, log_probs: bool) -> list[tuple[str, str]]:
    """Loss and parameter: those of log-probs, or all others."""
    found = []
    for name, subject in SUBJECTS.items():
        models = {*subject.policies, *subject.baselines}
        found += [(name, parameter) for parameter in whole(subject).values if (parameter in models) == log_probs]
    return found


def spoiled(batch: Batch, parameter: str, value: float) -> Batch:
    """The first number of row 1 of a parameter replaced."""
    changed = batch.values[parameter].clone()
    changed.view(len(changed), -1)[1, 0] = value
    return batch.put(**{parameter: changed})


@pytest.mark.parametrize("name", LOSSES)
def test_good_input_is_no_nan(name):
    """What is refused below is good before it is spoiled."""
    out = SUBJECTS[name](whole(SUBJECTS[name]))
    assert torch.isfinite(out.loss).all()
    assert torch.isfinite(out.rewards).all()


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize(("name", "parameter"), inputs(log_probs=True))
def test_log_probs_that_are_not_finite(name, parameter, value):
    """Carriers refuse them as they are made (``total[1]``), losses on bare tensors by the argument's name."""
    subject = SUBJECTS[name]
    where = rf"(total|{parameter})\[1(, 0)?\] is {value}"
    with pytest.raises(ValueError, match=where):
        subject(spoiled(whole(subject), parameter, value))


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize(("name", "parameter"), inputs(log_probs=False))
def test_other_numbers_that_are_not_finite(name, parameter, value):
    subject = SUBJECTS[name]
    batch = whole(subject)
    if not batch.values[parameter].is_floating_point():
        assert parameter in ("label", "answers")  # NaN cannot stand there
        return
    if batch.values[parameter].ndim == 0:
        with pytest.raises(ValueError, match=rf"{parameter} is {value}"):
            subject(batch.put(**{parameter: torch.tensor(value, dtype=torch.float64)}))
        return
    with pytest.raises(ValueError, match=rf"{parameter}\[1(, 0)?\] is {value}"):
        subject(spoiled(batch, parameter, value))


@pytest.mark.parametrize("value", [-0.1, 1.1])
@pytest.mark.parametrize(("name", "parameter"), [(n, p) for n, p in inputs(log_probs=False) if p in PROBABILITIES])
def test_a_probability_is_in_0_1(name, parameter, value):
    with pytest.raises(ValueError, match=rf"{parameter}\[1(, 0)?\] is {value}.*\[0, 1\]"):
        SUBJECTS[name](spoiled(whole(SUBJECTS[name]), parameter, value))


@pytest.mark.parametrize("value", [0.0, -0.1, *NOT_FINITE])
@pytest.mark.parametrize("name", [name for name, subject in SUBJECTS.items() if "beta" in subject.settings])
def test_beta_is_positive(name, value):
    with pytest.raises(ValueError, match=f"beta is {value}"):
        SUBJECTS[name](whole(SUBJECTS[name]), beta=value)


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize(
    ("name", "setting"),
    [
        (name, setting)
        for name, info in LOSSES.items()
        for setting, parameter in info.parameters.items()
        if isinstance(parameter.default, float)
    ],
)
def test_other_settings_are_finite(name, setting, value):
    with pytest.raises(ValueError, match=f"{setting} is {value}"):
        SUBJECTS[name](whole(SUBJECTS[name]), **{setting: value})


@pytest.mark.parametrize("name", [name for name, subject in SUBJECTS.items() if subject.carries_lengths])
def test_an_empty_completion(name):
    subject = SUBJECTS[name]
    batch = whole(subject)
    length = batch.length.clone()
    length[1, 0] = 0
    with pytest.raises(ValueError, match=r"length\[1(, 0)?\] is 0: a completion has at least one token"):
        subject(Batch(batch.values, length))


@pytest.mark.parametrize(
    ("name", "baseline"), [(n, p) for n, p in inputs(log_probs=True) if p in SUBJECTS[n].baselines]
)
def test_a_reference_of_other_rows_or_other_completions(name, baseline):
    """One row less; and, where lengths are known, one token more in row 1."""
    subject = SUBJECTS[name]
    batch = whole(subject)
    arguments = subject.arguments(batch)
    fewer = subject.arguments(batch.rows(torch.arange(len(batch) - 1)))[baseline]
    with pytest.raises(ValueError, match=r"5 .* 4 |\(5,.*\(4,|\(4,.*\(5,"):
        subject.info.function(**{**arguments, baseline: fewer}, **subject.settings)
    if subject.carries_lengths:
        length = batch.length.clone()
        length[1, 0] += 1
        other = subject.arguments(Batch(batch.values, length))[baseline]
        with pytest.raises(ValueError, match=r"row 1.*under the policy"):
            subject.info.function(**{**arguments, baseline: other}, **subject.settings)


@pytest.mark.parametrize(("name", "parameter"), inputs(log_probs=False))
def test_other_sizes(name, parameter):
    """A row less of one argument, or a row where there should be a scalar: one of the two that differ is named."""
    subject = SUBJECTS[name]
    batch = whole(subject)
    value = batch.values[parameter]
    value = value[:-1] if value.ndim else value.expand(2)
    with pytest.raises(ValueError, match=rf"({'|'.join([*subject.parameters, parameter])})\b.* ha(s|ve) shape"):
        subject(batch.put(**{parameter: value}))


@pytest.mark.parametrize("name", [name for name, info in LOSSES.items() if info.kind == "pair"])
def test_a_missing_reference(name):
    subject = SUBJECTS[name]
    if subject.baselines:
        with pytest.raises(ValueError, match=f"{name} compares the policy with a reference, and none was given"):
            Loss(subject.info, subject.settings)(subject.arguments(whole(subject))["policy"], None)


@pytest.mark.parametrize("label", [torch.ones(2), torch.tensor([0, 1]), torch.tensor([0.0, math.nan])])
def test_a_label_that_is_not_boolean(label):
    with pytest.raises(ValueError, match=r"label is torch\.\w+: a thumb is up \(True\) or down \(False\)"):
        UnpairedLogps(SequenceLogps(-torch.ones(2), torch.ones(2)), label)


@pytest.mark.parametrize("name", [name for name, subject in SUBJECTS.items() if "label" in subject.parameters])
def test_a_label_that_is_neither_side(name):
    subject = SUBJECTS[name]
    with pytest.raises(ValueError, match=r"label\[1\] is 0"):
        subject(spoiled(whole(subject), "label", 0))


def test_sizes_within_a_carrier():
    two, three = SequenceLogps(-torch.ones(2), torch.ones(2)), SequenceLogps(-torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match="2 chosen and 3 rejected"):
        PairLogps(two, three)
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        UnpairedLogps(two, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        SequenceLogps(-torch.ones(2), torch.ones(3))
