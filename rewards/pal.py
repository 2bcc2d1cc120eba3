"""PAL: one reward an annotator, as a mixture of a few prototypes that all annotators share (arXiv:2406.08469).

User i has K weights ``w_i = softmax(omega_i)`` and nothing else of their own, so that a few pairs are enough for a new
user. Answers and prompts come as embeddings of width H: hidden states of a backbone's last token.

- ``PalA``  ideal points: ``reward = -|f(x) - a|`` with ``a = w^T P``, or ``f(w^T P)``, P the prototypes.
- ``PalB``  angles: ``reward = s cos(f(x), sum_k w_k g_k(prompt))``, which may want other things on other prompts.

    model = PalA(width=576, users=["ann", "bob"], groups=2, dimension=64)
    delta = model(left, right, ["ann", "ann", "bob"])      # > 0 where the right answer is preferred
    pal_logistic(delta, label).loss.mean().backward()
    weights = model.fit_user(left, right, label)           # of a new user, all else frozen
    model.reward(answers, weights)                         # the new user's rewards

Prototypes have no order: permuting them and all weights together changes nothing. With one group the weights say
nothing, and the model is one reward for all.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from align.losses.checks import check_finite, check_positive
from align.losses.pal import pal_hinge, pal_logistic

Prior = Literal["mean", "uniform"]
PalLoss = Literal["logistic", "hinge"]
Unknown = Literal["error", "mean", "uniform"]
CONFIG_FILE, WEIGHTS_FILE = "pal.json", "pal.safetensors"
MAX_SCALE = 100.0
_LOSSES = {"logistic": pal_logistic, "hinge": pal_hinge}


class Projector(nn.Module):
    """Residual MLP from R^H to R^d: ``h = W z``, then ``h + act(W_l h)`` for each of ``depth`` layers.

    ``z = (x - center) / spread``, 0 and 1 until ``calibrate`` is called.

    Args:
        width: H.
        dimension: d.
        depth: layers after the first map; 0 is a linear map.
        activation: ``relu`` or ``gelu``.
    """

    def __init__(self, width: int, dimension: int, *, depth: int = 2, activation: str = "relu") -> None:
        super().__init__()
        self.enter = nn.Linear(width, dimension)
        self.layers = nn.ModuleList(nn.Linear(dimension, dimension) for _ in range(depth))
        self.activation: Callable[[Tensor], Tensor] = F.gelu if activation == "gelu" else F.relu
        self.center: Tensor
        self.spread: Tensor
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) to (..., d)."""
        h: Tensor = self.enter((x - self.center) / self.spread)
        for layer in self.layers:
            h = h + self.activation(layer(h))
        return h


