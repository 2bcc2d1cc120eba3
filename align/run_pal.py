"""``method: pal``: a reward an annotator, and how it compares with one reward for all.

On a frozen backbone the embeddings are computed once and kept (``pal.cache``); training then takes seconds to minutes,
so that a run that was interrupted begins training anew, with the embeddings that it has. A trained backbone has a
trainer (``align.trainers.pal_backbone``) as other methods have; here is what its model is compared with.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.config.schema import PalSpec, Recipe, RewardSpec
from align.data.splits import Split
from align.errors import AlignError
from align.evals.pal import Margins, pal_suite
from align.models.load import LOAD_ERRORS
from align.rewards.models import RewardModel
from align.rewards.pal import Pal
from align.rewards.pal_model import PalRewardModel
from align.tracking.callback import tracked
from align.tracking.files import write_json
from align.tracking.run_folder import RunFolder
from align.trainers.build import Built
from align.trainers.build_pal import Log, backbone_of, build_pal, embedded, embedding_cache, judged, trained
from align.trainers.build_reward import build_reward
from align.trainers.interrupt import interruptible
from align.trainers.pal import Judgements, train_linear

COMPARED = "compared"  # in a run folder: checkpoints of what a model on a trained backbone is compared with


@dataclass(frozen=True)
class PalRun:
    """What a run has to keep.

    Attributes:
        model: trained.
        facts: section ``model`` of the manifest.
        result: of the suite; None without held-out data, or where the recipe wants none.
        seconds: of embedding and of training.
    """

    model: PalRewardModel
    facts: dict[str, Any]
    result: dict[str, Any] | None
    seconds: dict[str, float]


def run_pal(recipe: Recipe, splits: dict[str, Split], log: Log) -> PalRun:
    """Embed, train the model and those that it is compared with, and evaluate.

    Args:
        splits: judgements, ``train`` and if given ``eval``.
        log: called with the epoch and its numbers.

    Raises:
        AlignError: the backbone cannot be loaded.
        ValueError: a row that the backbone cannot read.
    """
    spec = recipe.pal or PalSpec()
    began = time.monotonic()
    try:
        backbone, facts = backbone_of(recipe)
    except LOAD_ERRORS as error:
        raise AlignError(f"{recipe.model.name}: cannot be loaded as a backbone: {error}") from error
    if torch.cuda.is_available():
        backbone.to("cuda")
    cache = embedding_cache(spec, backbone)
    facts["weights_sha256"] = cache.weights_sha256
    data = {name: embedded(split.dataset(), cache, name) for name, split in splits.items()}
    ready = time.monotonic()
    seed = int(recipe.training.get("seed", 42))
    model = trained(spec, data["train"], spec.groups, seed, log)
    facts |= {"embeddings_computed": cache.computed, "embeddings_kept": len(cache)}
    facts["parameters"] = facts["trainable"] = sum(p.numel() for p in model.parameters())
    done = time.monotonic()
    result = None
    if "eval" in data and "pal" in recipe.evals:
        others: dict[str, Tensor] = {}
        if spec.baselines:
            single, linear = trained(spec, data["train"], 1, seed), train_linear(data["train"])
            left, right, _ = data["eval"].pairs()
            others = {"one group": _margin(single, data["eval"]), "Bradley-Terry": linear(right) - linear(left)}
        result = _compared(spec, model, data["eval"], others, seed)
    timings = {"set_up": ready - began, "train": done - ready}
    return PalRun(backbone.attach(model), {"model": facts}, result, timings)


def _compared(spec: PalSpec, model: Pal, held_out: Judgements, others: dict[str, Tensor], seed: int) -> dict[str, Any]:
    """Held-out judgements of annotators who are in training, and of new ones, whose weights a few of theirs give.

    Args:
        others: margins of what the model is compared with, on all held-out judgements, (N,) by name.
    """
    known = set(model.settings["users"])
    seen = [row for row, user in enumerate(held_out.users) if user in known]
    margins = {"PAL": _margin(model, held_out.part(seen)), **{name: found[seen] for name, found in others.items()}}
    parts = {"seen": Margins(margins, held_out.part(seen).users)}
    most = max(spec.shots)
    counts = Counter(user for user in held_out.users if user not in known)
    new = sorted(user for user, count in counts.items() if count > most)
    if new:
        generator = torch.Generator().manual_seed(seed)
        tested, fitted = [], []
        for user in new:
            own = torch.tensor([row for row, name in enumerate(held_out.users) if name == user])
            own = own[torch.randperm(len(own), generator=generator)]
            shown, rest = held_out.part(own[:most]), held_out.part(own[most:])
            tested.append(own[most:])
            fitted.append({count: _fitted(model, shown.part(range(count)), rest) for count in (0, *spec.shots)})
        rows = torch.cat(tested)
        by_count = {f"PAL, {count} pairs": torch.cat([row[count] for row in fitted]) for count in (0, *spec.shots)}
        margins = {**by_count, **{name: found[rows] for name, found in others.items()}}
        parts["unseen"] = Margins(margins, held_out.part(rows).users)
    table = torch.softmax(model.logits.weight.detach(), -1)
    settings = {
        "groups": spec.groups,
        "variant": spec.variant,
        "backbone": "frozen"
        if spec.frozen
        else "trained" + ", and for each that PAL is compared with too" * bool(others),
        "shots": list(spec.shots),
        "new_annotators": len(counts),
        "new_annotators_with_too_few_judgements": len(counts) - len(new),
        "weights": dict(zip(model.settings["users"], table.tolist(), strict=True)),
    }
    return pal_suite(parts, against=tuple(others), start="PAL, 0 pairs", settings=settings)


def compare_trained(recipe: Recipe, built: Built, held_out: Split, run: Path) -> dict[str, Any]:
    """``eval/pal.json`` of a model whose backbone was trained.

    What it is compared with, if ``pal.baselines``, is trained in the same way on a backbone of its own: a PAL model of
    one group, and ``method: bradley_terry``. All three begin as they are fitted to embeddings of the backbone before
    training (the linear reward by its optimum), and have the same judgements, order, steps and rate of the backbone.
    Each has its checkpoints in the run folder until the comparison is written, so that an interrupted run goes on
    where it stopped.

    Raises:
        KeyboardInterrupt: it was interrupted; the checkpoint is complete.
    """
    path = run / "eval" / "pal.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    assert recipe.pal is not None
    others = _baselines(recipe, built, held_out, run / COMPARED) if recipe.pal.baselines else {}
    model: PalRewardModel = built.trainer.reward
    with built.trainer.accelerator.autocast():
        data = judged(model, held_out.dataset())
    pal = copy.deepcopy(model.pal).cpu()
    result = _compared(recipe.pal, pal, data, others, int(recipe.training.get("seed", 42)))
    path.parent.mkdir(exist_ok=True)
    write_json(path, result)
    shutil.rmtree(run / COMPARED, ignore_errors=True)
    return result


def _baselines(recipe: Recipe, built: Built, held_out: Split, folder: Path) -> dict[str, Tensor]:
    train, start = built.trainer.train_dataset, train_linear(built.trainer.judgements)
    linear = recipe.model_copy(update={"method": "bradley_terry", "pal": None, "reward": RewardSpec()})
    makers: dict[str, Callable[[Path], Built]] = {
        "one group": lambda own: build_pal(recipe, train, own, groups=1),
        "Bradley-Terry": lambda own: _at_optimum(build_reward(linear, train, None, own), start),
    }
    return {name: _margins_of(name, make, held_out, folder / name) for name, make in makers.items()}


def _at_optimum(built: Built, reward: Callable[[Tensor], Tensor]) -> Built:
    """A scalar model whose head is this linear reward, but for a constant."""
    model: RewardModel = built.trainer.reward
    ends = torch.cat([torch.eye(model.hidden_size), torch.zeros(1, model.hidden_size)])
    values = reward(ends)
    with torch.no_grad():
        model.carrier.score.weight.copy_((values[:-1] - values[-1])[None])
    return built


def _margins_of(name: str, make: Callable[[Path], Built], held_out: Split, folder: Path) -> Tensor:
    """Train, or go on with it, and tell how much better each preferred answer of the held-out judgements is."""
    trainer = make(folder).trainer
    checkpoint = RunFolder(folder).newest_checkpoint()
    print(f"for comparison: {name}", file=sys.stderr, flush=True)
    with tracked(trainer), interruptible(trainer):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    rows = held_out.dataset()[:]
    with trainer.accelerator.autocast():
        left, right = (
            trainer.reward.score_ids(rows["prompt_ids"], rows[side]) for side in ("rejected_ids", "chosen_ids")
        )
    margins: Tensor = right - left
    return margins


def _margin(model: Pal, part: Judgements) -> Tensor:
    left, right, prompts = part.pairs()
    with torch.no_grad():
        weights = model.weights(part.users, unknown="mean")
        margin: Tensor = model.reward(right, weights, prompts) - model.reward(left, weights, prompts)
    return margin


def _fitted(model: Pal, shown: Judgements, rest: Judgements) -> Tensor:
    left, right, prompts = shown.pairs()
    weights = model.fit_user(left, right, shown.label, prompts, prior="mean")
    left, right, prompts = rest.pairs()
    with torch.no_grad():
        margin: Tensor = model.reward(right, weights, prompts) - model.reward(left, weights, prompts)
    return margin
