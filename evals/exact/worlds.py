"""Finite worlds: every answer can be enumerated, so every expectation and every optimum is exact.

A world has a few prompts, an alphabet of a few tokens and EOS, and answers of at most a few steps. An answer ends with
EOS or is cut at the limit, so answers differ in length, and the probabilities of all of them sum to 1 under any
policy. A policy is a table: logits for the next token after each prompt and prefix. Any distribution over the answers
is such a table, so nothing but the loss decides where training ends.

The labels are those of a Bradley-Terry model with the world's rewards: answer i is preferred to j with probability
``sigma(r_i - r_j)``. Everything that is known of a world is float64 on the CPU; ``sequence_logps`` works on the dtype
and device of the logits that it gets.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor


@dataclass(frozen=True)
class World:
    """Prompts, answers, a reference policy and rewards.

    Args:
        nodes: for each answer and step the row of the policy's table that is read there, (N, T), 0 beyond its end.
        tokens: the token that is taken there, (N, T), 0 beyond its end.
        mask: true on the answer's tokens (EOS counted), (N, T).
        reference: logits of the reference policy, (P, nodes, V).
        reward: of each answer to each prompt, (P, N), in nats of the Bradley-Terry model.
    """

    nodes: Tensor
    tokens: Tensor
    mask: Tensor
    reference: Tensor
    reward: Tensor

    @property
    def length(self) -> Tensor:
        """Tokens of each answer, (N,)."""
        return self.mask.sum(-1)

    @property
    def log_mu(self) -> Tensor:
        """The reference's log-probs of the answers, nats, (P, N)."""
        return self.sequence_logps(self.reference)

    @property
    def mu(self) -> Tensor:
        """The reference's distribution over the answers, (P, N)."""
        return self.log_mu.exp()

    @property
    def labels(self) -> Tensor:
        """Probability that answer i is preferred to j, ``sigma(r_i - r_j)``, (P, N, N)."""
        return torch.sigmoid(self.reward[:, :, None] - self.reward[:, None, :])

    def token_logps(self, logits: Tensor) -> Tensor:
        """Log-prob of each token of each answer, 0 beyond its end, nats, (P, N, T)."""
        nodes, tokens = self.nodes.to(logits.device), self.tokens.to(logits.device)
        taken = logits.log_softmax(-1)[:, nodes, tokens]
        return taken.masked_fill(~self.mask.to(logits.device), 0.0)

    def sequence_logps(self, logits: Tensor) -> Tensor:
        """Log-prob of each answer under the policy with these logits (P, nodes, V), nats, (P, N)."""
        return self.token_logps(logits).sum(-1)

    def table(self, probabilities: Tensor) -> Tensor:
        """Logits (P, nodes, V) of the policy that has these probabilities (P, N): the next-token conditionals."""
        prompts, nodes, vocabulary = self.reference.shape
        cells = (self.nodes * vocabulary + self.tokens)[self.mask]
        share = probabilities[:, :, None].expand(prompts, *self.mask.shape)[:, self.mask]
        mass = probabilities.new_zeros(prompts, nodes * vocabulary).index_add(1, cells, share)
        return mass.log().view(prompts, nodes, vocabulary)


def make_world(*, seed: int, prompts: int = 2, alphabet: int = 2, steps: int = 3, spread: float = 1.0) -> World:
    """A world with random reference and rewards.

    Args:
        seed: of the draw; the same seed gives the same world.
        prompts: number of prompts; nothing is shared between them.
        alphabet: number of tokens besides EOS.
        steps: at most so many tokens in an answer; 1 makes every answer one token long.
        spread: standard deviation of the rewards.

    Raises:
        ValueError: a count below 1.
    """
    if min(prompts, alphabet, steps) < 1:
        raise ValueError(f"a world needs prompts, tokens and steps, not {prompts}, {alphabet} and {steps}")
    end = alphabet
    prefixes = [prefix for size in range(steps) for prefix in product(range(alphabet), repeat=size)]
    answers = [(*prefix, end) for prefix in prefixes]
    answers += list(product(range(alphabet), repeat=steps))
    rows = {prefix: row for row, prefix in enumerate(prefixes)}
    nodes, tokens = (torch.zeros(len(answers), steps, dtype=torch.long) for _ in range(2))
    mask = torch.zeros(len(answers), steps, dtype=torch.bool)
    for i, answer in enumerate(answers):
        for step, token in enumerate(answer):
            nodes[i, step], tokens[i, step], mask[i, step] = rows[answer[:step]], token, True
    draw = torch.Generator().manual_seed(seed)
    reference = torch.randn(prompts, len(prefixes), alphabet + 1, generator=draw, dtype=torch.float64)
    reward = spread * torch.randn(prompts, len(answers), generator=draw, dtype=torch.float64)
    return World(nodes, tokens, mask, reference, reward)


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the L1 distance of two distributions (..., N), the largest over the leading dimensions."""
    return float((p.double().cpu() - q.double().cpu()).abs().sum(-1).max() / 2)