class Pal(nn.Module, ABC):
    """What both models share: users as weights on the simplex, rewards, and the fitting of a new user.

    Args:
        width: H, of the embeddings.
        users: names of the annotators, each once.
        groups: K, the number of prototypes.
        dimension: d, of the space in which answers meet what a user wants.
        depth: layers of the projectors.

    Raises:
        ValueError: a size below 1, no users, or a name that stands twice.
    """

    activation = "relu"
    loss: PalLoss = "logistic"  # that it is trained and new users are fitted with

    def __init__(self, width: int, users: Sequence[str], *, groups: int, dimension: int, depth: int = 2) -> None:
        super().__init__()
        for name, size in (("width", width), ("groups", groups), ("dimension", dimension), ("users", len(users))):
            _check_count(name, size, least=1)
        _check_count("depth", depth, least=0)
        if len(set(users)) < len(users):
            raise ValueError("users: a name stands twice, and each annotator has one set of weights")
        self.settings: dict[str, Any] = {
            "width": width,
            "users": list(users),
            "groups": groups,
            "dimension": dimension,
            "depth": depth,
        }
        self.width, self.groups = width, groups
        self._index = {user: index for index, user in enumerate(users)}
        self.projector: nn.Module = Projector(width, dimension, depth=depth, activation=self.activation)
        self.logits = nn.Embedding(len(users), groups)
        # Nearly alike at the start, so that judgements assign users to prototypes and not the first draw.
        nn.init.normal_(self.logits.weight, std=0.1)

    @abstractmethod
    def ideals(self, weights: Tensor, prompts: Tensor | None) -> Tensor:
        """What users of these weights (N, K) want, (N, d)."""

    @abstractmethod
    def match(self, points: Tensor, ideals: Tensor) -> Tensor:
        """Rewards (N,) of projected answers (N, d) for users that want ``ideals`` (N, d)."""

    @torch.no_grad()
    def calibrate(self, answers: Tensor, prompts: Tensor | None = None) -> None:
        """Take mean and deviation of each coordinate from the embeddings of training data, once, before training.

        Hidden states have a few coordinates far larger than the others, on which training would spend itself.

        Args:
            answers: (N, H), N at least 2.
            prompts: (N, H), where the model reads them.
        """
        self._calibrate(self.projector, self._checked("answers", answers))

    @staticmethod
    def _calibrate(projector: nn.Module, values: Tensor) -> None:
        if not isinstance(projector, Projector):
            raise ValueError("calibrate is for the model's own projector, and it has been replaced")
        if len(values) < 2:
            raise ValueError(f"{len(values)} embeddings: a deviation takes two or more")
        spread = values.std(0)
        # A coordinate that hardly moves in training must not be the loudest on other data.
        floor = 0.05 * spread.mean()
        projector.center.copy_(values.mean(0))
        projector.spread.copy_(spread.clamp(min=float(floor)) if floor > 0 else torch.ones_like(spread))

    def weights(self, users: Sequence[str], *, unknown: Unknown = "error") -> Tensor:
        """Weights of users, (N, K); rows are on the simplex.

        Args:
            unknown: what a user of no known name gets: ``mean`` of the known users' weights, ``uniform`` ones, or an
                ``error``.

        Raises:
            ValueError: a user is unknown and that is an error.
        """
        strangers = [user for user in users if user not in self._index]
        if strangers and unknown == "error":
            raise ValueError(
                f"user {strangers[0]!r} is unknown: fit weights from a few pairs (fit_user), or say what strangers "
                "get (unknown='mean' or 'uniform')"
            )
        known = torch.softmax(self.logits.weight, -1)
        if strangers:
            known = torch.cat([known, self.prior(unknown)[None]])  # type: ignore[arg-type]
        index = [self._index.get(user, len(self._index)) for user in users]
        return known[torch.tensor(index, dtype=torch.long, device=known.device)]

    def prior(self, kind: Prior) -> Tensor:
        """Weights before anything is known of a user, (K,): the ``mean`` over known users, or ``uniform``."""
        table = self.logits.weight
        if kind == "mean":
            return torch.softmax(table, -1).mean(0).detach()
        if kind == "uniform":
            return torch.full_like(table[0], 1 / self.groups)
        raise ValueError(f"{kind!r} is no prior: it is mean or uniform")

    def reward(self, answers: Tensor, weights: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Rewards of answers, (N,), for users of given weights.

        Args:
            answers: embeddings, (N, H).
            weights: on the simplex, (N, K), or (K,) for one user.
            prompts: embeddings of the prompts, (N, H), where the model reads them.

        Raises:
            ValueError: another shape, a number that is not finite, or weights off the simplex.
        """
        weights = self._simplex(weights).expand(len(answers), self.groups)
        prompts = None if prompts is None else self._checked("prompts", prompts, len(answers))
        return self.match(self.projector(self._checked("answers", answers)), self.ideals(weights, prompts))

    def forward(self, left: Tensor, right: Tensor, users: Sequence[str], prompts: Tensor | None = None) -> Tensor:
        """``delta``, (N,): the right answer's reward less the left one's, for the losses of ``align.losses.pal``.

        Args:
            left, right: embeddings of the two answers, (N, H).
            users: who judged, N names.
            prompts: embeddings of the prompts, (N, H), where the model reads them.
        """
        if len(users) != len(left):
            raise ValueError(f"{len(left)} pairs and {len(users)} users: one a pair")
        left, right = self._checked("left", left), self._checked("right", right, len(left))
        prompts = None if prompts is None else self._checked("prompts", prompts, len(left))
        ideals = self.ideals(self.weights(users), prompts)
        return self.match(self.projector(right), ideals) - self.match(self.projector(left), ideals)

    def losses(self, delta: Tensor, label: Tensor) -> Tensor:
        """The model's loss, (N,), of what ``forward`` gives for judgements -1 (left) and +1 (right)."""
        return _LOSSES[self.loss](delta, label).loss

    def fit_user(
        self,
        left: Tensor,
        right: Tensor,
        label: Tensor,
        prompts: Tensor | None = None,
        *,
        prior: Prior = "uniform",
        steps: int = 200,
        learning_rate: float = 0.05,
    ) -> Tensor:
        """Weights of a new user from n pairs, (K,); all else, and every other user, stays as it is.

        Adam on the K logits alone, over all pairs at once, by the model's own loss and from the prior; without pairs
        the prior is the answer.

        Args:
            left, right: embeddings of the two answers, (n, H).
            label: -1 where the user preferred the left answer, +1 the right one, (n,).
            prompts: embeddings of the prompts, (n, H), where the model reads them.
            prior: where to begin.

        Raises:
            ValueError: as for ``forward``, or a label other than -1 and +1.
        """
        check_positive("learning_rate", learning_rate)
        start = self.prior(prior)
        if not len(left):
            return start
        left, right = self._checked("left", left), self._checked("right", right, len(left))
        prompts = None if prompts is None else self._checked("prompts", prompts, len(left))
        _check_count("steps", steps, least=1)
        with torch.no_grad():
            points = self.projector(left), self.projector(right)
        logits = start.clamp(min=1e-6).log().requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=learning_rate)
        with torch.enable_grad():
            for _ in range(steps):
                ideals = self.ideals(torch.softmax(logits, -1).expand(len(left), -1), prompts)
                delta = self.match(points[1], ideals) - self.match(points[0], ideals)
                (gradient,) = torch.autograd.grad(self.losses(delta, label).mean(), logits)
                logits.grad = gradient
                optimizer.step()
        return torch.softmax(logits.detach(), -1)

    def parameter_groups(
        self, *, projectors: float = 1e-4, users: float = 5e-3, scale: float = 1e-1
    ) -> list[dict[str, Any]]:
        """Parameters for an optimiser with the learning rates of the paper's code; projectors decay by 0.01."""
        of = {"projectors": projectors, "users": users, "scale": scale}
        groups: dict[str, list[nn.Parameter]] = {name: [] for name in of}
        for name, parameter in self.named_parameters():
            part = name.partition(".")[0]
            groups[{"logits": "users", "prototypes": "users", "log_scale": "scale"}.get(part, "projectors")] += [
                parameter
            ]
        return [
            {"params": found, "lr": of[name], "weight_decay": 0.01 if name == "projectors" else 0.0}
            for name, found in groups.items()
            if found
        ]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write settings, users and weights, for ``load_pal``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, folder / WEIGHTS_FILE)
        written = {"class": type(self).__name__, **self.settings}
        (folder / CONFIG_FILE).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")

    def _checked(self, name: str, values: Tensor, count: int | None = None) -> Tensor:
        rows = "N" if count is None else str(count)
        if values.ndim != 2 or values.shape[1] != self.width or count not in (None, len(values)):
            raise ValueError(f"{name} has shape {tuple(values.shape)} and must have ({rows}, {self.width})")
        check_finite(name, values)
        return values.to(self.logits.weight.dtype)

    def _simplex(self, weights: Tensor) -> Tensor:
        if weights.shape[-1] != self.groups:
            raise ValueError(f"weights has shape {tuple(weights.shape)} and must have (N, {self.groups})")
        off = bool((weights < 0).any()) or not torch.allclose(
            weights.sum(-1), torch.ones_like(weights.sum(-1)), atol=1e-4
        )
        if off:
            raise ValueError("weights are not on the simplex: 0 or more each, 1 in sum")
        return weights.to(self.logits.weight.dtype)


