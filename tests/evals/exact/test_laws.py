"""Every loss against every law, and the law suite against losses that break one law on purpose."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from align.evals.exact.drawn import Subject, draw
from align.evals.exact.law_checks import STEP
from align.evals.exact.laws import check_law, check_laws
from align.losses import LOSSES, LossInfo, LossOutput, PairLogps, SequenceLogps, dpo, find_loss, ln_dpo
from align.losses.checks import NotNegative, Positive, Share, setting_hints
from align.losses.laws import LAWS, Laws

# Settings that have no default.
SETTINGS: Mapping[str, Mapping[str, Any]] = {"logic": {"logic": "implies(M(l), M(w))", "where": "xor(M(l), M(w))"}}
COSTLY = ("swap", "padding", "gradient", "finite")
CHEAP = tuple(law for law in LAWS if law not in COSTLY)


@functools.cache
def results(name: str) -> dict[str, Any]:
    return {result.law: result for result in check_laws(name, settings=SETTINGS.get(name), draws=5)}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_stands_where_it_says(name, law):
    """What is declared to hold holds on all draws, what is declared to fail is broken by one of them."""
    result = results(name)[law]
    assert result.passed, str(result)
    assert result.standing != "fails" or result.example is not None
    assert result.standing != "not applicable" or result.detail


@pytest.mark.parametrize(
    "formula",
    [
        {"logic": "implies(M(l), M(w))"},
        {"logic": "implies(M(l), M(w))", "where": "or(M(l), M(w))", "also": "and(M(l), M(w))"},
        {"logic": "implies(and(Ref(w), M(l)), and(Ref(l), M(w)))"},
        {"logic": "and(M(w), not(M(l)))", "f": "hinge"},
    ],
    ids=["semantic loss", "CPO", "with a reference", "unlikelihood"],
)
def test_formulas_stand_where_the_family_says(formula):
    """Shifts and swaps depend on the formula; the other laws hold for all with a logistic outer function."""
    laws = [law for law in LAWS if formula.get("f") != "hinge" or "beta" not in law]
    for result in check_laws("logic", settings=formula, only=laws, draws=3):
        assert result.passed, str(result)


def ranges(info: LossInfo) -> dict[str, st.SearchStrategy[float]]:
    """Settings that are numbers: up to 5 times the default and down to a fifth, or 0 where that is in their range."""
    defaults = {name: p.default for name, p in info.parameters.items()} | {"beta": info.default_beta}
    found = {}
    for name, hint in setting_hints(info.function, include_extras=True).items():
        usual = abs(defaults[name] or 1.0) if isinstance(defaults[name], float) else 1.0
        if hint == Positive:
            found[name] = st.floats(usual / 5, 5 * usual)
        elif hint in (NotNegative, float):
            least = 0 if hint == NotNegative else -5 * usual
            found[name] = st.floats(least, 5 * usual).map(lambda value: round(value, 2))  # 0, or far from it
        elif hint == Share:
            found[name] = st.floats(0, 0.45)
    return found


@st.composite
def subjects(draw_from: Callable[..., Any], name: str) -> Any:
    """A loss with settings and a batch: 2 to 5 rows, up to 400 tokens an answer, log-ratios and scores within 30."""
    info = find_loss(name)
    numbers_of = {name: draw_from(strategy) for name, strategy in ranges(info).items()}
    subject = Subject(info, {**SETTINGS.get(name, {}), **numbers_of})
    generator = torch.Generator().manual_seed(draw_from(st.integers(0, 2**31)))
    batch = draw(subject, generator, draw_from(st.integers(2, 5)))

    def numbers(
        strategy: st.SearchStrategy[Any], dtype: torch.dtype, shape: torch.Size = batch.length.shape
    ) -> torch.Tensor:
        count = shape.numel()
        return torch.tensor(draw_from(st.lists(strategy, min_size=count, max_size=count)), dtype=dtype).view(shape)

    length = numbers(st.integers(1, 400), torch.int64)
    policy = length * numbers(st.floats(-8, -0.01), torch.float64)
    ratio = numbers(st.floats(-30, 30), torch.float64)
    values = dict.fromkeys(subject.policies, policy)
    values |= {name: (policy - ratio).clamp(max=-0.01) for name in subject.baselines}
    for leaf in [] if subject.policies else subject.leaves:
        most = 3 if "embedding" in leaf else 30  # a score of two embeddings sums products
        values[leaf] = numbers(st.floats(-most, most), torch.float64, batch.values[leaf].shape)
    return subject, type(batch)({**batch.values, **values}, length), generator


@pytest.mark.parametrize("beside", [0.5, 0.99, 0.9973, 1.01])
def test_a_kink_beside_a_point_breaks_no_gradient(beside: float):
    """DPO-Positive's penalty begins where chosen answers are as likely as under the reference."""
    subject = Subject(find_loss("dpop"), {"beta": 0.5, "penalty": 1.0})
    generator = torch.Generator().manual_seed(0)
    batch = draw(subject, generator, 2)
    policy = torch.full_like(batch.values["policy"], -1.0)
    values = {"policy": policy, "reference": policy - beside * STEP}
    found = check_law(subject, "gradient", type(batch)({**batch.values, **values}, batch.length), generator)
    assert found.broken is None


