"""Bad input to every loss of the table is a ValueError that names argument, row and rule; NaN never passes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from align.evals.exact.drawn import Batch, Subject, draw, extremes
from align.losses import (
    LOSSES,
    LogicLoss,
    Loss,
    PairLogps,
    RewardShift,
    SequenceLogps,
    all_pairs,
    find_loss,
    mixture_logps,
    pal_delta,
    pal_logits,
    token_weighted,
    unit_norm,
)
from align.losses.checks import NotNegative, Positive, setting_hints
from align.losses.types import LARGEST, UnpairedLogps

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "logic": {
        "logic": "implies(and(Ref(w), M(l)), and(Ref(l), M(w)))",
        "where": "xor(and(Ref(w), M(l)), and(Ref(l), M(w)))",
    }
}
SUBJECTS = {name: Subject(find_loss(name), SETTINGS.get(name, {})) for name in LOSSES}
NOT_FINITE = (math.nan, math.inf, -math.inf)


def settings_of(*kinds: object) -> list[tuple[str, str]]:
    """Losses and those of their settings that are annotated as one of these."""
    hints = {name: setting_hints(subject.info.function, include_extras=True) for name, subject in SUBJECTS.items()}
    return [(name, setting) for name, found in hints.items() for setting, hint in found.items() if hint in kinds]


POSITIVE = settings_of(Positive)
WEIGHTS = settings_of(NotNegative, float)
DERIVED = [("bco", "shift"), ("kto", "kl"), ("pal_hinge", "delta"), ("pal_logistic", "delta")]
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


def whole_length(batch: Batch, value: float) -> Batch:
    """The length of row 1's first answer replaced, in float64, which can hold what is no number of tokens."""
    length = batch.length.double()
    length[1, 0] = value
    return Batch(batch.values, length)


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


@pytest.mark.parametrize("value", [1e-40, 1e-30, 1e13, 1e39])
@pytest.mark.parametrize(("name", "setting"), POSITIVE)
def test_settings_that_overflow_float32(name, setting, value):
    """At beta 1e-40 the target of a tie would be 0/0, at 1e39 the reward of a log-ratio of 0 be inf times 0."""
    with pytest.raises(ValueError, match=f"{setting} is {re.escape(str(value))}.*float32 overflows"):
        SUBJECTS[name](whole(SUBJECTS[name]), **{setting: value})


@pytest.mark.parametrize("value", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize(("name", "setting"), [*POSITIVE, *WEIGHTS])
def test_settings_at_their_ends_are_finite_in_float32(name, setting, value):
    """On generic rows, on log-ratios of +-1e4, and where policy and reference are the same."""
    subject = SUBJECTS[name]
    generic = whole(subject)
    ties = dict.fromkeys(
        [*subject.policies, *subject.baselines], generic.values.get("policy", generic.values.get("logps"))
    )
    for batch in (generic, extremes(subject, torch.Generator().manual_seed(0)), generic.put(**ties)):
        out = subject(batch.to(torch.float32), **{setting: value})
        assert torch.isfinite(out.loss).all()
        assert torch.isfinite(out.rewards).all()


@pytest.mark.parametrize("value", [1e13, 1e39])
@pytest.mark.parametrize(("name", "setting"), WEIGHTS)
def test_weights_that_overflow_float32(name, setting, value):
    with pytest.raises(ValueError, match=f"{setting} is {re.escape(str(value))}.*float32 overflows"):
        SUBJECTS[name](whole(SUBJECTS[name]), **{setting: value})


@pytest.mark.parametrize("value", [1.1e20, -3e38])
@pytest.mark.parametrize(("name", "parameter"), DERIVED)
def test_derived_numbers_that_overflow_float32(name, parameter, value):
    """A shift, a KL and a distance come of other numbers, and may be further out than these."""
    batch = whole(SUBJECTS[name]).to(torch.float32)
    spoilt = torch.full_like(batch.values[parameter], value)
    with pytest.raises(ValueError, match=rf"{parameter}(\[0\])? is .*must be within \+-1e\+20, or float32 overflows"):
        SUBJECTS[name](batch.put(**{parameter: spoilt}))


@pytest.mark.parametrize("value", [1.1e6, -3e38])
@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        (n, p)
        for log_probs in (True, False)
        for n, p in inputs(log_probs=log_probs)
        if p not in (*PROBABILITIES, "label", "answers") and (n, p) not in DERIVED
    ],
)
def test_numbers_that_overflow_float32(name, parameter, value):
    """Beyond +-1e6 squares and products with settings would overflow, and a difference of two infs be NaN."""
    subject = SUBJECTS[name]
    batch = whole(subject).to(torch.float32)
    what = f"(total|{parameter})" if parameter in (*subject.policies, *subject.baselines) else parameter
    spoilt = (
        spoiled(batch, parameter, value)
        if batch.values[parameter].ndim
        else batch.put(**{parameter: torch.tensor(value)})
    )
    with pytest.raises(ValueError, match=rf"{what}(\[1(, 0)?\])? is .*must be within \+-1e\+06, or float32 overflows"):
        subject(spoilt)


