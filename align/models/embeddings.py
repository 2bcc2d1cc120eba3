"""Embeddings of answers by a frozen backbone, computed once and kept on disk.

A row is the hidden state of an answer's last token and of its prompt's. Its key is the SHA-256 of the token ids, its
folder the hash of the backbone's weights: what has another text, template, length limit, weight or dtype is another
row. Rows are kept in files of a few hundred; a kill loses the file in hand, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.errors import AlignError
from align.rewards.models import RewardModel

from .fingerprint import weights_hash

ROWS_IN_FILE = 256


class EmbeddingCache:
    """``RewardModel.embed_ids`` that remembers.

    Args:
        folder: where rows are kept, for any number of models; made where it is missing.
        model: whose backbone is read. It must not be trained while the cache is in use.
        batch_size: rows of one forward pass. In bf16 it moves the states by their rounding.
    """

    def __init__(self, folder: str | Path, model: RewardModel, *, batch_size: int = 16) -> None:
        self.model = model
        self.batch_size = batch_size
        weights = [(k, v) for k, v in model.carrier.state_dict().items() if not k.startswith("score.")]
        self.weights_sha256 = weights_hash(weights)
        self.folder = Path(folder) / self.weights_sha256[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.computed = 0
        self._rows: dict[bytes, tuple[Tensor, Tensor]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                kept = load_file(path)
            except Exception as error:
                raise AlignError(f"{path}: not a file of embeddings ({error}); delete it") from error
            keys = [bytes(key.tolist()) for key in kept["keys"]]
            self._rows |= dict(zip(keys, zip(kept["answers"], kept["prompts"], strict=True), strict=True))

    def __len__(self) -> int:
        return len(self._rows)

    def embed_ids(
        self,
        prompt_ids: Sequence[Sequence[int]],
        answer_ids: Sequence[Sequence[int]],
        *,
        advance: Callable[[int], object] = lambda count: None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of the last tokens of N answers, and of their prompts, (N, H) each, float32.

        Args:
            advance: told how many of the N are there, as they come.
        """
        if not len(prompt_ids):
            return torch.zeros(0, self.model.hidden_size), torch.zeros(0, self.model.hidden_size)
        answer_ids = self.model.fit(prompt_ids, answer_ids)
        keys = [_key(*ids) for ids in zip(prompt_ids, answer_ids, strict=True)]
        first = {key: row for row, key in reversed(list(enumerate(keys))) if key not in self._rows}
        # Like lengths in one file, so in one batch: little padding.
        advance(len(keys) - len(first))
        missing = sorted(first.values(), key=lambda row: len(prompt_ids[row]) + len(answer_ids[row]))
        for start_row in range(0, len(missing), ROWS_IN_FILE):
            part = missing[start_row : start_row + ROWS_IN_FILE]
            states = self.model.embed_ids(
                [prompt_ids[row] for row in part], [answer_ids[row] for row in part], batch_size=self.batch_size
            )
            self._keep([keys[row] for row in part], *states)
            advance(len(part))
        found = [self._rows[key] for key in keys]
        return torch.stack([answer for answer, _ in found]), torch.stack([prompt for _, prompt in found])

    def _keep(self, keys: list[bytes], answers: Tensor, prompts: Tensor) -> None:
        name = hashlib.sha256(b"".join(keys)).hexdigest()[:16]
        aside = self.folder / f".{name}.partial"
        rows = {"keys": torch.tensor([list(key) for key in keys], dtype=torch.uint8)}
        save_file({**rows, "answers": answers.contiguous(), "prompts": prompts.contiguous()}, aside)
        aside.replace(self.folder / f"{name}.safetensors")
        self._rows |= dict(zip(keys, zip(answers, prompts, strict=True), strict=True))
        self.computed += len(keys)


def _key(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> bytes:
    return hashlib.sha256(json.dumps([list(prompt_ids), list(answer_ids)]).encode()).digest()