HOLDING = [
    pytest.param(name, held, id=f"{name}-{held[0] if laws is not CHEAP else 'cheap'}")
    for name, info in LOSSES.items()
    for laws in (CHEAP, *((law,) for law in COSTLY))
    if info.laws is not None and (held := [law for law in laws if info.laws.standing(law) == "holds"])
]


@pytest.mark.parametrize(("name", "laws"), HOLDING)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_laws_on_generated_cases(name, laws, data):
    """With any settings; the limit of large beta at their defaults, since it leaves no smoothed loss at 0."""
    subject, batch, generator = data.draw(subjects(name))
    for law in laws:
        rows = batch.rows(torch.arange(2)) if law == "gradient" else batch
        at = Subject(subject.info, SETTINGS.get(name, {})) if law == "large_beta" else subject
        assert check_law(at, law, rows, generator).broken is None, law


@pytest.mark.parametrize("name", [name for name, info in LOSSES.items() if info.soft and info.kind == "pair"])
def test_soft_labels_are_symmetric_and_sure_ones_are_their_end(name):
    """The first answer preferred with p is the second preferred with 1 - p; p = 1 is a sure label."""
    subject = Subject(find_loss(name), SETTINGS.get(name, {}))
    batch = draw(subject, torch.Generator().manual_seed(3))
    p = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    exchanged = batch.map(lambda _, value: value.flip(1) if value.ndim == 2 else value)
    exchanged = type(batch)(exchanged.values, batch.length.flip(1))
    torch.testing.assert_close(
        subject(batch.put(preference=p)).loss, subject(exchanged.put(preference=1 - p)).loss, rtol=1e-10, atol=1e-10
    )
    sure, none = (
        subject(batch.put(preference=torch.ones_like(p))),
        subject(type(batch)({k: v for k, v in batch.values.items() if k != "preference"}, batch.length)),
    )
    torch.testing.assert_close(sure.loss, none.loss, rtol=1e-10, atol=1e-10)


# --- the suite itself ---------------------------------------------------------------------------------------------


def entry(function: Callable[..., LossOutput], laws: Laws | None, **changed: Any) -> LossInfo:
    facts = {"reference": True, "default_beta": 0.1, "paper": "arXiv:2305.18290", "formula": "-", "purpose": "-"}
    return LossInfo("pair", "broken", function, **{**facts, **changed}, laws=laws)


def passes(info: LossInfo, law: str) -> bool:
    (result,) = check_laws(info, only=[law])
    return result.passed


