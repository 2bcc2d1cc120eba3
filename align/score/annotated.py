"""What an annotator says of several answers to a prompt, as columns for training on groups (``align.data.groups``).

- ``preference``: K lists of K, the probability that answer i is preferred to j.
- ``scores``: of each answer, the mean of its log-odds against the others.
- ``win_rates``: of each answer, the mean of its probabilities against the others.

Both means leave out the answer itself. A row with a pair that the annotator set aside has no such means, and is set
aside with the reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from align.data.fields import FieldError
from align.errors import AlignError, ConfigError
from align.losses.groups import mean_scores
from align.rewards.annotators import Annotator, AnnotatorError, ParsedAnnotator, Verdicts, parse_annotator
from align.rewards.expression import ExpressionError
from align.rewards.named import load_reward
from align.rewards.patience import NoAnswerError, answer_within
from align.rewards.scorers import asked_columns

from .rows import LISTED, ScoreRow
from .scorers import Columns, Scored, code_hash

COLUMNS = ("preference", "scores", "win_rates")
_TEXT = {"prompt", LISTED}
_GO_ON = "The same command goes on with what is not judged yet"


class AnnotatorScorer:
    """An annotator of a recipe as a scorer; its models are loaded when the first row is scored.

    Args:
        given: what the recipe says (``align.rewards.annotators``).
        source, where: what a problem is told to be in, such as ``align score`` and ``--annotator``.
        seconds: how long a call of it may take, setting ``{where}_seconds``; None: however long.
        sets_aside: a row that it fails on is set aside, with the reason; False: the pass ends there, and asks for the
            row again when it goes on. Pairs that it has nothing to say of are no failure.

    Raises:
        ConfigError: it is no annotator.
    """

    name = "annotator"

    def __init__(
        self, given: Any, source: str, where: str, seconds: float | None = None, *, sets_aside: bool = True
    ) -> None:
        self.source, self.where, self.seconds, self.sets_aside = source, where, seconds, sets_aside
        try:
            self.parsed: ParsedAnnotator = parse_annotator(given)
            asked, self.every = asked_columns(self.parsed.rules)
        except ExpressionError as error:
            raise self._refused(error) from error
        self.asked: dict[str, str | None] = {**asked, **dict.fromkeys(self.parsed.data_columns, "its reference")}
        self.identity = {
            "annotator": given,
            "code": {rule: code_hash(load_reward(rule)) for rule in self.parsed.rules},
            "models": {folder: _files_hash(Path(folder)) for folder in self.parsed.models.values()},
        }

    def _refused(self, error: ExpressionError) -> ConfigError:
        return ConfigError(self.source, [(f"{self.where}.{error.where}".rstrip("."), error.problem)])

    @cached_property
    def annotator(self) -> Annotator:
        """The annotator, loaded.

        Raises:
            ConfigError: it cannot be.
        """
        try:
            return self.parsed.load()
        except ExpressionError as error:
            raise self._refused(error) from error

    def score(self, rows: Sequence[ScoreRow]) -> Scored:
        """See ``Scorer``; a row that the annotator refuses, or has not compared all answers of, has its reason.

        Raises:
            AlignError: the annotator fails for all of them, such as a server that is not there, or for one where rows
                are not to be set aside, or takes too long.
        """
        found: dict[int, Columns] = {}
        refused: dict[int, FieldError] = {}
        for place, row in enumerate(rows):
            lacking = next((name for name, rule in self.asked.items() if rule and name not in row.fields), None)
            if lacking is not None:
                refused[place] = FieldError(lacking, f"missing, and {self.asked[lacking]} asks for it")
            elif len(row.answers.get(LISTED, ())) < 2:
                refused[place] = FieldError(LISTED, "an annotator compares answers: give two or more to the prompt")
        by_size: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            if place not in refused:
                by_size.setdefault(len(row.answers[LISTED]), []).append(place)
        for places in by_size.values():
            while left := [place for place in places if place not in found and place not in refused]:
                self._judge(rows, left, found, refused)
        return Scored([found.get(place, {}) for place in range(len(rows))], refused=refused)

    def _judge(
        self,
        rows: Sequence[ScoreRow],
        places: Sequence[int],
        found: dict[int, Columns],
        refused: dict[int, FieldError],
    ) -> None:
        """The verdicts on these rows, or why there are none on one of them."""
        own = [rows[place] for place in places]
        names = {name for row in own for name in row.fields if name in self.asked or self.every} - _TEXT
        columns = {name: [row.fields.get(name) for row in own] for name in names}
        try:
            verdicts = self._asked(own, columns)
        except AnnotatorError as error:
            if not self.sets_aside:
                raise AlignError(f"{self.where}: {error}. {_GO_ON}") from error
            if error.prompt is None:
                raise AlignError(f"{self.source}: {error}") from error
            refused[places[error.prompt]] = FieldError(self.name, error.problem)
            return
        except NoAnswerError as error:
            raise AlignError(f"{self.where}: {error}, on {len(own)} prompts. {_GO_ON}") from error
        for problem in verdicts.problems:
            pair = f"answers {problem.first + 1} and {problem.second + 1} were not compared"
            refused.setdefault(places[problem.prompt], FieldError(self.name, f"{pair}: {problem.reason}"))
        whole = [number for number, place in enumerate(places) if place not in refused]
        if whole:
            found |= dict(zip([places[number] for number in whole], _columns(verdicts, whole), strict=True))

    def _asked(self, rows: Sequence[ScoreRow], columns: dict[str, list[Any]]) -> Verdicts:
        annotator = self.annotator  # its models are loaded here, which the limit is not for
        given = [row.prompt for row in rows], [row.answers[LISTED] for row in rows], columns
        if self.seconds is None:
            return annotator(*given)
        return answer_within(self.seconds, f"{self.where}_seconds", lambda: annotator(*given))


def _columns(verdicts: Verdicts, whole: Sequence[int]) -> list[Columns]:
    preference = verdicts.preference[whole]
    values = (preference, mean_scores(verdicts.scores[whole]), mean_scores(preference - 0.5) + 0.5)
    return [
        {name: value[row].tolist() for name, value in zip(COLUMNS, values, strict=True)} for row in range(len(whole))
    ]


def _files_hash(folder: Path) -> str | None:
    """Of the files of a model's folder; None of a hub id, which names what it is."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    return digest.hexdigest()
