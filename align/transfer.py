"""Answers that a reward guides through an aligned baseline: ``align generate --transfer-q``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from align.decoding.constraints import Vocabulary
from align.decoding.engines import Engine, Rollouts, TransformersEngine
from align.decoding.law import Law
from align.decoding.transfer_q import Guided, Query, TransferQ, transfer_q
from align.errors import AlignError
from align.models.load import load_run
from align.rewards.encoding import as_answer

from .baselines import is_url, other_tokens, rollouts_of, server
from .controlled import load_reward

if TYPE_CHECKING:
    from align.generate import Answerer

Write = Callable[[Mapping[int, dict[str, Any]]], None]


@dataclass(frozen=True)
class Transfer:
    """How a reward guides answers, in the words of the command line; see ``align.decoding.transfer_q``.

    Args:
        transfer_q: the baseline: run folder, adapter folder, model folder, packaged name, hub id or URL of a server.
        reward: rule or reward model.
        q_candidates: likeliest tokens that are tried, or blocks that are drawn.
        q_rollouts: of each.
        q_length: tokens of a rollout, or ``end``.
        q_alpha: units of reward that weigh as much as a nat.
        q_value: ``mean`` or ``soft``.
        q_range: least and largest reward, ``0,1``; None where they are not known.
        q_block: tokens of a block; None to choose single tokens.
    """

    transfer_q: str
    reward: str
    q_candidates: int = 10
    q_rollouts: int = 1
    q_length: str = "20"
    q_alpha: float = 1.0
    q_value: Literal["mean", "soft"] = "mean"
    q_range: str | None = None
    q_block: int | None = None

    @property
    def baseline(self) -> str | None:
        """Name of the baseline; None where nothing is rolled out."""
        return None if self.q_length.strip("0") == "" else self.transfer_q

    def settings(self, temperature: float) -> TransferQ:
        """For the decoder. At temperature 0 the best candidate is taken, else one is drawn by its score.

        Raises:
            ValueError: a setting is out of its range; the message begins with its option.
        """
        if not re.fullmatch(r"\d+|end", self.q_length):
            raise ValueError(f"--q-length is {self.q_length}: it must be a whole number of tokens, or end")
        try:
            return TransferQ(
                candidates=self.q_candidates,
                rollouts=self.q_rollouts,
                length=None if self.q_length == "end" else int(self.q_length),
                alpha=self.q_alpha,
                value=self.q_value,
                choice="drawn" if temperature else "greedy",
                law=Law(temperature or 1.0),
                block=self.q_block,
                reward_range=self._range(),
            )
        except ValueError as error:
            text = str(error).replace("reward_range", "range", 1)
            name = re.match(r"\w+", text)
            known = name is not None and f"q_{name[0]}" in self.__dataclass_fields__
            raise ValueError(f"--q-{text}" if known else f"--{text}") from None

    def problems(self, temperature: float) -> list[tuple[str, str]]:
        """What is wrong with settings by themselves, without a model: ``(option, what)`` for each."""
        try:
            self.settings(temperature)
        except ValueError as error:
            option, _, what = str(error).partition(" ")
            return [(option.rstrip(":"), what)]
        return []

    def _range(self) -> tuple[float, float] | None:
        if self.q_range is None:
            return None
        try:
            low, high = map(float, self.q_range.split(","))
        except ValueError:
            raise ValueError(
                f"reward_range is {self.q_range!r}: write the least and the largest reward, 0,1"
            ) from None
        return low, high


class Guide:
    """A model that answers, a baseline that is aligned, and a reward.

    Args:
        answerer: the model.
        transfer: the baseline, the reward, and how they guide.

    Raises:
        AlignError: a model's cache cannot be forked, the baseline or the reward cannot be loaded or reached, the
            reward compares answers instead of scoring them, or the two models have different tokens.
    """

    def __init__(self, answerer: Answerer, transfer: Transfer) -> None:
        self.answerer, self.transfer = answerer, transfer
        self.settings = transfer.settings(answerer.settings.temperature)
        self.scorer = load_reward(transfer.reward)
        self.policy: Engine
        from .inside import Inside  # which is made of these

        if isinstance(answerer, Inside):
            self.policy, self.vocabulary = answerer.engine, answerer.engine.vocabulary
            self.baseline = rollouts_of(answerer.place, answerer.engine, answerer.tokenizer)
            return
        columns = _columns_of(answerer.model)
        try:
            own = self.policy = TransformersEngine(answerer.model)
            self.vocabulary = Vocabulary.of(answerer.tokenizer, size=columns, ends=answerer.eos_ids)
        except ValueError as error:
            raise AlignError(f"{answerer.settings.model}: {error}") from error
        self.baseline = self._load_baseline(own, columns)

    def answer(
        self, encoded: Mapping[int, Sequence[int]], rows: Mapping[int, Mapping[str, Any]], write: Write
    ) -> None:
        """Answer rows of data; ``write`` is called with each as soon as it is there.

        Args:
            encoded: token ids of the prompts, by number of the row.
            rows: the rows, with their columns.
            write: takes the columns that a row gains. Where a row fails, they say why.

        Raises:
            AlignError: the baseline's server does not answer; rows that were written stay.
        """
        numbers, settings = list(encoded), self.answerer.settings
        try:
            transfer_q(
                self.policy,
                self.baseline,
                lambda places, answers: self._rewards([rows[numbers[place]] for place in places], answers),
                [
                    Query(ids, settings.seed * 1_000_003 + number, settings.max_new_tokens)
                    for number, ids in encoded.items()
                ],
                self.vocabulary,
                self.settings,
                on_answer=lambda place, answer: write({numbers[place]: self._columns(answer)}),
            )
        except ConnectionError as error:
            raise AlignError(f"--transfer-q: {error}") from error

    def _load_baseline(self, own: TransformersEngine, columns: int) -> Rollouts | None:
        name = self.transfer.baseline
        if name is None:
            return None
        if name == self.answerer.settings.model:
            return own
        if is_url(name):
            return server(name, self.answerer.tokenizer)
        loaded = load_run(name)
        same = loaded.tokenizer.get_vocab() == self.answerer.tokenizer.get_vocab()
        if not same or _columns_of(loaded.model) != columns:
            raise AlignError(other_tokens(name, self.answerer.settings.model))
        try:
            return TransformersEngine(loaded.model)
        except ValueError as error:
            raise AlignError(f"{name}: {error}") from error

    def _rewards(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[tuple[int, ...]]) -> list[float | None]:
        prompts = [row["prompt"] for row in rows]
        texts = [
            as_answer(row["prompt"], self.vocabulary.text(tokens)) for row, tokens in zip(rows, answers, strict=True)
        ]
        names = set.intersection(*(set(row) for row in rows)) - {"prompt"}
        return self.scorer(prompts, texts, {name: [row[name] for row in rows] for name in sorted(names)})

    def _columns(self, answer: Guided) -> dict[str, Any]:
        failed = bool(answer.reason)
        return {
            "completion": None if failed else self.vocabulary.text(answer.tokens),
            "tokens": len(answer.tokens),
            "finished": answer.finished,
            "valid": not failed,
            "reason": answer.reason,
            "reward": answer.reward if answer.reward is not None and math.isfinite(answer.reward) else None,
            "costs": asdict(answer.costs),
        }


def _columns_of(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])