def margins(policy: PairLogps, reference: PairLogps, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    def ratio(one: SequenceLogps, two: SequenceLogps) -> torch.Tensor:
        return beta * (one.total.to(torch.promote_types(one.total.dtype, torch.float32)) - two.total)

    return ratio(policy.chosen, reference.chosen), ratio(policy.rejected, reference.rejected)


def out(loss: torch.Tensor, rewards: tuple[torch.Tensor, torch.Tensor]) -> LossOutput:
    return LossOutput.from_rewards(loss, *rewards)


def reads_the_reference_less(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    rewards = margins(policy, reference, beta)
    by = beta * 0.1 * (reference.chosen.total - reference.rejected.total).to(rewards[0])
    return out(-F.logsigmoid(rewards[0] - rewards[1] + by), (rewards[0] + by, rewards[1]))


def sees_one_answer(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    w, ell = margins(policy, reference, beta)
    return out(-F.logsigmoid(w - ell + 0.1 * w), (1.1 * w, ell))


def weighs_by_length(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    w, ell = margins(policy, reference, beta)
    return out(-policy.chosen.length * F.logsigmoid(w - ell), (w, ell))


def answers_do_not_mirror(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    w, ell = margins(policy, reference, beta)
    return out(-F.logsigmoid(w - ell), (w + beta, ell))


def pulls_without_beta(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    w, ell = margins(policy, reference, beta)
    return out(-F.logsigmoid(w - ell) + torch.sigmoid((ell - w) / beta), (w, ell))


def never_ends(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    w, ell = margins(policy, reference, beta)
    return out(0.1 - F.logsigmoid(w - ell), (w, ell))


def ranks_nothing(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    w, ell = margins(policy, reference, beta)
    return out(-F.logsigmoid(w - ell), (0 * w, 0 * ell))


def counts_one_token_more(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    w, ell = margins(policy, reference, beta)
    w, ell = w / (policy.chosen.length + 1), ell / (policy.rejected.length + 1)
    return out(-F.logsigmoid(w - ell), (w, ell))


def centres_the_batch(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    w, ell = margins(policy, reference, beta)
    return out(-F.logsigmoid(w - ell - (w - ell).mean()), (w, ell))


def weighs_by_place(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    w, ell = margins(policy, reference, beta)
    return out(-F.logsigmoid(w - ell) * (1 + torch.arange(len(w))), (w, ell))


def loses_a_gradient(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    w, ell = margins(policy, reference, beta)
    return out(-F.logsigmoid(w - ell.detach()), (w, ell))


def computes_in_float32(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    w, ell = margins(policy, reference, beta)
    return out(-F.logsigmoid((w - ell).float()), (w, ell))


def overflows(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    w, ell = margins(policy, reference, beta)
    return out(torch.log(1 + torch.exp(ell - w)), (w, ell))


def has_a_nan_gradient(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    w, ell = margins(policy, reference, beta)
    z = ell - w  # the branch that is not taken is inf, and 0 * inf is the gradient
    return out(torch.where(z < 100, torch.log1p(torch.exp(z)), z), (w, ell))


def stays_in_bf16(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    w = beta * (policy.chosen.total - reference.chosen.total)
    ell = beta * (policy.rejected.total - reference.rejected.total)
    return out(-F.logsigmoid(w - ell), (w, ell))


@pytest.mark.parametrize(
    ("law", "function"),
    [
        ("reference_shift", reads_the_reference_less),
        ("prompt_shift", sees_one_answer),
        ("swap", weighs_by_length),
        ("swap", answers_do_not_mirror),
        ("small_beta", pulls_without_beta),
        ("large_beta", never_ends),
        ("large_beta", ranks_nothing),
        ("duplication", counts_one_token_more),
        ("rows", centres_the_batch),
        ("permutation", weighs_by_place),
        ("gradient", loses_a_gradient),
        ("gradient", computes_in_float32),
        ("finite", overflows),
        ("finite", has_a_nan_gradient),
        ("bf16", stays_in_bf16),
    ],
)
def test_a_loss_that_breaks_a_law_is_caught(law, function):
    assert not passes(entry(function, Laws()), law)
    # Declared, the same break is as it should be, except where there was nothing to compare.
    assert passes(entry(function, Laws(fails={law: "on purpose"})), law) == (function is not ranks_nothing)


@pytest.mark.parametrize(
    "naive",
    [
        lambda logps, mask: SequenceLogps((logps * mask).sum(-1), mask.sum(-1)),
        lambda logps, mask: SequenceLogps(torch.where(mask, logps, 0).sum(-1), mask.sum(-1) * 0 + mask.shape[-1]),
        lambda logps, mask: SequenceLogps(
            torch.where(mask, logps, 0)[..., : int(mask.sum(-1).max())].sum(-1), mask.sum(-1)
        ),
    ],
    ids=["multiplies by the mask", "counts the padding", "expects it on the right"],
)
def test_padding_that_counts_is_caught(naive, monkeypatch):
    def from_tokens(logps: torch.Tensor, mask: torch.Tensor) -> SequenceLogps:
        try:
            return naive(logps, mask)
        except ValueError:  # a NaN total is refused by the carrier: here it shall be seen by the law
            return SequenceLogps(torch.zeros(mask.shape[:-1], dtype=torch.float64), mask.sum(-1))

    monkeypatch.setattr(SequenceLogps, "from_tokens", staticmethod(from_tokens))
    assert not passes(find_loss("ln_dpo"), "padding")


def test_the_example_is_the_input_that_breaks_the_law():
    """Said twice, margins .1 r double: DPO on the example and on its double differ, as the result says."""
    (result,) = check_laws("dpo", only=["duplication"])
    subject, batch = Subject(find_loss("dpo")), result.example
    twice = type(batch)(
        {name: 2 * value if value.ndim == 2 else value for name, value in batch.values.items()}, batch.length * 2
    )
    assert (subject(batch).loss - subject(twice).loss).abs().max() > 1e-3
    assert "loss[0] was" in result.detail


@pytest.mark.parametrize("law", LAWS)
def test_a_law_that_is_said_to_fail_and_holds_is_caught(law):
    info = entry(ln_dpo if law == "duplication" else dpo, Laws(fails={law: "not so"}))
    (result,) = check_laws(info, only=[law])
    assert not result.passed
    assert "declared to fail, and it held" in result.detail


@pytest.mark.parametrize("law", LAWS)
def test_a_law_that_is_said_not_to_apply_and_does_is_caught(law):
    assert not passes(entry(dpo, Laws(not_applicable={law: "not so"})), law)


@pytest.mark.parametrize("law", ["reference_shift", "small_beta", "large_beta"])
def test_a_law_that_cannot_be_put_must_say_so(law):
    """SFT has neither reference nor beta: silence would pass for holding."""
    info = entry(LOSSES["sft"].function, Laws(), reference=False, default_beta=None)
    assert not passes(info, law)


def test_a_loss_that_declares_nothing_fails():
    results = check_laws(entry(dpo, None))
    assert [result.law for result in results] == list(LAWS)
    assert not any(result.passed for result in results)
    assert "declares no laws" in str(results[0])


def test_what_the_suite_cannot_draw_is_named():
    def odd(policy: PairLogps, moon: torch.Tensor) -> LossOutput:
        return LossOutput.from_rewards(moon, policy.chosen.total, policy.rejected.total)

    with pytest.raises(ValueError, match="cannot draw moon"):
        check_laws(entry(odd, Laws(), reference=False, default_beta=None))
    with pytest.raises(ValueError, match="not in the table"):
        check_laws(odd)
