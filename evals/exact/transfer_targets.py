"""What Transfer-Q* and its relatives ask for, in a world of two tokens and two steps (arXiv:2405.20495).

``p1 = (.6, .4)``, ``p2 = ((.7, .3), (.2, .8))``; rewards of answers ``r = ((.1, 1), (.6, .4))``; alpha = beta = 1/2.
The code that decodes is run for every rollout that there can be, with its probability, and the uniform of a draw is
cut into the cells that lead to each candidate: laws and expectations are sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.decoding.constraints import Vocabulary
from align.decoding.course import drawn
from align.decoding.engines import Rollout
from align.decoding.law import Law
from align.decoding.transfer_q import Guided, Query, Reward, Step, TransferQ, best_of, transfer_q
from align.decoding.values import normalised, transfer_weights, weighted

from .chances import Chances, every_run
from .rows import Row, Stack, Target

Tokens = tuple[int, ...]
Table = dict[Tokens, float]
P1, P2 = (0.6, 0.4), ((0.7, 0.3), (0.2, 0.8))
ANSWERS = tuple(product((0, 1), repeat=2))
P: Table = {(one, two): P1[one] * P2[one][two] for one, two in ANSWERS}
R: Table = dict(zip(ANSWERS, (0.1, 1.0, 0.6, 0.4), strict=True))
OTHER: Table = dict(zip(ANSWERS, (0.5, 0.3, 0.2, 0.9), strict=True))
BETA = 0.5
WORDS = Vocabulary([b"a", b"b", None], frozenset({2}))
Q_STAR = (0.7494924478, 0.4543289264)


def aligned(reward: Table, beta: float = BETA) -> Table:
    """``p exp(r / beta)``, normalised, over all answers."""
    shares = normalised([math.log(P[answer]) + reward[answer] / beta for answer in ANSWERS])
    return dict(zip(ANSWERS, shares, strict=True))


@dataclass
class Model:
    """A table over answers as an engine; what follows a prompt is enumerated.

    Args:
        table: probabilities of the answers.
        stack: where logits are.
        chances: of this run; None where rollouts come in tens that hold each answer as often as it is probable.
    """

    table: Table
    stack: Stack
    chances: Chances | None = None
    context: int | None = None
    sequences: list[Tokens] = field(default_factory=list)

    def law(self, begin: Tokens) -> list[float]:
        """Probabilities of the next token."""
        masses = [
            sum(p for answer, p in self.table.items() if answer[: len(begin) + 1] == (*begin, z)) for z in (0, 1)
        ]
        return [mass / sum(masses) for mass in masses]

    def open(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """A sequence for each prompt; its first token only begins it."""
        self.sequences += [tuple(prompt[1:]) for prompt in prompts]
        return list(range(len(self.sequences) - len(prompts), len(self.sequences)))

    def extend(self, handle: int, token: int) -> None:
        """One more token."""
        self.sequences[handle] += (token,)

    def fork(self, handle: int) -> int:
        """Another of the same tokens."""
        return self.open([(2, *self.sequences[handle])])[0]

    def close(self, handle: int) -> None:
        """There is nothing to free."""

    def next_logits(self, handles: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Log-probabilities and a constant, on the stack; the end token is impossible."""
        rows = [[math.log(p) + 3 for p in self.law(self.sequences[handle])] + [-math.inf] for handle in handles]
        return self.stack.here(torch.tensor(rows, dtype=torch.float64)), list(range(len(rows)))

    def rollouts(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, **settings: Any) -> list[Rollout]:
        """One a prompt, by the run's chances."""
        return [self._rollout(tuple(prompt[1:]), number, max_new_tokens) for number, prompt in enumerate(prompts)]

    def _rollout(self, begin: Tokens, number: int, most: int) -> Rollout:
        tokens = begin
        while len(tokens) < min(2, len(begin) + most):
            law = self.law(tokens)
            z = int(number % 10 >= round(10 * law[0])) if self.chances is None else self.chances.choose(law)
            tokens += (z,)
        return Rollout(tokens[len(begin) :], False)


