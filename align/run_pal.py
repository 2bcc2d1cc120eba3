"""``method: pal``: a reward an annotator, trained on embeddings of a frozen backbone, and how it compares.

The embeddings are computed once and kept (``pal.cache``); training then takes seconds to minutes, so that a run that
was interrupted begins training anew, with the embeddings that it has.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.config.schema import PalSpec, Recipe
from align.data.judgements import JudgementRow
from align.data.rows import Content
from align.data.splits import Split
from align.errors import AlignError
from align.evals.pal import Margins, pal_suite
from align.models.embeddings import EmbeddingCache
from align.models.hardware import resolve_dtype
from align.models.load import LOAD_ERRORS, locate
from align.models.packaged import PUBLISHED, cache_folder
from align.rewards.models import RewardModel
from align.rewards.pal import Pal, PalA, PalB
from align.tracking.progress import progress
from align.trainers.pal import Judgements, train_linear, train_pal

Log = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class PalRun:
    """What a run has to keep.

    Attributes:
        model: trained.
        facts: section ``model`` of the manifest.
        result: of the suite; None without held-out data, or where the recipe wants none.
        seconds: of embedding and of training.
    """

    model: Pal
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
    backbone, facts = _backbone(recipe)
    cache = EmbeddingCache(Path(spec.cache or cache_folder() / "embeddings"), backbone)
    facts["weights_sha256"] = cache.weights_sha256
    data = {name: _embedded(split.used, cache, name) for name, split in splits.items()}
    embedded = time.monotonic()
    seed = int(recipe.training.get("seed", 42))
    model = trained(spec, data["train"], spec.groups, seed, log)
    facts |= {"embeddings_computed": cache.computed, "embeddings_kept": len(cache)}
    facts["parameters"] = facts["trainable"] = sum(p.numel() for p in model.parameters())
    done = time.monotonic()
    result = None
    if "eval" in data and "pal" in recipe.evals:
        result = _compared(spec, model, data, seed)
    return PalRun(model, {"model": facts}, result, {"set_up": embedded - began, "train": done - embedded})


def trained(spec: PalSpec, data: Judgements, groups: int, seed: int, log: Log | None = None) -> Pal:
    """A model of this many groups, trained on the judgements."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"groups": groups, "dimension": spec.dimension, "depth": spec.depth}
    kind = {"a": PalA, "b": PalB}[spec.variant]
    model: Pal = kind(data.answers.shape[1], sorted(set(data.users)), **sizes)
    with progress(f"training, {groups} group{'s' * (groups > 1)}", spec.epochs) as advance:

        def after_epoch(epoch: int, loss: float) -> bool:
            if log is not None:
                log(epoch, {"loss": loss, "epoch": float(epoch)})
            advance(1)
            return False

        train_pal(
            model,
            data,
            epochs=spec.epochs,
            batch_size=spec.batch_size,
            loss=spec.loss,
            projectors=spec.learning_rate,
            users=spec.users_learning_rate,
            seed=seed,
            after_epoch=after_epoch,
        )
    return model


def _backbone(recipe: Recipe) -> tuple[RewardModel, dict[str, Any]]:
    spec = recipe.model
    dtype, reason = resolve_dtype(spec.dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if spec.attention != "auto":
        options["attn_implementation"] = spec.attention
    if spec.trust_remote_code:
        options["trust_remote_code"] = True
    try:
        model = RewardModel.create(locate(spec.name), frozen=True, max_length=recipe.data.max_length, **options)
    except LOAD_ERRORS as error:
        raise AlignError(f"{spec.name}: cannot be loaded as a backbone: {error}") from error
    if torch.cuda.is_available():
        model = model.to("cuda")
    name = str(dtype).removeprefix("torch.")
    facts = {"name": spec.name, **PUBLISHED.get(spec.name, {}), "dtype": name, "dtype_reason": reason}
    return model, facts


def _embedded(rows: Sequence[Any], cache: EmbeddingCache, name: str) -> Judgements:
    """Judgements on a table with each answer to each prompt once; the preferred answer is the right one."""
    place: dict[str, int] = {}
    prompts: list[Content] = []
    answers: list[Content] = []

    def row_of(prompt: Any, answer: Any) -> int:
        key = repr((prompt, answer))
        if key not in place:
            place[key] = len(prompts)
            prompts.append(prompt)
            answers.append(answer)
        return place[key]

    judged: list[JudgementRow] = list(rows)
    left = torch.tensor([row_of(row.prompt, row.rejected) for row in judged])
    right = torch.tensor([row_of(row.prompt, row.chosen) for row in judged])
    with progress(f"embeddings, {name} data", len(prompts)) as advance:
        states = cache.embed(prompts, answers, advance=advance)
    label = torch.ones(len(judged))
    return Judgements(*states, left, right, label, [row.annotator for row in judged])


def _compared(spec: PalSpec, model: Pal, data: dict[str, Judgements], seed: int) -> dict[str, Any]:
    """Held-out judgements of annotators who are in training, and of new ones, whose weights a few of theirs give."""
    train, held_out = data["train"], data["eval"]
    single = trained(spec, train, 1, seed)
    linear = train_linear(train)
    known = set(train.users)

    def shared(part: Judgements) -> dict[str, Tensor]:
        left, right, _ = part.pairs()
        return {"one group": _margin(single, part), "Bradley-Terry": linear(right) - linear(left)}

    seen = held_out.of([user for user in held_out.users if user in known])
    parts = {"seen": Margins({"PAL": _margin(model, seen), **shared(seen)}, seen.users)}
    most = max(spec.shots)
    counts = Counter(user for user in held_out.users if user not in known)
    new = sorted(user for user, count in counts.items() if count > most)
    if new:
        generator = torch.Generator().manual_seed(seed)
        tested, fitted = [], []
        for user in new:
            own = held_out.of([user])
            order = torch.randperm(len(own), generator=generator)
            shown, rest = own.part(order[:most]), own.part(order[most:])
            tested.append(rest)
            fitted.append({count: _fitted(model, shown.part(range(count)), rest) for count in (0, *spec.shots)})
        rest = held_out.part([])
        rest = Judgements(
            rest.answers,
            rest.prompts,
            torch.cat([part.left for part in tested]),
            torch.cat([part.right for part in tested]),
            torch.cat([part.label for part in tested]),
            [user for part in tested for user in part.users],
        )
        by_count = {f"PAL, {count} pairs": torch.cat([row[count] for row in fitted]) for count in (0, *spec.shots)}
        parts["unseen"] = Margins({**by_count, **shared(rest)}, rest.users)
    table = torch.softmax(model.logits.weight.detach(), -1)
    settings = {
        "groups": spec.groups,
        "variant": spec.variant,
        "shots": list(spec.shots),
        "new_annotators": len(counts),
        "new_annotators_with_too_few_judgements": len(counts) - len(new),
        "weights": dict(zip(model.settings["users"], table.tolist(), strict=True)),
    }
    return pal_suite(parts, against=("one group", "Bradley-Terry"), settings=settings)


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
