"""By how much models prefer the chosen answers of pairs: rules, reward models, and policies by their implicit reward.

The implicit reward of a run (or of its checkpoint or adapter) that was trained on pairs is that of its own losses; of
any other policy it is the log-ratio to the reference, ``log pi - log pi_ref``, nats: DPO's with beta 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoConfig

from align.config.schema import Recipe
from align.data.rewards import tokenize_reward_pairs
from align.data.rows import Fault, PairRow
from align.data.tokenize import TokenizedPair, tokenize_pairs
from align.errors import AlignError, ConfigError
from align.heldout import pair_logps
from align.losses import PairLogps, SequenceLogps, combine
from align.losses.catalogue import Loss
from align.losses.layouts import layout_of
from align.models.load import LOAD_ERRORS, LoadedModel, Origin, load_run, origin_of
from align.models.memory import release_freed
from align.models.packaged import NAME as PACKAGED
from align.rewards.named import is_rule, load_reward
from align.rewards.pal_model import ChoiceError, load_reward_model
from align.rewards.scorers import RewardError, RuleReward
from align.tracking.progress import progress

from .asked import RESOLVED, Asked, is_reward_folder
from .models import computing_in, let_score, load_reference, name_of, precision
from .pairs import Pairs

PART = 256
BATCH = 16


@dataclass(frozen=True)
class Margins:
    """What one model says of pairs.

    Attributes:
        places: numbers of the pairs that it can score, M of them, in order.
        scores: the chosen answer's reward less the rejected one's, (M,), float64: of a reward model over its tau, the
            log-odds that it states.
        rewards: of the chosen and of the rejected answers, (M, 2), float64; None for a model that only compares.
        what: which reward it is, in words.
        faults: why it cannot score the other pairs.
    """

    places: list[int]
    scores: Tensor
    rewards: Tensor | None
    what: str
    faults: list[Fault]

    def at(self, kept: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Scores, and rewards, of some of the pairs that it can score."""
        index = {place: number for number, place in enumerate(self.places)}
        numbers = torch.tensor([index[place] for place in kept])
        return self.scores[numbers], None if self.rewards is None else self.rewards[numbers]


def check_models(asked: Asked) -> None:
    """Stop before anything is loaded where a model is none, or a policy has nothing to be compared with.

    Raises:
        ConfigError: with all of them.
    """
    problems = []
    for name in asked.models:
        try:
            kind = kind_of(name)
            if kind == "rule":
                load_reward(name)
        except (ValueError, AlignError) as error:
            problems.append((name, str(error).removeprefix(f"{name}: ")))
            continue
        if kind != "policy" or asked.reference is not None or not _compares(name):
            continue
        if origin_of(name) is None:
            what = f"is missing: {name} is neither a run nor an adapter, so what it was trained from is not known"
            problems.append(("--reference", what))
    if problems:
        raise ConfigError("align eval", problems)


def kind_of(name: str) -> str:
    """``rule``, ``reward`` (a reward or preference model) or ``policy``.

    Raises:
        AlignError: a hub id whose configuration cannot be read.
    """
    if is_rule(name):
        return "rule"
    if name == PACKAGED or _recipe_folder(Path(name).expanduser()) is not None:
        return "reward" if is_reward_folder(name) else "policy"
    if Path(name.partition("@")[0]).expanduser().is_dir():
        return "reward" if is_reward_folder(name) else "policy"
    if "@" in name:
        return "reward"
    try:
        architectures = AutoConfig.from_pretrained(name).architectures or [""]
    except LOAD_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise AlignError(f"{name}: neither a rule (module:function), a folder nor a model: {reason}") from error
    return "reward" if architectures[0].endswith("ForSequenceClassification") else "policy"