def cells(step: Step, settings: TransferQ) -> list[float]:
    """Probability of each of two candidates of a step: where the uniform goes over from one to the other."""
    if settings.choice == "greedy" or len(step.candidates) == 1:
        return [float(place == step.chosen) for place in range(len(step.candidates))]
    values = [math.nan if value is None else value for value in step.values]
    low, high = 0.0, 1.0
    while (middle := (low + high) / 2) not in (low, high):
        if drawn(step.log_probs, values, settings.alpha, middle):
            high = middle
        else:
            low = middle
    return [low, 1 - low]


def of_table(table: Table, begins: Sequence[Tokens] = ((),)) -> Reward:
    """A reward that is looked up; a query's number says what its prompt holds of the answer already."""
    return lambda numbers, answers: [table[(*begins[n], *a)] for n, a in zip(numbers, answers, strict=True)]


def law_of_answers(
    settings: TransferQ, baseline: Table, stack: Stack, other: Table | None = None, *, deck: bool = False
) -> Table:
    """Probability of every answer, token by token, over every rollout that there can be."""
    begins: tuple[Tokens, ...] = ((), (0,), (1,))

    def run(chances: Chances | None) -> list[Guided]:
        return transfer_q(
            Model(P, stack),
            Model(baseline, stack, chances),
            of_table(R, begins),
            [Query((2, *begin), max_new_tokens=2 - len(begin)) for begin in begins],
            WORDS,
            settings,
            baseline_reward=of_table(other, begins) if other is not None else None,
        )

    runs = [(1.0, run(None))] if deck else list(every_run(run))
    found = [np.zeros(2) for _ in begins]
    for chance, answers in runs:
        for place, answer in enumerate(answers):
            step = answer.steps[0]
            for (z, *_), share in zip(step.candidates, cells(step, settings), strict=True):
                found[place][z] += chance * share
    return {(one, two): float(found[0][one] * found[1 + one][two]) for one, two in ANSWERS}


def mean_values(settings: TransferQ, baseline: Table, stack: Stack, other: Table | None = None) -> list[float]:
    """``E[Q]`` of both first tokens over every rollout that there can be."""

    def run(chances: Chances) -> list[Guided]:
        policy, reward = Model(P, stack), of_table(R)
        weights = of_table(other) if other is not None else None
        query = Query((2,), max_new_tokens=2)
        return transfer_q(
            policy, Model(baseline, stack, chances), reward, [query], WORDS, settings, baseline_reward=weights
        )

    found = [0.0, 0.0]
    for chance, (answer,) in every_run(run):
        for (z, *_), value in zip(answer.steps[0].candidates, answer.steps[0].values, strict=True):
            found[z] += chance * (value or 0.0)
    return found


def _tolerance(stack: Stack) -> float:
    return stack.tolerance(1e-9, 1e-5)


def _row(method: str, quantity: str, exact: Sequence[float], ours: Sequence[float], stack: Stack) -> Row:
    far = max(abs(a - b) for a, b in zip(exact, ours, strict=True))
    return Row(method, quantity, exact[0], ours[0], far, _tolerance(stack))


def _laws(method: str, quantity: str, exact: Table, ours: Table, stack: Stack, *, told: bool = False) -> Row:
    """Laws of answers in total variation; shown is the mean reward."""
    mean = [sum(law[answer] * R[answer] for answer in ANSWERS) for law in (exact, ours)]
    far = sum(abs(exact[answer] - ours[answer]) for answer in ANSWERS) / 2
    return Row(method, quantity, mean[0], mean[1], far, None if told else _tolerance(stack))


def divergence(law: Table) -> float:
    """``KL(law || p)``, nats."""
    return sum(share * math.log(share / P[answer]) for answer, share in law.items() if share)