class PalA(Pal):
    """Ideal points: ``reward = -|f(x) - a|``.

    Args:
        prototypes: ``direct`` ones lie in R^d and ``a = w^T P``; ``projected`` ones lie in R^H, as embeddings do, and
            ``a = f(w^T P)``.
        squared: distances squared; differences of rewards are then linear in a.
        loss: ``logistic`` or ``hinge``.
    """

    def __init__(
        self,
        width: int,
        users: Sequence[str],
        *,
        groups: int,
        dimension: int,
        depth: int = 2,
        prototypes: Literal["direct", "projected"] = "direct",
        squared: bool = False,
        loss: PalLoss = "logistic",
    ) -> None:
        super().__init__(width, users, groups=groups, dimension=dimension, depth=depth)
        if prototypes not in ("direct", "projected"):
            raise ValueError(f"prototypes is {prototypes!r}: it is direct or projected")
        if loss not in _LOSSES:
            raise ValueError(f"loss is {loss!r}: it must be {' or '.join(_LOSSES)}")
        self.settings |= {"prototypes": prototypes, "squared": squared, "loss": loss}
        self.projected, self.squared, self.loss = prototypes == "projected", squared, loss
        start = torch.randn(groups, width if self.projected else dimension)
        self.prototypes = nn.Parameter(F.normalize(start, dim=-1))

    @torch.no_grad()
    def calibrate(self, answers: Tensor, prompts: Tensor | None = None) -> None:
        """As of any Pal; projected prototypes move to where the answers are."""
        super().calibrate(answers, prompts)
        if self.projected and isinstance(self.projector, Projector):
            self.prototypes.mul_(self.projector.spread).add_(self.projector.center)

    def ideals(self, weights: Tensor, prompts: Tensor | None) -> Tensor:
        mixed = weights @ self.prototypes
        return self.projector(mixed) if self.projected else mixed

    def match(self, points: Tensor, ideals: Tensor) -> Tensor:
        gap = points - ideals
        return -(gap**2).sum(-1) if self.squared else -torch.linalg.vector_norm(gap, dim=-1)


