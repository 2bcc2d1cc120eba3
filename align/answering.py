"""Answers that models give to the prompts of an evaluation, kept in a file as they come."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.evals.sampling import Sample, sample
from align.models.ends import end_tokens
from align.models.memory import release_freed
from align.tracking.progress import progress

BATCH = 16


class Kept:
    """What took long to make, by whose it is and its row: lines of JSON, written as they come.

    An interrupted command loses at most the batch in hand.

    Args:
        path: the file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, int], dict[str, Any]] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self._torn = text[-1:] not in ("", "\n")
        for line in text.split("\n"):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that a kill has torn; it is made again
            self.rows[entry.pop("of"), entry.pop("row")] = entry

    def missing(self, of: str, count: int) -> list[int]:
        """Which of ``count`` rows are not there."""
        return [row for row in range(count) if (of, row) not in self.rows]

    def add(self, of: str, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Keep rows, on the disk too."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            if self._torn:
                file.write("\n")
                self._torn = False
            for row, entry in rows.items():
                self.rows[of, row] = dict(entry)
                file.write(json.dumps({"of": of, "row": row, **entry}, ensure_ascii=False) + "\n")

    def of(self, of: str, count: int) -> list[dict[str, Any]]:
        """Rows 0 to ``count``, which are all there."""
        return [self.rows[of, row] for row in range(count)]


def kept_answers(path: Path) -> dict[tuple[str, int], Sample]:
    """Answers of an evaluation, by whose they are and the number of the prompt."""
    return {key: Sample(**entry) for key, entry in Kept(path).rows.items()}


class Answers:
    """Answers to some prompts, those that were drawn already from a file.

    Args:
        kept: the file.
        tokenizer: of the model.
        prompts: token ids.
        max_new_tokens: longest answer.
        seed: of the draws.
    """

    def __init__(
        self,
        kept: Kept,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        seed: int,
    ) -> None:
        self.kept, self.tokenizer, self.prompts = kept, tokenizer, prompts
        self.max_new_tokens, self.seed = max_new_tokens, seed

    def of(
        self,
        name: str,
        model: Any,
        temperature: float,
        max_new_tokens: int | None = None,
        *,
        what: str | None = None,
        keys: Sequence[int] | None = None,
    ) -> list[Sample]:
        """One answer a prompt. Each has its own random stream, so that it is the same in whatever batch.

        Args:
            name: whose they are, in the file.
            model: draws those that are not there.
            temperature: of the draws.
            max_new_tokens: in place of the usual one.
            what: for the bar; the name by default.
            keys: a number a prompt that sets equal ones apart, which are otherwise to be unique.
        """
        missing = self.kept.missing(name, len(self.prompts))
        with progress(f"answers, {what or name}", len(missing)) as advance:

            def keep(batch: Mapping[int, Sample]) -> None:
                self.kept.add(name, {missing[place]: asdict(answer) for place, answer in batch.items()})
                release_freed()
                advance(len(batch))

            sample(
                model,
                self.tokenizer,
                [self.prompts[row] for row in missing],
                eos_ids=end_tokens(model, self.tokenizer),
                max_new_tokens=max_new_tokens or self.max_new_tokens,
                temperature=temperature,
                seed=self.seed,
                batch_size=BATCH,
                keys=None if keys is None else [keys[row] for row in missing],
                on_batch=keep,
            )
        return [Sample(**entry) for entry in self.kept.of(name, len(self.prompts))]
