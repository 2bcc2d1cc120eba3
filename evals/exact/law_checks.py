"""The laws themselves: one function each, which looks at one drawn batch and says what it compared and what broke."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from align.losses.types import LARGEST, LossOutput, SequenceLogps

from .drawn import FIRST, LEVELS, Batch, Subject, draw, extremes

TOLERANCE = 1e-9  # float64: what changes nothing may change by this times (1 + |value|)
STEP = 1e-5  # of the central differences
TINY_BETA, HUGE_BETA = 1e-9, 1e6  # factors on the default beta
CLEAR = 50.0  # a gap of rewards at which exp(-gap) is nothing
JUNK = (math.nan, math.inf, -math.inf, 1e30, -1e30)  # what may stand in padding


@dataclass(frozen=True)
class Finding:
    """What a law found in one draw: how many comparisons it made, and the first that broke it, in words."""

    compared: int
    broken: str | None = None


def _reference_shift(subject: Subject, batch: Batch, generator: Generator) -> Finding:
    shift = -0.5 - 2.5 * _uniform(generator, batch.length.shape)
    models = {*subject.policies, *subject.baselines}
    return _same(subject, batch, batch.map(lambda name, value: value + shift if name in models else value))


def _prompt_shift(subject: Subject, batch: Batch, generator: Generator) -> Finding:
    shift = -0.5 - 2.5 * _uniform(generator, (len(batch), 1))
    moved = {*subject.policies, *LEVELS}
    return _same(
        subject,
        batch,
        batch.map(lambda name, v: v + (shift if v.ndim == 2 else shift.squeeze(1)) if name in moved else v),
    )


def _swap(subject: Subject, batch: Batch, generator: Generator) -> Finding:
    margin = _margin(subject, batch)
    broken = _difference("margin", -margin, _margin(subject, _exchanged(subject, batch)))
    if broken:
        return Finding(len(batch), f"exchanging the answers does not negate the margin: {broken}")
    other, solved = _with_margin(subject, _redrawn(subject, batch, generator), margin)
    if not bool(solved.any()):
        return Finding(0)
    index = solved.nonzero().squeeze(1)
    # Other rows of the batch may matter to the loss, so the rows are taken out after it is computed.
    before, after = subject(batch).loss[index], subject(other).loss[index]
    broken = _difference("loss", before, after, tolerance=1e-7)
    return Finding(len(index), broken and f"two inputs of equal margin have unequal losses: {broken}")


def _small_beta(subject: Subject, batch: Batch, generator: Generator) -> Finding:
    beta = TINY_BETA * subject.settings["beta"]
    largest = max(float(g.abs().max()) for g in _gradients(subject, batch, beta=beta))
    return Finding(len(batch), f"at beta {beta:g} the gradient is {largest:.3g}" if largest > 1e-6 else None)


def _large_beta(subject: Subject, batch: Batch, generator: Generator) -> Finding:
    beta = HUGE_BETA * subject.settings["beta"]
    out = subject(batch.drop("preference") if subject.info.soft else batch, beta=beta)
    right = _ranked_right(batch, out.rewards, beta)
    loss = out.loss.detach().abs()[right]
    if not right.any():
        return Finding(0)
    worst = float(loss.max())
    return Finding(
        int(right.sum()), f"at beta {beta:g} an answer ranked right has loss {worst:.3g}" if worst > 1e-6 else None
    )


def _duplication(subject: Subject, batch: Batch, generator: Generator) -> Finding:
    models = {*subject.policies, *subject.baselines}
    twice = batch.map(lambda name, value: 2 * value if name in models else value)
    return _same(subject, batch, Batch(twice.values, 2 * batch.length))


def _rows(subject: Subject, batch: Batch, generator: Generator) -> Finding:
    together = subject(batch)
    for row in range(len(batch)):
        alone = subject(batch.rows(torch.tensor([row])))
        for what, a, b in _parts(together, alone):
            broken = _difference(what, a[row : row + 1], b)
            if broken:
                return Finding(len(batch), f"row {row} in its batch and alone: {broken}")
    return Finding(len(batch))


def _permutation(subject: Subject, batch: Batch, generator: Generator) -> Finding:
    order = torch.arange(len(batch)).roll(1 + int(torch.randint(0, len(batch) - 1, (), generator=generator)))
    before, after = subject(batch), subject(batch.rows(order))
    for what, a, b in _parts(before, after):
        broken = _difference(what, a[order], b)
        if broken:
            return Finding(len(batch), f"rows in another order: {broken}")
    return Finding(len(batch))


def _padding(subject: Subject, batch: Batch, generator: Generator) -> Finding:
    """Through ``SequenceLogps.from_tokens``: tokens of the right sums, padded on either side with junk."""
    before = subject(batch)
    for side in ("left", "right"):
        for junk in JUNK:
            after = subject(_padded(subject, batch, side, junk, generator))
            for what, a, b in _parts(before, after):
                broken = _difference(what, a, b)
                if broken:
                    return Finding(len(batch), f"padded on the {side} with {junk}: {broken}")
    return Finding(len(batch) * 2 * len(JUNK))


def _gradient(subject: Subject, batch: Batch, generator: Generator) -> Finding:
    """Central differences of the summed loss, element by element; points where it has a kink are passed over."""
    middle = subject(batch).loss.detach()
    if middle.dtype != torch.float64:
        return Finding(1, f"float64 inputs give a loss in {middle.dtype}")
    compared = 0
    for name, gradient in zip(subject.leaves, _gradients(subject, batch), strict=True):
        for place in range(gradient.numel()):
            ends = []
            for step in (-STEP, STEP):
                moved = batch.values[name].clone()
                moved.view(-1)[place] += step
                ends.append(subject(batch.put(**{name: moved})).loss.detach())
            low, high = ((end - middle).sum() / STEP for end in ends)
            slope = float(high - low) / 2
            steeper = abs(float(high + low))  # one side than the other
            if steeper > 1e-3 * (1 + abs(slope)):
                continue
            compared += 1
            ours = float(gradient.view(-1)[place])
            if not abs(slope - ours) <= 1e-5 * (1 + abs(slope)) + steeper / 2:  # a kink may be just beside the point
                return Finding(compared, f"{name}, element {place}: autograd {ours:.9g}, differences {slope:.9g}")
    return Finding(compared)


def _finite(subject: Subject, batch: Batch, generator: Generator) -> Finding:
    cases = [batch, *(extremes(subject, generator, size) for size in (1e4, LARGEST))]
    for case, dtype in itertools.product(cases, (torch.float64, torch.float32)):
        out = subject(case.to(dtype))
        named = {"loss": out.loss, "rewards": out.rewards}
        named |= dict(zip(subject.leaves, _gradients(subject, case.to(dtype)), strict=True))
        for what, value in named.items():
            bad = (~torch.isfinite(value)).nonzero()
            if len(bad):
                return Finding(len(case), f"{what}{bad[0].tolist()} is {float(value[tuple(bad[0])])} in {dtype}")
    return Finding(2 * sum(map(len, cases)))


def _bf16(subject: Subject, batch: Batch, generator: Generator) -> Finding:
    rounded = batch.to(torch.bfloat16)
    ours, exact = subject(rounded).loss.detach(), subject(rounded.to(torch.float64)).loss.detach()
    off = (ours.double() - exact).abs() - (1e-5 * exact.abs()).clamp(min=1e-6)
    place = int(off.argmax())
    if float(off.max()) <= 0:
        return Finding(len(batch))
    return Finding(
        len(batch), f"{float(ours.view(-1)[place]):.9g} from bf16, {float(exact.view(-1)[place]):.9g} exact"
    )


CHECKS: dict[str, Callable[[Subject, Batch, Generator], Finding]] = {
    "reference_shift": _reference_shift,
    "prompt_shift": _prompt_shift,
    "swap": _swap,
    "small_beta": _small_beta,
    "large_beta": _large_beta,
    "duplication": _duplication,
    "rows": _rows,
    "permutation": _permutation,
    "padding": _padding,
    "gradient": _gradient,
    "finite": _finite,
    "bf16": _bf16,
}


# --- what they stand on ----------------------------------------------------------------------------------------------


def _same(subject: Subject, before: Batch, after: Batch) -> Finding:
    """Whether two batches have the same losses."""
    return Finding(len(before), _difference("loss", subject(before).loss, subject(after).loss))


def _parts(one: LossOutput, two: LossOutput) -> list[tuple[str, Tensor, Tensor]]:
    """Loss, rewards and metrics of two outputs side by side."""
    metrics = [(name, value, two.metrics[name]) for name, value in one.metrics.items()]
    return [("loss", one.loss, two.loss), ("rewards", one.rewards, two.rewards), *metrics]


def _difference(what: str, before: Tensor, after: Tensor, tolerance: float = TOLERANCE) -> str | None:
    """The first element in which two tensors differ, in words; NaN differs from everything."""
    before, after = before.detach(), after.detach()
    if before.shape != after.shape:
        return f"{what} of shape {tuple(before.shape)} became {tuple(after.shape)}"
    bad = (~((before - after).abs() <= tolerance * (1 + before.abs()))).nonzero()
    if not len(bad):
        return None
    place = tuple(bad[0].tolist())
    return f"{what}{list(place)} was {float(before[place]):.9g} and is {float(after[place]):.9g}"


def _gradients(subject: Subject, batch: Batch, **changed: Any) -> list[Tensor]:
    """Gradients of the summed loss by the loss's leaves; zero where it does not depend on one."""
    leaves = {name: batch.values[name].detach().clone().requires_grad_() for name in subject.leaves}
    loss = subject(batch.put(**leaves), **changed).loss.sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return [*found]