def check_transfer_q(stack: Stack) -> Iterator[Row]:
    """Values, laws of tokens and of answers, and the figures of the published example."""
    name = "transfer_q"
    two = TransferQ(rollouts=2, length=None, alpha=BETA, choice="drawn")
    direct = mean_values(two, aligned(R), stack)
    yield _row(name, "direct, E[Q] of two rollouts", Q_STAR, direct, stack)
    indirect = []
    for z in (0, 1):
        texts = [(z, second) for second in (0, 1)]
        transfer = transfer_weights([R[t] for t in texts], [OTHER[t] for t in texts], kind="mean", beta=BETA)
        log_weights = [math.log(aligned(OTHER)[text]) + w for text, w in zip(texts, transfer, strict=True)]
        indirect.append(weighted([R[text] for text in texts], log_weights, kind="mean", beta=BETA))
    yield _row(name, "indirect, Q of all rollouts", Q_STAR, indirect, stack)
    few = mean_values(two, aligned(OTHER), stack, OTHER)
    yield Row.number(name, "indirect, E[Q] of two rollouts", Q_STAR[0], few[0], None)
    deck = TransferQ(rollouts=10, length=None, alpha=BETA, choice="drawn")
    constant = dict.fromkeys(ANSWERS, 0.0)
    for label, other, first, reward, kl in (
        ("Q of the policy", None, 0.5659792587, 0.6213853574, 0.2220644956),
        ("Q*", constant, 0.7302304614, 0.6698663208, 0.3162977130),
    ):
        law = law_of_answers(deck, P, stack, other, deck=True)
        yield _row(name, f"{label}, p(first)", [first], [law[0, 0] + law[0, 1]], stack)
        yield _row(name, f"{label}, E[r]", [reward], [sum(law[answer] * R[answer] for answer in ANSWERS)], stack)
        yield _row(name, f"{label}, KL", [kl], [divergence(law)], stack)
    soft = TransferQ(rollouts=10, length=None, alpha=BETA, choice="drawn", value="soft")
    law = law_of_answers(soft, P, stack, deck=True)
    yield _laws(name, "soft, law of answers: rho_r", aligned(R), law, stack)
    yield _row(name, "soft, KL", [0.2573370300], [divergence(law)], stack)
    wide = TransferQ(rollouts=10, length=None, alpha=1e12, choice="drawn")
    yield _laws(name, "alpha to infinity: p", P, law_of_answers(wide, P, stack, deck=True), stack)
    one = TransferQ(rollout_law=Law(), length=None, alpha=BETA, choice="drawn")
    yield _laws(name, "one rollout, law of answers", _one_rollout(), law_of_answers(one, aligned(R), stack), stack)
    yield Row.number(name, "choices that a range changes", 0, _changed_by_range(stack), 0.0)


def _one_rollout() -> Table:
    """The law of answers where a first token's value is one rollout of rho_r: a mixture over both rollouts."""
    rho, first = aligned(R), [0.0, 0.0]
    second = [normalised([math.log(rho[z, s]) for s in (0, 1)]) for z in (0, 1)]
    for after in ANSWERS:
        shares = normalised([math.log(P1[z]) + R[z, after[z]] / BETA for z in (0, 1)])
        for z in (0, 1):
            first[z] += second[0][after[0]] * second[1][after[1]] * shares[z]
    return {(z, s): first[z] * second[z][s] for z, s in ANSWERS}


def _changed_by_range(stack: Stack) -> float:
    """Of greedy answers in 100 worlds, how many are others once the range of the reward is known."""
    draw = torch.Generator().manual_seed(stack.seed)
    changed = 0
    for _ in range(100):
        rewards = torch.rand(4, generator=draw, dtype=torch.float64).tolist()
        shares = torch.rand(4, generator=draw, dtype=torch.float64).add(0.05)
        table = dict(zip(ANSWERS, (shares / shares.sum()).tolist(), strict=True))
        reward = of_table(dict(zip(ANSWERS, rewards, strict=True)))
        chosen = {
            transfer_q(
                Model(table, stack),
                Model(table, stack, Chances()),
                reward,
                [Query((2,), max_new_tokens=2)],
                WORDS,
                TransferQ(alpha=BETA, **savings),
            )[0].tokens
            for savings in ({}, {"reward_range": (0.0, 1.0)}, {"reward_range": (0.0, 1.0), "at_once": 1})
        }
        changed += len(chosen) > 1
    return changed