@pytest.mark.parametrize("value", [1e-12, 1e12])
@pytest.mark.parametrize(("name", "setting"), [*POSITIVE, *WEIGHTS])
def test_the_largest_numbers_at_the_ends_of_settings(name, setting, value):
    subject = SUBJECTS[name]
    for seed in range(5):
        batch = extremes(subject, torch.Generator().manual_seed(seed), LARGEST).to(torch.float32)
        for name_, given in batch.values.items():
            if name_ in ("scores", "advantage", "margin", "strength", "scale"):
                batch = batch.put(**{name_: LARGEST * given.sign()})
        out = subject(batch, **{setting: value})
        assert torch.isfinite(out.loss).all()
        assert torch.isfinite(out.rewards).all()


@pytest.mark.parametrize("wrong", [None, "0.1", True, [1.0]])
@pytest.mark.parametrize(
    ("name", "setting"), [(name, setting) for name, info in LOSSES.items() for setting in info.parameters]
)
def test_a_setting_of_another_type(name, setting, wrong):
    """When the loss is called, and before that when ``Loss`` is made with it."""
    subject = SUBJECTS[name]
    if wrong is True and isinstance(subject.info.parameters[setting].default, bool):
        wrong = 1
    if wrong == "0.1" and setting in ("logic", "where", "also"):
        wrong = 0.1
    for call in (
        lambda: subject(whole(subject), **{setting: wrong}),
        lambda: Loss(subject.info, {**subject.settings, setting: wrong}),
    ):
        with pytest.raises(ValueError, match=rf"{setting} is .*it (must be a |is one of )"):
            call()


@pytest.mark.parametrize(("name", "setting"), POSITIVE)
def test_a_loss_is_made_with_settings_in_range(name, setting):
    with pytest.raises(ValueError, match=f"{setting} is -1: it must be positive"):
        Loss(find_loss(name), {**SUBJECTS[name].settings, setting: -1})


@pytest.mark.parametrize("weight", [0, -1, "1", None, True, *NOT_FINITE])
def test_a_weight_is_positive(weight):
    for make in (
        lambda: Loss(find_loss("dpo"), weight=weight),
        lambda: LogicLoss("implies(M(l), M(w))", weight=weight),
    ):
        with pytest.raises(ValueError, match=rf"weight is '?{weight}'?: it must be"):
            make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: SequenceLogps.from_tokens(None, x), "logps is None: it must be a Tensor"),
        (lambda x: SequenceLogps.from_tokens(x, None), "mask is None: it must be a Tensor"),
        (lambda x: SequenceLogps.from_tokens(x, x * math.nan), r"mask\[0, 0\] is nan: it must be true or false"),
        (lambda x: SequenceLogps.from_tokens(x, 2 * x), r"mask\[0, 0\] is 2: it must be true or false"),
        (lambda x: SequenceLogps(-x[0], 1e30 * x[0]), r"length\[0\] is 1e\+30: it must be within"),
        (lambda x: all_pairs(None), "group is None: it must be a SequenceLogps"),
        (lambda x: mixture_logps(None, x, coefficient=0.5), "policy is None: it must be a Tensor"),
        (lambda x: mixture_logps(x, None, coefficient=0.5), "reference is None"),
        (lambda x: mixture_logps(x, x, coefficient="a"), "coefficient is 'a': it must be a number"),
        (lambda x: pal_delta(None, x, x), "left is None: it must be a Tensor"),
        (lambda x: pal_delta(x, x, 1e20 * x, squared=True), r"ideal\[0, 0\] is 1e\+20: it must be within"),
        (lambda x: pal_logits(None, x, x, scale=1.0), "left is None: it must be a Tensor"),
        (lambda x: pal_logits(x, x, x, scale=None), "scale is None: it must be a number"),
        (lambda x: token_weighted(None, x), "losses is None: it must be a Tensor"),
        (lambda x: token_weighted(x, x * math.nan), r"mask\[0, 0\] is nan: it must be true or false"),
        (lambda x: unit_norm(3e38 * x), r"embeddings\[0, 0\] is 3e\+38: it must be within"),
        (lambda x: RewardShift(decay="a"), "decay is 'a': it must be a number"),
    ],
)
def test_what_stands_beside_the_losses(make, message):
    with pytest.raises(ValueError, match=message):
        make(torch.ones(1, 2))


@pytest.mark.parametrize("name", [name for name, subject in SUBJECTS.items() if subject.carries_lengths])
def test_an_empty_completion(name):
    subject = SUBJECTS[name]
    for value in (0, -2):
        with pytest.raises(ValueError, match=rf"length\[1(, 0)?\] is {value}: a completion has at least one token"):
            subject(whole_length(whole(subject), value))


