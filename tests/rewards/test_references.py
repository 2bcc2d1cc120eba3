"""Reference rewards: quantiles by hand, regressions that find what made the data."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch

from align.rewards.references import PromptReference, quantile_reference, sampled_reference
from align.rewards.transforms import LogSigmoidCentered

TEN = torch.tensor([-0.3, 0.1, 0.4, 0.9, 1.2, 1.3, 2, 2.2, 2.5, 3.1], dtype=torch.float64)


@pytest.mark.parametrize(("quantile", "value"), [(0.5, 1.25), (0.85, 2.395), (0.95, 2.83)])
def test_quantiles_interpolate(quantile: float, value: float):
    """Ten samples: .85 stands at rank 7.65, so 2.2 + .65 (2.5 - 2.2) = 2.395."""
    both = quantile_reference(torch.stack([TEN, TEN.flip(0) + 1]), quantile=quantile)
    assert both.tolist() == pytest.approx([value, value + 1])
    assert quantile_reference([TEN, TEN[:2]], quantile=quantile).tolist() == pytest.approx(
        [value, -0.3 + quantile * 0.4]
    )


def test_equal_samples_are_their_quantile():
    reference = quantile_reference(torch.full((1, 4), 0.7, dtype=torch.float64))
    assert float(reference) == 0.7
    u = LogSigmoidCentered("r", "q")({"r": torch.tensor([0.7], dtype=torch.float64), "q": reference})
    assert float(u) == pytest.approx(math.log(0.5))


def test_one_sample_warns_and_two_do_not():
    with pytest.warns(UserWarning, match="1 of 2 prompts have one sampled answer, the first is 1"):
        assert quantile_reference([TEN, TEN[:1]]).tolist() == pytest.approx([2.395, -0.3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantile_reference(torch.randn(3, 2))


@pytest.mark.parametrize(
    ("samples", "quantile", "message"),
    [
        (TEN[None], 0.0, "quantile is 0"),
        (TEN[None], 1.0, "quantile is 1"),
        (TEN[None], math.nan, "quantile is nan"),
        ([], 0.5, "no prompt"),
        ([TEN, TEN[:0]], 0.5, r"samples\[1\] has shape \(0,\)"),
        ([torch.tensor([1.0, math.nan])], 0.5, r"samples\[0\]\[1\] is nan"),
    ],
)
def test_samples_without_a_quantile(samples: Any, quantile: float, message: str):
    with pytest.raises(ValueError, match=message):
        quantile_reference(samples, quantile=quantile)


def prompts(count: int, samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards 1 + 2 x_0 - x_1 + noise, with noise uniform on (0, 1): the q quantile is 1 + 2 x_0 - x_1 + q."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    mean = 1 + 2 * x[:, 0] - x[:, 1]
    return x, mean, mean[:, None] + torch.rand(count, samples, generator=generator, dtype=torch.float64)


def test_ridge_finds_the_line():
    """64 samples put a prompt's .85 quantile within .05 of 1.85 + 2 x_0 - x_1 each; 300 prompts, nearer still."""
    x, mean, samples = prompts(300, 64, seed=0)
    fitted = PromptReference.fit(x, quantile_reference(samples))
    assert fitted.coefficients == pytest.approx((2.0, -1.0), abs=0.02)
    assert fitted.intercept == pytest.approx(1.85, abs=0.02)
    assert (fitted.prompts, fitted.explained > 0.99) == (300, True)
    torch.testing.assert_close(fitted.predict(x), mean + 0.85, rtol=0, atol=0.05)


def test_what_is_explained_is_of_prompts_left_out():
    """Of noise alone nothing is, however many dimensions could fit it; of a constant, all of nothing."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(40, 100, generator=generator), torch.randn(40, generator=generator)
    fitted = PromptReference.fit(x, noise)
    assert abs(fitted.explained) < 0.2
    assert fitted.predict(x).std() < 0.5 * noise.std()
    assert PromptReference.fit(x, torch.full((40,), 3.0)).predict(x).tolist() == pytest.approx([3.0] * 40)


def test_answers_without_a_reward_are_left_out():
    """Of (1, none, 3) the median is 2, in float64; .6 stays .6, so that an answer of .6 ties with it."""
    assert sampled_reference([1.0, None, 3.0], 0.5) == 2.0
    assert sampled_reference([0.6] * 4, 0.85) == 0.6
    assert sampled_reference([None, None], 0.5) is None
    with pytest.raises(ValueError, match="1 of 3 sampled answers has a reward"):
        sampled_reference([None, 2.0, None], 0.5)


def test_regressions_that_cannot_be():
    x, mean, _ = prompts(20, 8, seed=4)
    with pytest.raises(ValueError, match="one a prompt"):
        PromptReference.fit(x, mean[:19])
    with pytest.raises(ValueError, match=r"embeddings\[0, 1\] is nan"):
        PromptReference.fit(torch.full_like(x, math.nan).index_fill(1, torch.tensor([0]), 0.0), mean)
    with pytest.raises(ValueError, match="2 prompts: a regression takes 3"):
        PromptReference.fit(x[:2], mean[:2])
    with pytest.raises(ValueError, match=r"must have \(B, 2\)"):
        PromptReference.fit(x, mean).predict(x[:, :1])