def _margin(subject: Subject, batch: Batch) -> Tensor:
    rewards = subject(batch).rewards
    return rewards[:, 0] - rewards[:, 1]


def _exchanged(subject: Subject, batch: Batch) -> Batch:
    """The first and the second answer exchanged."""
    models = {*subject.policies, *subject.baselines}
    values = {name: value.flip(1) if name in models else value for name, value in batch.values.items()}
    for one, two in FIRST.items():
        if one in values:
            values[one], values[two] = batch.values[two], batch.values[one]
    if "delta" in values:
        values["delta"] = -values["delta"]
    if "logits" in values:
        values["logits"] = values["logits"].flip(1)
    return Batch(values, batch.length.flip(1))


def _redrawn(subject: Subject, batch: Batch, generator: Generator) -> Batch:
    """Other answers: log-probs, lengths and scores are new, what else a row has (labels, weights) stays."""
    fresh = draw(subject, generator, len(batch))
    answers = {*subject.leaves, *subject.baselines}
    return Batch({n: fresh.values[n] if n in answers else v for n, v in batch.values.items()}, fresh.length)


def _with_margin(subject: Subject, batch: Batch, target: Tensor) -> tuple[Batch, Tensor]:
    """The batch with its first answers moved until the margins are ``target``, and the rows where that succeeded.

    Secant steps on a constant that is added to the first answer's log-prob or score.
    """

    def moved(t: Tensor) -> Batch:
        def change(name: str, value: Tensor) -> Tensor:
            if name in subject.policies:
                return torch.cat([(value[:, :1] + t[:, None]).clamp(max=-1e-3), value[:, 1:]], 1)
            if name == "logits":
                return torch.cat([value[:, :1] + t[:, None], value[:, 1:]], 1)
            return value + (t[:, None] if value.ndim == 2 else t) if name in (*FIRST, "delta") else value

        return batch.map(change)

    t0, t1 = torch.zeros(len(batch), dtype=torch.float64), torch.full((len(batch),), -0.5, dtype=torch.float64)
    e0, e1 = _margin(subject, moved(t0)) - target, _margin(subject, moved(t1)) - target
    for _ in range(40):
        if bool((e1.abs() <= 1e-12 * (1 + target.abs())).all()):
            break
        step = e1 * (t1 - t0) / (e1 - e0)
        t0, e0, t1 = t1, e1, torch.where(torch.isfinite(step), t1 - step, t1).clamp(-1e6, 1e6)
        e1 = _margin(subject, moved(t1)) - target
    return moved(t1), e1.abs() <= 1e-9 * (1 + target.abs())


