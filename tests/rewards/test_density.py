"""Density ratios of prompts: known Gaussians, classes that do not differ, clamps, files; and mean pooling."""

from __future__ import annotations

import json
import math

import pytest
import torch

from align.rewards.density import DensityRatio, mean_pooled


def gaussian(*shape: int, mean: float = 0.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + mean


def fixed(coefficients: list[float], intercept: float = 0.0, minimum: float = 0.5, maximum: float = 10.0):
    weights = torch.tensor(coefficients, dtype=torch.float64)
    return DensityRatio(weights, intercept, 1.0, 1.0, minimum, maximum)


def test_two_gaussians():
    """N(1, 1) against N(0, 1): log p/q = -(x-1)^2/2 + x^2/2 = x - 1/2. 20,000 of each: three standard errors of the
    slope are .04. Right are the ups over 1/2 and the downs under it: Phi(1/2) = .6915 of each.
    """
    found = DensityRatio.fit(gaussian(20000, 1, mean=1.0), gaussian(20000, 1, seed=1), sample=20000)
    assert found.coefficients.tolist() == pytest.approx([1.0], abs=0.04)
    assert found.intercept == pytest.approx(-0.5, abs=0.04)
    assert found.accuracy == pytest.approx(0.6915, abs=0.01)
    assert found.held_out_accuracy == pytest.approx(0.6915, abs=0.01)
    x = torch.tensor([[-0.3], [0.5], [2.0]])
    assert found.log_ratio(x).tolist() == pytest.approx([-0.8, 0.0, 1.5], abs=0.08)


def test_the_number_of_prompts_does_not_count():
    """Ten times as many ups: still x - 1/2, for a ratio of densities knows no class frequencies (log 10 = 2.3)."""
    found = DensityRatio.fit(gaussian(20000, 1, mean=1.0), gaussian(2000, 1, seed=1), sample=20000)
    assert found.coefficients.tolist() == pytest.approx([1.0], abs=0.08)
    assert found.intercept == pytest.approx(-0.5, abs=0.08)


def test_weights_undo_a_skew():
    """Domains at -2 and 2; ups 80:20, downs 20:80. Weights of the downs are near 4 and 1/4, clamped to 1/2 below:
    unclamped, their weighted share of the first domain is that of the ups.
    """
    side = torch.tensor([1.0]).repeat(1000)
    side[:200] = -1.0
    noise = gaussian(1000, 1), gaussian(1000, 1, seed=1)
    up, down = noise[0] * 0.1 - 2 * side[:, None], noise[1] * 0.1 + 2 * side[:, None]
    found = DensityRatio.fit(up, down, minimum=0.01, maximum=100.0)
    weight = found.weights(down)
    first = down[:, 0] < 0
    assert (weight[first].sum() / weight.sum()).item() == pytest.approx(0.8, abs=0.02)
    assert weight[first].mean().item() == pytest.approx(4.0, rel=0.1)
    assert weight[~first].mean().item() == pytest.approx(0.25, rel=0.1)


def test_classes_that_do_not_differ_get_weights_of_one():
    """A thousand prompts of each class in 256 dimensions. At sklearn's default penalty a fit tells .656 of its own
    prompts apart and weighs from .04 to 20; ours sees on left-out prompts that there is nothing to tell.
    """
    found = DensityRatio.fit(gaussian(1000, 256), gaussian(1000, 256, seed=1))
    assert found.held_out_accuracy == pytest.approx(0.5, abs=0.05)
    assert found.accuracy > found.held_out_accuracy + 0.1
    weights = found.weights(gaussian(500, 256, seed=2))
    assert weights.sub(1).abs().max().item() < 0.2


def test_a_small_shift_in_many_dimensions():
    """N(.1, 1) against N(0, 1) in 256 dimensions: the log-ratio is .1 sum x - 1.28, of standard deviation 1.6. At
    sklearn's default penalty it comes out at 2.3.
    """
    found = DensityRatio.fit(gaussian(1000, 256, mean=0.1), gaussian(1000, 256, seed=1))
    x = gaussian(2000, 256, seed=2)
    estimate, exact = found.log_ratio(x), 0.1 * x.sum(1) - 1.28
    assert estimate.std().item() == pytest.approx(1.6, rel=0.3)
    assert torch.corrcoef(torch.stack([estimate, exact]))[0, 1].item() > 0.8


def test_huge_and_constant_dimensions_do_no_harm():
    """Hidden states have dimensions that are near a thousand in every row: scaled and shifted they tell the same."""
    up, down = gaussian(400, 3, mean=0.7), gaussian(400, 3, seed=1)
    plain = DensityRatio.fit(up, down)
    scale, shift = torch.tensor([50.0, 1.0, 1e-3]), torch.tensor([800.0, 0.0, 0.0])
    constant = torch.full((400, 1), 7.1)
    moved = DensityRatio.fit(*(torch.cat([rows * scale + shift, constant], 1) for rows in (up, down)))
    x = gaussian(50, 3, seed=2)
    far = torch.cat([x * scale + shift, torch.full((50, 1), 9.0)], 1)
    assert torch.allclose(moved.log_ratio(far), plain.log_ratio(x), atol=1e-3)
    assert moved.coefficients[3] == 0.0


def test_clamp():
    """Probabilities .05, .3, .5, .9, .99, 1 of a thumb up: odds .053, .43, 1, 9, 99, infinite, between .5 and 10."""
    p = torch.tensor([0.05, 0.3, 0.5, 0.9, 0.99], dtype=torch.float64)
    logit = torch.cat([torch.logit(p), torch.tensor([1e6], dtype=torch.float64)])[:, None]
    found = fixed([1.0])
    assert found.weights(logit).tolist() == pytest.approx([0.5, 0.5, 0.99999998, 8.9999991, 10, 10], rel=2e-7)
    assert found.weights(logit).tolist() == pytest.approx([0.5, 0.5, 1, 9, 10, 10], rel=1e-12)
    assert torch.allclose(found.log_ratio(logit), logit[:, 0])
    assert bool(torch.isfinite(fixed([1.0], maximum=1e12).weights(logit)).all())


def test_dtypes_and_gradient():
    """A constant to the loss; float32 or better comes out."""
    found = fixed([0.5, -1.0], 0.25)
    x = torch.tensor([[2.0, 1.0]], requires_grad=True)
    assert not found.weights(x).requires_grad
    assert found.log_ratio(x.bfloat16()).dtype == torch.float32
    assert found.log_ratio(x.double()).dtype == torch.float64
    assert found.log_ratio(x).tolist() == [0.25]


def test_the_same_seed_fits_the_same():
    """Two hundred of two thousand are drawn, others for another seed. All are drawn where that is all there are: each
    once, so that the seed then decides nothing but what is left out on the way.
    """
    up, down = gaussian(2000, 4, mean=0.3), gaussian(2000, 4, seed=1)
    fits = [DensityRatio.fit(up, down, sample=200, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(fits[0].coefficients, fits[1].coefficients)
    assert fits[0].intercept == fits[1].intercept
    assert (fits[0].coefficients - fits[2].coefficients).abs().max().item() > 0.01
    whole = [
        DensityRatio.fit(up[:500], down[:500], sample=sample, seed=seed) for sample, seed in ((500, 0), (9999, 1))
    ]
    assert torch.allclose(whole[0].coefficients, whole[1].coefficients, atol=1e-4)


def test_file(tmp_path):
    found = DensityRatio.fit(gaussian(50, 3, mean=1.0), gaussian(40, 3, seed=1), minimum=0.25, maximum=4.0)
    found.save(tmp_path / "density.json")
    back = DensityRatio.load(tmp_path / "density.json")
    assert torch.equal(back.coefficients, found.coefficients)
    for name in ("intercept", "accuracy", "held_out_accuracy", "minimum", "maximum"):
        assert getattr(back, name) == getattr(found, name)
    x = gaussian(20, 3, seed=2)
    assert torch.equal(back.weights(x), found.weights(x))


@pytest.mark.parametrize("change", [{"coefficients": "x"}, {"intercept": None}, {"minimum": 20.0}, {"accuracy": ...}])
def test_a_file_of_something_else(tmp_path, change):
    path = tmp_path / "density.json"
    fixed([1.0, 2.0]).save(path)
    content = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
    with pytest.raises(ValueError, match=r"holds no density ratio|weights lie between"):
        DensityRatio.load(path)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: DensityRatio.fit(x[:0], x), "up has shape (0, 2): embeddings are (N, D), of two prompts or more"),
        (lambda x: DensityRatio.fit(x, x[:0]), "down has shape (0, 2)"),
        (lambda x: DensityRatio.fit(x, x[:1]), "down has shape (1, 2)"),
        (lambda x: DensityRatio.fit(x[:, 0], x), "up has shape (4,)"),
        (lambda x: DensityRatio.fit(x, x[:, :1]), "up has 2 dimensions and down 1: one encoder makes both"),
        (lambda x: DensityRatio.fit(x, x / 0), "down[0, 0] is"),
        (lambda x: DensityRatio.fit(x, x, minimum=3.0, maximum=2.0), "minimum is 3.0 and maximum 2.0"),
        (lambda x: DensityRatio.fit(None, x), "up is None: it must be a Tensor"),
        (lambda x: DensityRatio.fit(x, x, sample=None), "sample is None: it must be a number"),
        (
            lambda x: mean_pooled(x[None], torch.full((1, len(x)), math.nan)),
            "mask[0, 0] is nan: it must be true or",
        ),
        (lambda x: DensityRatio.fit(x, x, minimum=0.0), "minimum is 0.0: it must be positive"),
        (lambda x: DensityRatio.fit(x, x, maximum=math.inf), "maximum is inf: it must be from 1e-12 to 1e+12"),
        (lambda x: DensityRatio.fit(x, x, sample=1), "sample is 1"),
        (lambda x: fixed([1.0]).weights(x), "embeddings has shape (4, 2) and must have (4, 1)"),
        (lambda x: fixed([1.0, 1.0]).log_ratio(x[0, 0]), "embeddings has shape ()"),
        (lambda x: fixed([1.0, 1.0]).weights(x * math.nan), "embeddings[0, 0] is nan"),
        (lambda x: fixed([math.nan]), "coefficients[0] is nan"),
        (lambda x: mean_pooled(x, x[:, 0]), "hidden has shape (B, T, D), not (4, 2)"),
        (lambda x: mean_pooled(x[None], x), "mask has shape (4, 2) and must have (1, 4)"),
        (lambda x: mean_pooled(x[None].expand(2, 4, 2), torch.tensor([[1] * 4, [0] * 4])), "mask[1] has no token"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as error:
        call(gaussian(4, 2))
    assert words in str(error.value)


def test_as_few_as_two_prompts_of_a_class():
    found = DensityRatio.fit(gaussian(2, 3), gaussian(30, 3, seed=1))
    assert bool(torch.isfinite(found.weights(gaussian(5, 3, seed=2))).all())


# Mean pooling


def test_mean_pooled():
    """Tokens (1, 4) and (3, 0) on either side of padding: (2, 2); one token: itself. Padding is not read."""
    nan = math.nan
    hidden = torch.tensor([[[1.0, 4.0], [nan, nan], [3.0, 0.0]], [[nan, nan], [5.0, 6.0], [nan, math.inf]]])
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]])
    assert mean_pooled(hidden, mask).tolist() == [[2.0, 2.0], [5.0, 6.0]]
    assert torch.equal(mean_pooled(hidden, mask.bool()), mean_pooled(hidden, mask))


def test_mean_pooled_sums_bf16_in_float32():
    """1 and then 999 times 1/256: 4.90234375/1000. A sum in bf16 stays at 1: it has a spacing of 1/128 there."""
    hidden = torch.full((1, 1000, 1), 1 / 256).bfloat16()
    hidden[0, 0] = 1.0
    pooled = mean_pooled(hidden, torch.ones(1, 1000))
    assert pooled.dtype == torch.float32
    assert pooled.item() == pytest.approx((1 + 999 / 256) / 1000, rel=1e-6)
    assert mean_pooled(hidden.double(), torch.ones(1, 1000)).dtype == torch.float64