@dataclass
class Asking:
    """Models asked one after the other; log-probs of a reference are computed once.

    Args:
        asked: the reference and the limit.
        pairs: what they are asked of.
    """

    asked: Asked
    pairs: Pairs
    before: dict[Any, tuple[list[TokenizedPair], PairLogps]] = field(default_factory=dict)

    def of(self, name: str) -> Margins:
        """What a model says.

        Raises:
            AlignError: it cannot be loaded, cannot score, or fails.
        """
        kind = kind_of(name)
        if kind == "rule":
            return self._rule(name)
        return self._reward(name) if kind == "reward" else self._policy(name)

    def _rule(self, name: str) -> Margins:
        rule, rows = RuleReward(load_reward(name)), self.pairs.rows
        columns = {
            column: [row.get(column) for row in self.pairs.raw] * 2
            for column in self.pairs.columns
            if rule.asks(column) and column not in ("prompt", "chosen", "rejected")
        }
        prompts, answers = [row.prompt for row in rows] * 2, [row.chosen for row in rows]
        try:
            found = rule(prompts, [*answers, *(row.rejected for row in rows)], columns)
        except RewardError as error:
            row = None if error.row is None else rows[error.row % len(rows)]
            where = "" if row is None else f"{row.source}, row {row.row}: "
            raise AlignError(f"{name}: {where}{error.problem}") from error
        values = list(zip(found[: len(rows)], found[len(rows) :], strict=True))
        places = [place for place, pair in enumerate(values) if None not in pair]
        faults = [
            Fault(row.source, row.row, "rejected" if pair[1] is None else "chosen", f"{name} gave None for it", raw)
            for row, raw, pair in zip(rows, self.pairs.raw, values, strict=True)
            if None in pair
        ]
        rewards = torch.tensor([values[place] for place in places], dtype=torch.float64).view(-1, 2)
        return Margins(places, rewards[:, 0] - rewards[:, 1], rewards, "rule", faults)

    def _reward(self, name: str) -> Margins:
        try:
            # In bf16 a score would depend on its batch by 1e-2, which decides pairs that are close.
            model = load_reward_model(name, dtype=torch.float32)
        except (ChoiceError, *LOAD_ERRORS) as error:
            raise AlignError(f"{name}: {str(error).partition(chr(10))[0]}") from error
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        config, rows = model.config, self.pairs.rows
        tokenized = tokenize_reward_pairs(
            rows, model.tokenizer, config.max_length, "cut" if config.over_long == "cut" else "set_aside"
        )
        ids = tokenized.rows
        scores = torch.zeros(len(ids), dtype=torch.float64)
        rewards = None if config.kind == "gpm" else torch.zeros(len(ids), 2, dtype=torch.float64)
        places = places_of(rows, ids)
        order = sorted(range(len(ids)), key=lambda n: -len(ids[n].chosen_ids) - len(ids[n].rejected_ids))
        with progress(f"scoring with {name}", len(ids)) as advance:
            for start in range(0, len(ids), PART):
                part = order[start : start + PART]
                if rewards is None:
                    own = [rows[places[n]] for n in part]
                    sides = [row.prompt for row in own], [row.chosen for row in own], [row.rejected for row in own]
                    scores[part] = model.score_pairs(*sides, batch_size=BATCH).double()
                else:
                    prompts = [ids[n].prompt_ids for n in part] * 2
                    answers = [ids[n].chosen_ids for n in part] + [ids[n].rejected_ids for n in part]
                    values = model.ranking(model.score_ids(prompts, answers, batch_size=BATCH)).double()
                    rewards[part] = values.view(2, -1).T
                release_freed()
                advance(len(part))
        if rewards is not None:
            scores = (rewards[:, 0] - rewards[:, 1]) / config.tau
        return Margins(places, scores, rewards, f"reward model, {config.kind}, tau {config.tau:g}", tokenized.faults)

    def _policy(self, name: str) -> Margins:
        recipe = recipe_of(name)
        losses = own_losses(recipe)
        folder = _recipe_folder(Path(name).expanduser())
        # The adapter of a run is the run: it was trained in the recipe's dtype, which the adapter does not say.
        same = str(folder) if folder is not None and Path(name).name == "adapter" else name
        origin = self.asked.reference or origin_of(same)
        compares = not losses or any(loss.reference for loss in losses)
        dtype, compute = precision([same], origin if isinstance(origin, Origin) else self.asked.reference or "")
        loaded = load_run(name, dtype=dtype)
        limit = self.asked.max_length or (recipe.data.max_length if recipe is not None else None)
        limit = limit or getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        tokenized = tokenize_pairs(self.pairs.rows, loaded.tokenizer, limit)
        ids = tokenized.rows
        after = _logps(loaded, ids, name, compute)
        del loaded
        before = after
        if compares:
            if origin is None:
                what = f"is missing: what {name} was trained from is not known"
                raise ConfigError("align eval", [("--reference", what)])
            before = self._before(name, origin, dtype, compute, limit, ids)
        if losses:
            found = combine(losses, after, before).rewards.double()
            ranking = [loss for loss in losses if loss.info.ranks] or losses
            what = "implicit reward, " + " + ".join(f"{loss.weight:g} * {loss.info.name}" for loss in ranking)
        else:
            found = torch.stack([_ratio(after.chosen, before.chosen), _ratio(after.rejected, before.rejected)], dim=1)
            what = "implicit reward, log-ratio"
        return Margins(places_of(self.pairs.rows, ids), found[:, 0] - found[:, 1], found, what, tokenized.faults)

    def _before(
        self,
        name: str,
        origin: Origin | str,
        dtype: str,
        compute: torch.dtype,
        limit: int | None,
        ids: list[TokenizedPair],
    ) -> PairLogps:
        key = origin, dtype, compute, limit
        if key not in self.before:
            base = load_reference(origin, dtype)
            own = tokenize_pairs(self.pairs.rows, base.tokenizer, limit).rows
            self.before[key] = own, _logps(base, own, name_of(origin), compute)
        own, logps = self.before[key]
        if own != ids:
            raise AlignError(
                f"{name} reads other tokens than {name_of(origin)} (another tokenizer or chat template), so that "
                "their log-probs are not of the same answers: name another --reference"
            )
        return logps