def _ranked_right(batch: Batch, rewards: Tensor, beta: float) -> Tensor:
    """Rows that the loss's own rewards rank as the labels, the order of the answers, or their scores do.

    By ``CLEAR`` at least, but for scores: two rewards that are nearly equal are still so at this beta.
    """
    scores = batch.values.get("scores", batch.values.get("win_rates"))
    if scores is not None:
        return (rewards.argsort(1) == scores.argsort(1)).all(1)
    if rewards.shape[1] > 1:
        gaps = rewards[:, :-1] - rewards[:, 1:]
        real = torch.arange(1, rewards.shape[1]) < batch.values.get("answers", torch.tensor(rewards.shape[1])).view(
            -1, 1
        )
        return ((gaps > CLEAR) | ~real).all(1)
    threshold = batch.values.get("shift", beta * batch.values.get("kl", torch.zeros(())))
    up = batch.values.get("label", torch.ones(len(batch), dtype=torch.bool))
    over = rewards[:, 0] - threshold
    return torch.where(up, over, -over) > CLEAR


def _padded(subject: Subject, batch: Batch, side: str, junk: float, generator: Generator) -> Batch:
    """The totals as ``from_tokens`` gives them from padded tokens; a ranking also gets padded answers."""
    width = int(batch.length.max()) + 3
    place = torch.arange(width).expand(*batch.length.shape, width)
    inside = place < batch.length[..., None] if side == "right" else place >= width - batch.length[..., None]
    share = torch.where(inside, 0.1 + _uniform(generator, inside.shape), 0.0)
    share = share / share.sum(-1, keepdim=True)
    length = batch.length

    def summed(total: Tensor) -> Tensor:
        nonlocal length
        carrier = SequenceLogps.from_tokens(torch.where(inside, total[..., None] * share, junk), inside)
        length = carrier.length
        return carrier.total

    models = {*subject.policies, *subject.baselines}
    values = {name: summed(value) if name in models else value for name, value in batch.values.items()}
    return Batch(values, length)


def _uniform(generator: Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)
