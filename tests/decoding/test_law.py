"""The base law: temperature, top-k and top-p as a change of the law, and what weights owe the model's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.decoding.law import Law

P = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)


def probabilities(law: Law, logits: torch.Tensor | None = None) -> list[float]:
    return list(np.exp(law.log_probs(P.log() + 2 if logits is None else logits)))


def test_the_model_s_own_law() -> None:
    assert probabilities(Law()) == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=1e-15)
    assert Law().log_probs(P.log().float()).dtype == np.float64


def test_temperature() -> None:
    """T = 1/2 squares: 16 + 9 + 4 + 1 = 30."""
    assert probabilities(Law(temperature=0.5)) == pytest.approx([16 / 30, 9 / 30, 4 / 30, 1 / 30], abs=1e-15)


def test_top_k_keeps_ties() -> None:
    assert probabilities(Law(top_k=2)) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=1e-15)
    assert probabilities(Law(top_k=9)) == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=1e-15)
    assert probabilities(Law(top_k=1), torch.zeros(3)) == pytest.approx([1 / 3] * 3, abs=1e-15)


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, 1), (0.4 - 1e-12, 1), (0.41, 2), (0.75, 3), (0.95, 4), (1.0, 4)])
def test_top_p_keeps_the_fewest(top_p: float, kept: int) -> None:
    expected = (P * (torch.arange(4) < kept)).tolist()
    total = sum(expected)
    assert probabilities(Law(top_p=top_p)) == pytest.approx([p / total for p in expected], abs=1e-15)


def test_top_p_is_of_what_top_k_left() -> None:
    """Of (4/7, 3/7), .5 is reached by the first alone; of the whole law it would take two."""
    assert probabilities(Law(top_k=2, top_p=0.5)) == pytest.approx([1, 0, 0, 0], abs=1e-15)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 0.999), st.floats(0.3, 3.0))
def test_top_p_of_a_large_vocabulary_is_that_of_a_full_sort(seed: int, top_p: float, temperature: float) -> None:
    logits = torch.randn(2, 3000, generator=torch.Generator().manual_seed(seed))
    found = Law(temperature=temperature, top_p=top_p).log_probs(logits)
    for row, values in enumerate(logits.double()):
        p = (values / temperature).softmax(-1)
        order = p.argsort(descending=True)
        kept = order[: int((p[order].cumsum(-1) < top_p).sum()) + 1]
        expected = torch.zeros_like(p).index_fill(0, kept, 1) * p
        np.testing.assert_allclose(np.exp(found[row]), expected / expected.sum(), atol=1e-14)


def test_a_row_is_the_same_alone_and_in_a_batch() -> None:
    logits = 4 * torch.randn(7, 1000, generator=torch.Generator().manual_seed(0))
    law = Law(temperature=0.7, top_k=200, top_p=0.9)
    together = law.log_probs(logits)
    for row, values in enumerate(logits):
        assert np.array_equal(law.log_probs(values), together[row])


def test_weights_for_the_model_s_own_law() -> None:
    """T = 1/2: q = (16, 9, 4, 1) / 30, so sum_t q(t) p(t) / q(t) over allowed {1, 3} is p(1) + p(3) = .4 again."""
    law = Law(temperature=0.5, target="model")
    q = probabilities(law)
    ratio = [math.exp(law.log_correction(P.log(), token)) for token in range(4)]
    assert ratio[0] == pytest.approx(0.4 * 30 / 16, abs=1e-14)
    assert sum(q[token] * ratio[token] for token in (1, 3)) == pytest.approx(0.4, abs=1e-14)
    assert Law(temperature=0.5).log_correction(P.log(), 0) == 0
    assert Law(target="model").log_correction(P.log(), 0) == 0


def test_tokens_that_the_model_rules_out_stay_out() -> None:
    assert probabilities(Law(), torch.tensor([0.0, -math.inf, 0.0])) == [0.5, 0, 0.5]


def test_logits_that_are_no_law() -> None:
    with pytest.raises(ValueError, match="row 1 hold NaN"):
        Law().log_probs(torch.tensor([[0.0, 1.0], [0.0, math.nan]]))
    with pytest.raises(ValueError, match=r"logits hold NaN or \+inf"):
        Law().log_probs(torch.tensor([0.0, math.inf]))
    with pytest.raises(ValueError, match="-inf alone"):
        Law().log_probs(torch.tensor([-math.inf, -math.inf]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"target": "both"}, "target is 'both'"),
    ],
)
def test_settings_out_of_range(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Law(**wrong)


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    law=st.sampled_from([Law(), Law(0.3), Law(2.0), Law(top_k=3), Law(0.7, top_p=0.6), Law(target="model")]),
)
def test_rows_are_the_law_in_float32(seed: int, law: Law) -> None:
    """Probabilities to 1e-6, one row and many; the sampler's sums and its own exponentials are of the same law."""
    logits = torch.randn((3, 700), generator=torch.Generator().manual_seed(seed)) * 4
    logits[1, 5] = -math.inf
    expected = np.exp(law.log_probs(logits))
    for row, live in zip(expected, law.rows(logits), strict=True):
        found = np.array([live.remove(token) for token in range(700)])
        np.testing.assert_allclose(found, row, atol=1e-6)
        assert not live.mass
    assert [live.mass for live in law.rows(logits)] == pytest.approx([1.0, 1.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("law", [Law(), Law(top_k=1)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_rows_that_are_no_law(law: Law, bad: float | None) -> None:
    logits = torch.zeros((2, 3))
    logits[1, 0 if bad is not None else slice(None)] = -math.inf if bad is None else bad
    with pytest.raises(ValueError, match="there is no law to draw from"):
        law.rows(logits)


def test_rows_keep_what_a_low_temperature_makes_small() -> None:
    """At T = .12 the unlikely tokens have e^(-13 / .12) = e^(-108.3) each, which float32 does not know."""
    logits = torch.zeros(1, 1000)
    logits[0, 0] = 13.0
    (live,) = Law(temperature=0.12).rows(logits)
    assert live.remove(0) == pytest.approx(1.0, abs=1e-12)
    assert math.log(live.mass) == pytest.approx(math.log(999) - 13 / 0.12, abs=1e-9)