class PalB(Pal):
    """Angles, given the prompt: ``reward = s cos(f(x), sum_k w_k g_k(prompt))``, ``s = min(exp(log_scale), 100)``.

    Its loss is the cross-entropy over both answers' rewards: the logistic loss of their difference.
    """

    activation = "gelu"

    def __init__(self, width: int, users: Sequence[str], *, groups: int, dimension: int, depth: int = 2) -> None:
        super().__init__(width, users, groups=groups, dimension=dimension, depth=depth)
        self.prompt_maps = nn.ModuleList(
            Projector(width, dimension, depth=depth, activation=self.activation) for _ in range(groups)
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @torch.no_grad()
    def calibrate(self, answers: Tensor, prompts: Tensor | None = None) -> None:
        """As of any Pal, and for the prompts."""
        super().calibrate(answers, prompts)
        if prompts is None:
            raise ValueError("PalB reads the prompt: give the prompts' embeddings")
        values = self._checked("prompts", prompts)
        for prompt_map in self.prompt_maps:
            self._calibrate(prompt_map, values)

    def ideals(self, weights: Tensor, prompts: Tensor | None) -> Tensor:
        if prompts is None:
            raise ValueError("PalB reads the prompt: give the prompts' embeddings")
        directions = torch.stack([g(prompts) for g in self.prompt_maps], dim=1)
        return (weights[..., None] * directions).sum(1)

    def match(self, points: Tensor, ideals: Tensor) -> Tensor:
        return self.log_scale.exp().clamp(max=MAX_SCALE) * F.cosine_similarity(points, ideals, dim=-1)


def _check_count(name: str, count: int, *, least: int) -> None:
    if count < least:
        raise ValueError(f"{name} is {count}: at least {least}")


def load_pal(folder: str | Path) -> Pal:
    """What ``save_pretrained`` wrote.

    Raises:
        ValueError: there is none, or the file names another class.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder}: no {CONFIG_FILE} in this folder, so it holds no PAL model")
    found = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    name = found.pop("class")
    if name not in ("PalA", "PalB"):
        raise ValueError(f"{folder / CONFIG_FILE}: class {name!r} is not PalA or PalB")
    model: Pal = {"PalA": PalA, "PalB": PalB}[name](**found)
    model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    return model
