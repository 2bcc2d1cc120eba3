"""PAL with its backbone: a reward model like any other, once it is said whose reward is meant.

Its folder is that of a reward model with ``pal.json`` and ``pal.safetensors`` beside, and ``annotators.json`` where
weights were fitted to new annotators later:

    model = PalRewardModel.from_pretrained("runs/pal/model").choose("annotator:bob")
    model.rewards(["Hi"], ["Hello."])

The head of the Hugging Face classifier is not used, and 0.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .carrier import RewardConfig
from .models import CONFIG_FILE, RewardModel, RewardOutput
from .named import FITTED_FILE as FITTED_FILE
from .named import split_choice
from .pal import CONFIG_FILE as PAL_FILE
from .pal import Pal, load_pal

CHOICES = "annotator:NAME, mean (of the known ones), uniform, group:NUMBER, mix:WEIGHT:WEIGHT..."


class ChoiceError(ValueError):
    """Whose reward is meant: not said, not known, or said of a model that has one reward for all."""


class PalRewardModel(RewardModel):
    """A backbone and, once ``attach`` gave it one, a ``Pal`` on its hidden states; make it with ``kind="pal"``.

    Attributes:
        pal: prototypes, maps, and the weights of the annotators that were trained.
        fitted: weights of annotators that came later, by name, K each.
    """

    kinds = ("pal",)
    pal: Pal
    chosen: Tensor | None

    def __init__(self, carrier: Any, tokenizer: Any, config: RewardConfig) -> None:
        super().__init__(carrier, tokenizer, config)
        self.fitted: dict[str, list[float]] = {}
        self.register_buffer("chosen", None)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Self:
        """What ``save_pretrained`` wrote, from a folder.

        Raises:
            ValueError: another reward model, or weights of annotators that are none.
        """
        folder = Path(name).expanduser()
        model = super().from_pretrained(folder, **options)
        model.attach(load_pal(folder))
        if (folder / FITTED_FILE).is_file():
            model.fitted = json.loads((folder / FITTED_FILE).read_text(encoding="utf-8"))
        return model

    def save_pretrained(self, folder: str | Path, *, merge: bool = False) -> None:
        """As of any reward model."""
        super().save_pretrained(folder, merge=merge)
        self.pal.save_pretrained(folder)
        if self.fitted:
            (Path(folder) / FITTED_FILE).write_text(json.dumps(self.fitted, indent=2) + "\n", encoding="utf-8")

    def attach(self, pal: Pal) -> Self:
        """Let ``pal`` judge this backbone's states.

        Raises:
            ValueError: it is for states of another width.
        """
        if pal.width != self.hidden_size:
            raise ValueError(f"the PAL model reads states of width {pal.width}, and these have {self.hidden_size}")
        self.pal = pal.to(self.carrier.score.weight.device)
        self.carrier.score.requires_grad_(False).weight.zero_()
        return self

    def choose(self, who: str) -> Self:
        """Let the model's rewards be those of ``who``, and return the model.

        Args:
            who: ``annotator:NAME``, one of training or one whose weights were fitted later; ``mean`` of the weights
                of training's annotators; ``uniform`` weights; ``group:NUMBER``, from 1, one prototype alone; or
                ``mix:WEIGHT:WEIGHT...``, a weight a group, 1 in sum.

        Raises:
            ChoiceError: none of these, or an annotator or group that the model does not have.
        """
        self.chosen = self._weights(who).to(self.carrier.score.weight.device)
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        prompt_length: Tensor | None = None,
        users: Tensor | None = None,
    ) -> RewardOutput:
        """``read`` of B rows ``[prompt | answer]``, padded on either side."""
        return self.read(*self.states(input_ids, attention_mask, prompt_length), users)

    def read(self, answer: Tensor, prompt: Tensor | None, users: Tensor | None = None) -> RewardOutput:
        """Rewards of ``states``, (B, H) each, for who was chosen, or for each row's own annotator.

        Args:
            users: of training, numbers of their rows in ``pal.logits``, (B,).

        Raises:
            ChoiceError: neither was said.
        """
        weights = self.chosen if users is None else torch.softmax(self.pal.logits(users), -1)
        if weights is None:
            raise ChoiceError(f"a PAL model has a reward an annotator: choose one with choose({CHOICES})")
        with torch.autocast(answer.device.type, enabled=False):
            return RewardOutput(self.pal.reward(answer, weights, prompt), None)

    def _weights(self, who: str) -> Tensor:
        kind, _, what = who.partition(":")
        groups, known = self.pal.groups, self.pal.settings["users"]
        if who in ("mean", "uniform"):
            return self.pal.prior(who)  # type: ignore[arg-type]
        if kind == "annotator" and what in known:
            return self.pal.weights([what])[0].detach()
        if kind == "annotator" and what in self.fitted:
            return torch.tensor(self.fitted[what])
        if kind == "annotator":
            names = ", ".join([*known, *self.fitted][:8]) + (", ..." if len(known) + len(self.fitted) > 8 else "")
            raise ChoiceError(
                f"annotator {what!r} is unknown: fit weights to their judgements with align models fit-annotators, "
                f"or choose mean or uniform. Known: {names}"
            )
        if kind == "group":
            if not (what.isdecimal() and 1 <= int(what) <= groups):
                raise ChoiceError(f"{who}: groups are 1 to {groups}")
            return torch.eye(groups)[int(what) - 1]
        if kind == "mix":
            try:
                mix = [float(weight) for weight in what.split(":")]
            except ValueError:
                mix = []
            if len(mix) != groups or not all(weight >= 0 for weight in mix) or not math.isclose(sum(mix), 1):
                raise ChoiceError(f"{who}: {groups} weights, one a group, 0 or more each and 1 in sum")
            return torch.tensor(mix)
        raise ChoiceError(f"{who!r} names nobody: write {CHOICES}")


def is_pal(folder: str | Path) -> bool:
    """Whether a folder holds a PAL model."""
    return (Path(folder).expanduser() / PAL_FILE).is_file()


def load_reward_model(spec: str, **options: Any) -> RewardModel:
    """A reward model by its folder, its run or a hub id; of a PAL model ``FOLDER@WHO``, its reward for ``WHO``.

    Args:
        options: for ``from_pretrained`` of transformers.

    Raises:
        ChoiceError: a PAL model and nobody chosen, or the other way round. ValueError, OSError: no such model.
    """
    name, who = split_choice(spec)
    trained = Path(name).expanduser() / "model"  # in a run's folder
    found = str(trained) if (trained / CONFIG_FILE).is_file() else name
    if not is_pal(found):
        if who is not None:
            raise ChoiceError(f"{name} has one reward for all, and no annotators: leave out @{who}")
        return RewardModel.from_pretrained(found, **options)
    if who is None:
        raise ChoiceError(f"{name} has a reward an annotator: write {name}@WHO, and WHO is {CHOICES}")
    return PalRewardModel.from_pretrained(found, **options).choose(who)