@pytest.mark.parametrize("value", [2.5, *NOT_FINITE])
@pytest.mark.parametrize("name", [name for name, subject in SUBJECTS.items() if subject.carries_lengths])
def test_a_length_that_counts_nothing(name, value):
    subject = SUBJECTS[name]
    with pytest.raises(ValueError, match=rf"length\[1(, 0)?\] is {value}: it counts tokens, in whole numbers"):
        subject(whole_length(whole(subject), value))


@pytest.mark.parametrize(
    ("name", "baseline"), [(n, p) for n, p in inputs(log_probs=True) if p in SUBJECTS[n].baselines]
)
def test_a_reference_of_other_rows_or_other_completions(name, baseline):
    """One row less; and, where lengths are known, one token more in row 1."""
    subject = SUBJECTS[name]
    batch = whole(subject)
    arguments = subject.arguments(batch)
    fewer = subject.arguments(batch.rows(torch.arange(len(batch) - 1)))[baseline]
    with pytest.raises(ValueError, match=rf"\(5,.*{baseline}\S* has shape \(4,|{baseline}\S* has shape \(4,.*\(5,"):
        subject.info.function(**{**arguments, baseline: fewer}, **subject.settings)
    if subject.carries_lengths:
        length = batch.length.clone()
        length[1, 0] += 1
        other = subject.arguments(Batch(batch.values, length))[baseline]
        with pytest.raises(ValueError, match=rf"policy\S*length\[1.* is \d+ and {baseline}\S*length\[1.* is \d+"):
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


@pytest.mark.parametrize(
    ("name", "baseline"), [(n, p) for n, p in inputs(log_probs=True) if p in SUBJECTS[n].baselines]
)
def test_a_missing_reference_of_a_direct_call(name, baseline):
    subject = SUBJECTS[name]
    arguments = {**subject.arguments(whole(subject)), baseline: None}
    missing = f"{baseline} is None: the loss compares the policy with a reference, and none was given"
    with pytest.raises(ValueError, match=missing if name != "logic" else "reference: the formula has Ref atoms"):
        subject.info.function(**arguments, **subject.settings)
    if name != "logic":
        with pytest.raises(ValueError, match=f"{baseline} is a str: it must be a "):
            subject.info.function(**{**arguments, baseline: "model"}, **subject.settings)


@pytest.mark.parametrize("value", [0.5, [0.5]])
@pytest.mark.parametrize(("name", "parameter"), inputs(log_probs=False))
def test_a_number_or_a_list_is_no_tensor(name, parameter, value):
    subject = SUBJECTS[name]
    batch = whole(subject)
    arguments = subject.arguments(batch)
    function = subject.info.function
    if parameter not in arguments:  # a thumb, in its carrier
        function, arguments = UnpairedLogps, {"sequence": arguments["policy"].sequence}
    settings = subject.settings if function is not UnpairedLogps else {}
    with pytest.raises(ValueError, match=rf"{parameter} is (0\.5|a list): it must be a Tensor"):
        function(**{**arguments, parameter: value}, **settings)


def test_a_number_or_a_list_in_a_carrier():
    ones = torch.ones(2)
    with pytest.raises(ValueError, match=r"total is 3\.0: it must be a Tensor"):
        SequenceLogps(3.0, ones)
    with pytest.raises(ValueError, match="length is a list: it must be a Tensor"):
        SequenceLogps(-ones, [1, 1])
    with pytest.raises(ValueError, match="rejected is a Tensor: it must be a SequenceLogps"):
        PairLogps(SequenceLogps(-ones, ones), -ones)


@pytest.mark.parametrize("name", ["orpo", "logic"])
def test_negative_log_likelihoods_are_no_log_probs(name):
    """The losses that take exp() of a log-prob refuse probabilities over 1, beyond what rounding may give."""
    subject = SUBJECTS[name]
    batch = whole(subject)
    message = r"policy.chosen: total\[1\] is 3, and log-probs are at most 0: were negative log-likelihoods passed"
    with pytest.raises(ValueError, match=message):
        subject(spoiled(batch, "policy", 3.0))
    assert torch.isfinite(subject(spoiled(batch, "policy", 1e-4)).loss).all()


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


@pytest.mark.parametrize("name", ["slic_hf", "simpo", "cpo", "orpo", "sft"])
def test_a_tensor_where_pairs_are_due(name):
    with pytest.raises(ValueError, match="policy is a Tensor: it must be a PairLogps"):
        Loss.of(name)(torch.zeros(2), None)


def test_complex_numbers_are_refused():
    with pytest.raises(ValueError, match="total is complex: it must be real"):
        SequenceLogps(total=torch.zeros(2, dtype=torch.complex64), length=torch.ones(2))