def check_args(stack: Stack) -> Iterator[Row]:
    """``softmax(logit + w r)`` over the three likeliest tokens, the published example."""
    settings = TransferQ(candidates=3, length=0, choice="drawn")
    words = Vocabulary([b"a", b"b", b"c", b"d", None], frozenset({4}))
    logits = stack.here(torch.tensor([[2.0, 1.0, 0.5, -1.0, -math.inf]], dtype=torch.float64))

    class Logits(Model):
        def next_logits(self, handles: Sequence[int]) -> tuple[Tensor, list[int]]:
            return logits, [0] * len(handles)

    def reward(numbers: Sequence[int], answers: Sequence[Tokens]) -> list[float]:
        return [(0.1, 0.9, 0.3, 2.0)[answer[0]] for answer in answers]

    (answer,) = transfer_q(Logits(P, stack), None, reward, [Query((2,), max_new_tokens=1)], words, settings)
    (step,) = answer.steps
    values = [math.nan if value is None else value for value in step.values]
    exact = [0.4781800362, 0.3915007011, 0.1303192627]
    edges = np.cumsum([0.0, *exact])
    cells_of = [(edges[place] + share * exact[place], place) for place in range(3) for share in (0.001, 0.999)]
    inside = sum(drawn(step.log_probs, values, 1.0, uniform) == place for uniform, place in cells_of)
    yield Row.number("args", "candidates in their cells", 6, inside, 0.0)


def check_blocks(stack: Stack) -> Iterator[Row]:
    """Every pair of blocks that can be drawn; a block here is a whole answer."""
    name = "blockwise"
    best = _over_pairs(best_of(2), stack)
    exact = dict.fromkeys(ANSWERS, 0.0)
    for pair in product(ANSWERS, repeat=2):
        exact[max(pair, key=R.__getitem__)] += P[pair[0]] * P[pair[1]]
    yield _laws(name, "best of two, law of answers", exact, best, stack)
    settings = TransferQ(candidates=2, block=2, length=0, alpha=BETA, choice="drawn")
    exact = dict.fromkeys(ANSWERS, 0.0)
    for pair in product(ANSWERS, repeat=2):
        for answer, share in zip(pair, normalised([R[answer] / BETA for answer in pair]), strict=True):
            exact[answer] += P[pair[0]] * P[pair[1]] * share
    ours = _over_pairs(settings, stack)
    yield _laws(name, "one of two by exp(r / alpha)", exact, ours, stack)
    yield _laws(name, "the same against rho_r", aligned(R), ours, stack, told=True)


def _over_pairs(settings: TransferQ, stack: Stack) -> Table:
    found = dict.fromkeys(ANSWERS, 0.0)

    def run(chances: Chances) -> list[Guided]:
        query = Query((2,), max_new_tokens=2)
        return transfer_q(Model(P, stack, chances), None, of_table(R), [query], WORDS, settings)

    for chance, (answer,) in every_run(run):
        for block, share in zip(answer.steps[0].candidates, cells(answer.steps[0], settings), strict=True):
            found[block] += chance * share
    return found


GUIDED: dict[str, Target] = {
    "transfer_q": Target("closed form", "p(z) exp(Q*(z) / alpha); with soft values p exp(r / beta)", check_transfer_q),
    "args": Target("closed form", "softmax(logit + w r) over the likeliest tokens", check_args),
    "blockwise": Target("closed form", "of K blocks of p the best, or one by exp(V / alpha)", check_blocks),
}
"""Decoders that a reward guides, as ``align verify`` names them."""
