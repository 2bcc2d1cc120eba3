"""Log-probs from hidden states: equal to the plain log-softmax, forward and backward, for every kind of head."""

from __future__ import annotations

import itertools

import pytest
import torch

from align.losses import logprobs
from align.losses.logprobs import Head, all_logps, token_logps


def plain(hidden: torch.Tensor, target: torch.Tensor, head: Head) -> torch.Tensor:
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.soft_cap is not None:
        logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]


def case(bias: bool, scale: float, cap: float | None, dtype: torch.dtype = torch.float64) -> tuple:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(11, 8, generator=generator, dtype=dtype)
    weight = torch.randn(23, 8, generator=generator, dtype=dtype)
    offset = torch.randn(23, generator=generator, dtype=dtype) if bias else None
    target = torch.randint(0, 23, (11,), generator=generator)
    return hidden, target, Head(weight, offset, scale, cap)


KINDS = list(itertools.product([False, True], [1.0, 0.3], [None, 2.5]))


@pytest.mark.parametrize(("bias", "scale", "cap"), KINDS)
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("tile", [1, 4 * 23, 2**24])
@pytest.mark.parametrize("most", [11 * 23 - 1, 11 * 23])
def test_equal_to_log_softmax(monkeypatch, bias, scale, cap, train_head, tile, most):
    """Values, and gradients of a weighted sum with respect to hidden states, weight and bias, to 1e-12.

    Tiles are kept for the backward pass, or computed anew.
    """
    monkeypatch.setattr(logprobs, "TILE_ELEMENTS", tile)
    monkeypatch.setattr(logprobs, "KEPT_ELEMENTS", most)
    hidden, target, head = case(bias, scale, cap)
    inputs = [hidden] + ([head.weight] + ([head.bias] if bias else []) if train_head else [])
    for tensor in inputs:
        tensor.requires_grad_()
    weights = torch.linspace(-1, 2, len(target), dtype=torch.float64)

    out = token_logps(hidden, target, head)
    expected = plain(hidden, target, head)
    torch.testing.assert_close(out.logps, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad((weights * out.logps).sum(), inputs)
    theirs = torch.autograd.grad((weights * expected).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("most", "products"), [(11 * 23 - 1, 2), (11 * 23, 1)])
def test_a_trained_head_computes_its_logits_once_where_they_can_be_kept(monkeypatch, most, products):
    """Nothing is kept of what is scored without gradients."""
    real, calls = logprobs._logits, []
    monkeypatch.setattr(logprobs, "_logits", lambda *given: (calls.append(1), real(*given))[1])
    monkeypatch.setattr(logprobs, "KEPT_ELEMENTS", most)
    hidden, target, head = case(False, 1.0, None)
    head.weight.requires_grad_()
    out = token_logps(hidden, target, head).logps
    assert (11, 23) in [tuple(t.shape) for t in out.grad_fn.saved_tensors if t is not None] or products == 2
    out.sum().backward()
    assert len(calls) == products


@pytest.mark.parametrize(("bias", "scale", "cap"), KINDS)
def test_whole_vocabulary(bias, scale, cap):
    """Its entries are those of the targets, and it sums to 1; no gradient is kept."""
    hidden, target, head = case(bias, scale, cap)
    logps = all_logps(hidden.requires_grad_(), head)
    torch.testing.assert_close(logps.gather(1, target[:, None])[:, 0], token_logps(hidden, target, head).logps)
    torch.testing.assert_close(logps.exp().sum(1), torch.ones(11, dtype=torch.float64))
    assert not logps.requires_grad


def test_entropy_and_top():
    """Uniform logits over 23 tokens: entropy log 23; a head that singles out token 5: top for 5 alone."""
    head = Head(torch.zeros(23, 8))
    out = token_logps(torch.randn(4, 8), torch.arange(4), head)
    torch.testing.assert_close(out.entropy, torch.full((4,), 23.0).log())
    weight = torch.zeros(23, 8)
    weight[5] = 1
    out = token_logps(torch.ones(2, 8), torch.tensor([5, 6]), Head(weight))
    assert out.top.tolist() == [True, False]
    probabilities = torch.tensor([8.0] + [0.0] * 22).softmax(0)
    torch.testing.assert_close(out.entropy[0], -(probabilities * probabilities.log()).sum())


def test_bf16_reads_the_target_in_float32():
    """A bf16 product rounds a logit near 32 to a multiple of 1/4; the target's own logit must not be rounded so.

    Logits around 8 * 4 = 32 with a spread of about 1. Against float64 on the same bf16 inputs the error of ours stays
    below 0.02 nats in the mean (the normaliser averages its roundings), and a plain bf16 log-softmax is at least three
    times as far off.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(256, 64, generator=generator)
    weight = 0.15 * torch.randn(512, 64, generator=generator)
    hidden[:, 0], weight[:, 0] = 8.0, 4.0
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    target = torch.randint(0, 512, (256,), generator=generator)
    exact = plain(hidden.double(), target, Head(weight.double()))
    ours = token_logps(hidden, target, Head(weight)).logps.double()
    naive = plain(hidden, target, Head(weight)).double()
    assert (ours - exact).abs().mean() < 0.02
    assert (naive - exact).abs().mean() > 3 * (ours - exact).abs().mean()


def test_certain_token_has_log_prob_zero():
    """One logit of 1,000 against zeros: log-prob 0 and gradient 0, without overflow; its rival: -1,000."""
    weight = torch.zeros(4, 1)
    weight[2] = 1000.0
    hidden = torch.ones(2, 1, requires_grad=True)
    out = token_logps(hidden, torch.tensor([2, 0]), Head(weight))
    assert out.logps.tolist() == [0.0, -1000.0]
    (gradient,) = torch.autograd.grad(out.logps.sum(), hidden)
    assert gradient[:, 0].tolist() == [0.0, -1000.0]


def test_autocast_runs_the_product_in_bf16():
    hidden, target, head = case(False, 1.0, None, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = token_logps(hidden, target, head).logps
    expected = token_logps(hidden.bfloat16(), target, Head(head.weight.bfloat16())).logps
    assert inside.dtype == torch.float32
    # The target's own logit comes from the unrounded weight; the rest is the bf16 product.
    torch.testing.assert_close(inside, expected, rtol=0, atol=0.05)
    assert not torch.equal(inside, token_logps(hidden, target, head).logps)


def test_bf16_head_adds_up_tiles_in_float32(monkeypatch):
    """1,024 tokens in tiles of one: the gradients of a bf16 head are as near to float64 as those of a single tile.

    Positive hidden states and four targets make the sum grow far beyond a token's part, so that a sum kept in bf16
    would lose the later tokens. (Tiles that cancel keep the bf16 rounding of each tile's own product.) Rounding the
    result itself to bf16 is off by up to 2^-9 of it; we allow that much more.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(1024, 16, generator=generator).bfloat16()
    weight = (0.1 * torch.randn(32, 16, generator=generator)).bfloat16()
    bias = torch.zeros(32, dtype=torch.bfloat16)
    target = torch.randint(0, 4, (1024,), generator=generator)

    def gradients(dtype: torch.dtype, tile: int) -> list[torch.Tensor]:
        monkeypatch.setattr(logprobs, "TILE_ELEMENTS", tile)
        inputs = [weight.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()]
        logps = token_logps(hidden.to(dtype), target, Head(*inputs)).logps
        return list(torch.autograd.grad(logps.sum(), inputs))

    for exact, one, many in zip(
        gradients(torch.float64, 2**24), gradients(torch.bfloat16, 2**24), gradients(torch.bfloat16, 32), strict=True
    ):
        assert many.dtype == torch.bfloat16
        error = (many.double() - exact).norm()
        assert error <= (one.double() - exact).norm() + 2**-9 * exact.norm()


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="do not match"):
        token_logps(torch.zeros(3, 8), torch.zeros(2, dtype=torch.long), Head(torch.zeros(5, 8)))