def recipe_of(name: str) -> Recipe | None:
    """The recipe of a run, or of the run that a checkpoint or an adapter is of; None for any other model."""
    folder = _recipe_folder(Path(name).expanduser())
    if folder is None:
        return None
    return Recipe.model_validate(yaml.safe_load((folder / RESOLVED).read_text("utf-8")))


def own_losses(recipe: Recipe | None) -> list[Loss]:
    """The losses of a policy that learnt from pairs; none for any other."""
    if recipe is None or recipe.reward is not None or recipe.data_kind != "pairs":
        return []
    losses = [Loss.of(term.name, weight=term.weight, **term.settings) for term in recipe.terms]
    return losses if all(loss.info.kind == "pair" for loss in losses) else []


def _compares(name: str) -> bool:
    """Whether a policy's implicit reward takes a reference."""
    losses = own_losses(recipe_of(name))
    return not losses or any(loss.reference for loss in losses)


def _recipe_folder(folder: Path) -> Path | None:
    if (folder / RESOLVED).is_file():
        return folder
    inside = folder.name.startswith("checkpoint-") or folder.name in ("adapter", "model", "merged")
    above = folder.absolute().parent
    return above if inside and (above / RESOLVED).is_file() else None


def places_of(rows: Sequence[PairRow], tokenized: Sequence[TokenizedPair]) -> list[int]:
    """Numbers of the rows that are tokenised: the same order, some left out."""
    numbers = iter(range(len(rows)))
    return [next(number for number in numbers if rows[number].row_id == one.row_id) for one in tokenized]


def _logps(loaded: LoadedModel, ids: Sequence[TokenizedPair], name: str, compute: torch.dtype) -> PairLogps:
    inner, pad = let_score(loaded.model), int(loaded.tokenizer.pad_token_id)
    with computing_in(compute, loaded.model):
        return pair_logps(loaded.model, ids, name, pad_token_id=pad, **layout_of(inner))


def _ratio(after: SequenceLogps, before: SequenceLogps) -> Tensor:
    return (after.total - before.total).double()
