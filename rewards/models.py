"""Reward and preference models on a causal backbone: scores from the hidden state of an answer's last token.

Three kinds of head, all of them one linear map in float32, whatever the backbone's dtype:

- ``scalar``      one reward an answer (Bradley-Terry, arXiv:2203.02155, and its margin and scaled forms).
- ``attributes``  one value an attribute (arXiv:2410.01257), and a weighted sum of them that ranks.
- ``gpm``         an embedding of even dimension; two answers compare by a skew-symmetric form, so that preferences may
  run in a circle (arXiv:2410.02197).

The backbone and the head are a Hugging Face ``...ForSequenceClassification``: a scalar model saves to a folder that
plain ``AutoModelForSequenceClassification`` loads, with equal scores. Beside it stand ``reward.json`` (kind, tau, what
ranks, limits) and ``reward.safetensors`` (head, bias and gate in float32).

Making, saving, training set-up and scoring stand in one file because all of them know how the carrier is laid out.

    model = RewardModel.create("folder/of/a/causal/model", kind="gpm", dimension=4)
    model.score_pairs(["Hi"], ["Hello."], ["Go away."])   # (1,), antisymmetric
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import cached_file

from align.losses.checks import check_finite, check_shape
from align.losses.general_preference import gpm_scale, unit_norm
from align.losses.layouts import model_inputs, why_not_shared_prompt
from align.losses.rows import Rows, group_rows

from .batches import by_length, by_prompt, distinct, fit_answers, in_order, padded
from .carrier import RewardConfig, load_carrier, with_lora, with_padding
from .encoding import Content, encode_row, encode_rows
from .heads import (
    first_positions,
    last_positions,
    pair_matrix,
    states_at,
    token_positions,
)
from .named import CONFIG_FILE as CONFIG_FILE

WEIGHTS_FILE, ADAPTER = "reward.safetensors", "adapter"
Ids = Sequence[int]


class RewardOutput(NamedTuple):
    """What one forward pass says of B answers.

    Args:
        values: scalar (B,), attributes (B, A), or embeddings (B, d); float32 or better.
        scale: the gate's ``lam`` of each row's prompt, (B, d/2); None without a gate.
    """

    values: Tensor
    scale: Tensor | None


class RewardModel(nn.Module):
    """A reward or preference model; make one with ``create`` or ``from_pretrained``.

    Attributes:
        kinds: what it can be; PAL is ``align.rewards.pal_model``.
        config: what ``reward.json`` holds.
        carrier: the Hugging Face model, backbone and ``score`` head.
        tokenizer: of the backbone, with a padding token that is not its end token.
    """

    kinds: tuple[str, ...] = ("scalar", "attributes", "gpm")

    def __init__(self, carrier: Any, tokenizer: Any, config: RewardConfig) -> None:
        super().__init__()
        if config.kind not in self.kinds:
            raise ValueError(f"a model of kind {config.kind}, and {type(self).__name__} is {' or '.join(self.kinds)}")
        self.carrier = carrier
        self.tokenizer = tokenizer
        self.config = config
        self._takes_positions = "position_ids" in inspect.signature(self._backbone.forward).parameters
        carrier.score.to(torch.float32)
        self.hidden_size: int = carrier.score.in_features
        self.bias = nn.Parameter(torch.zeros(config.width)) if config.kind == "attributes" else None
        self.gate = nn.Linear(self.hidden_size, config.width // 2, bias=False) if config.gate else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)  # lam = 1 until training says otherwise
        if config.training == "frozen":
            self._backbone.requires_grad_(False)

    @classmethod
    def create(
        cls,
        backbone: str | Path,
        *,
        kind: str = "scalar",
        dimension: int | None = None,
        attributes: Sequence[str] = (),
        ranking: str | Mapping[str, float] | None = None,
        bias: float = 0.0,
        tau: float | None = None,
        unit_norm: bool = True,
        gate: bool = False,
        lora: Any = None,
        frozen: bool = False,
        max_length: int | None = None,
        over_long: str = "cut",
        tokenizer: Any = None,
        **options: Any,
    ) -> Self:
        """A model with a new head, drawn from N(0, 1/(H + 1)).

        Args:
            backbone: folder or hub id of a causal model.
            kind: ``scalar``, ``attributes`` or ``gpm``.
            dimension: of the embedding, even (gpm alone; 2 if not given).
            attributes: their names, in the order of the head's columns (attributes alone).
            ranking: the attribute that ranks answers, or weights by name; not needed where there is one attribute.
            bias: where attributes start. Ratings from 0 to 4 have a mean near 2.9; from 0 training takes long.
            tau: temperature of ``preference``, ``sigma(score / tau)``; 1, or 0.1 for gpm.
            unit_norm: gpm: embeddings of length 1, so that scores are in [-1, 1] without a gate.
            gate: gpm: weigh the planes of the form by the prompt.
            lora: a peft ``LoraConfig`` for the backbone; the head is trained beside it.
            frozen: train the head alone.
            max_length: limit of prompt and answer in tokens; the backbone's own limit if not given.
            over_long: ``cut`` keeps the first tokens of an answer that is too long, and its end token, and says how
                many were cut; ``error`` refuses.
            tokenizer: if not the one in ``backbone``.
            options: for ``from_pretrained`` of transformers: ``dtype``, ``attn_implementation``, ...

        Raises:
            ValueError: settings that do not fit the kind, both lora and frozen, or a tokenizer without an end token.
        """
        tokenizer = with_padding(tokenizer or AutoTokenizer.from_pretrained(str(backbone)), str(backbone))
        config = RewardConfig.of(
            kind=kind,
            dimension=dimension,
            attributes=attributes,
            ranking=ranking,
            tau=tau,
            unit_norm=unit_norm,
            gate=gate,
            max_length=max_length,
            over_long=over_long,
            eos_token_id=int(tokenizer.eos_token_id),
            backbone=str(backbone),
        )
        if bias and kind != "attributes":
            raise ValueError(f"bias is for attributes: a constant changes no comparison of {kind} models")
        carrier = load_carrier(str(backbone), config.width, int(tokenizer.pad_token_id), **options)
        if config.max_length is None:
            limit = getattr(carrier.config.get_text_config(), "max_position_embeddings", None)
            config = replace(config, max_length=limit)
        model = cls(carrier, tokenizer, config)
        nn.init.normal_(model.carrier.score.weight, std=(model.hidden_size + 1) ** -0.5)
        if model.bias is not None:
            nn.init.constant_(model.bias, bias)
        return model.train_backbone(lora=lora, frozen=frozen).eval()

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Self:
        """What ``save_pretrained`` wrote, or any sequence classifier with one label, as a scalar model.

        Args:
            name: folder or hub id.
            options: for ``from_pretrained`` of transformers: ``dtype``, ``attn_implementation``, ...

        Raises:
            ValueError: neither of the two.
        """
        tokenizer = with_padding(AutoTokenizer.from_pretrained(str(name)), str(name))
        pad = int(tokenizer.pad_token_id)
        found = cached_file(str(name), CONFIG_FILE, _raise_exceptions_for_missing_entries=False)
        if found is None:
            carrier = load_carrier(str(name), None, pad, **options)
            limit = getattr(carrier.config.get_text_config(), "max_position_embeddings", None)
            config = RewardConfig.of(
                kind="scalar", max_length=limit, eos_token_id=int(tokenizer.eos_token_id), backbone=str(name)
            )
            return cls(carrier, tokenizer, config).eval()
        config = RewardConfig.from_json(json.loads(Path(found).read_text(encoding="utf-8")))
        adapted = cached_file(str(name), f"{ADAPTER}/adapter_config.json", _raise_exceptions_for_missing_entries=False)
        carrier = load_carrier(config.backbone if adapted else str(name), config.width, pad, **options)
        model = cls(carrier, tokenizer, config)
        if adapted:
            from peft import PeftModel

            backbone = PeftModel.from_pretrained(model._backbone, str(name), subfolder=ADAPTER, is_trainable=True)
            model._set_backbone(backbone)
        weights = load_file(str(cached_file(str(name), WEIGHTS_FILE)))
        if set(weights) != set(model._own_weights()):
            raise ValueError(f"{name}: {WEIGHTS_FILE} holds {sorted(weights)}, not what {CONFIG_FILE} says")
        with torch.no_grad():
            for key, parameter in model._own_weights().items():
                check_shape(f"{WEIGHTS_FILE}: {key}", weights[key], parameter.shape, f"as {CONFIG_FILE} says")
                parameter.copy_(weights[key])
        return model.eval()

    def save_pretrained(self, folder: str | Path, *, merge: bool = False) -> None:
        """Write the model, so that ``from_pretrained`` gives it back.

        A model with LoRA writes its adapter and names its backbone; ``merge`` writes whole weights instead, which
        plain transformers can load too.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config
        if config.training == "lora" and not merge:
            self._backbone.save_pretrained(folder / ADAPTER)
        elif config.training == "lora":
            merged = copy.deepcopy(self).merge()
            config = merged.config
            merged.carrier.save_pretrained(folder)
        else:
            self.carrier.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_file({k: v.detach().cpu().contiguous() for k, v in self._own_weights().items()}, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")

    def train_backbone(self, *, lora: Any = None, frozen: bool = False) -> Self:
        """Choose what training changes besides the head, and return the model.

        Args:
            lora: a peft ``LoraConfig``: new adapters alone, and the backbone stays as it is.
            frozen: nothing. With neither, the whole backbone; of a model with an adapter, the adapter.

        Raises:
            ValueError: both, or either for a model that has an adapter.
        """
        if lora is not None and frozen:
            raise ValueError("frozen leaves the backbone as it is and lora trains it: give one")
        if self.config.training == "lora":
            if lora is not None or frozen:
                raise ValueError("this model has an adapter: save it with merge=True, and load what that wrote")
            return self
        if lora is not None:
            self._set_backbone(with_lora(self._backbone, lora))
        else:
            self._backbone.requires_grad_(not frozen)
        self.config = replace(self.config, training="frozen" if frozen else "full" if lora is None else "lora")
        return self

    def merge(self) -> RewardModel:
        """Add the adapter to the backbone's weights, where there is one, and return the model, which is whole then."""
        if self.config.training == "lora":
            self._set_backbone(self._backbone.merge_and_unload())
            self.config = replace(self.config, training="full")
        return self

    def make_scalar(self) -> RewardModel:
        """Turn a model of attributes into the scalar model that ranks as it does, and return it.

        So begins scaled Bradley-Terry from regression (arXiv:2410.01257). The biases go: a constant ranks nothing.

        Raises:
            ValueError: it has no attributes.
        """
        if self.config.kind != "attributes":
            raise ValueError(f"this model is {self.config.kind}: attributes alone are made scalar")
        old = self.carrier.score
        score = nn.Linear(self.hidden_size, 1, bias=False, device=old.weight.device)
        weights = torch.tensor(self.config.ranking, device=old.weight.device)
        with torch.no_grad():
            score.weight.copy_(weights[None] @ old.weight.float())
        self.carrier.score, self.carrier.num_labels, self.carrier.config.num_labels = score, 1, 1
        self.bias = None
        self.config = replace(self.config, kind="scalar", width=1, attributes=(), ranking=())
        return self

    def train(self, mode: bool = True) -> Self:
        """As for any module; a frozen backbone stays in evaluation mode, so that dropout does not blur it."""
        super().train(mode)
        if self.config.training == "frozen":
            self._backbone.eval()
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor, prompt_length: Tensor | None = None) -> RewardOutput:
        """Values of B rows ``[prompt | answer]``, padded on either side.

        Args:
            input_ids: (B, T).
            attention_mask: 1 on real tokens, (B, T).
            prompt_length: tokens of the prompt, (B,); the gate needs it.
        """
        return self.read(*self.states(input_ids, attention_mask, prompt_length))

    def read(self, answer: Tensor, prompt: Tensor | None, users: Tensor | None = None) -> RewardOutput:
        """What the head makes of ``states``, (B, H) each; ``users`` are for models of annotators."""
        with torch.autocast(answer.device.type, enabled=False):
            values = answer @ self.carrier.score.weight.to(answer.dtype).T
            if self.config.kind == "scalar":
                return RewardOutput(values[:, 0], None)
            if self.bias is not None:
                return RewardOutput(values + self.bias, None)
            if self.config.unit_norm:
                values = unit_norm(values)
            if self.gate is None:
                return RewardOutput(values, None)
            if prompt is None:
                raise ValueError("this model weighs its form by the prompt: prompt_length is needed")
            logits = prompt @ self.gate.weight.to(prompt.dtype).T
            # Mean 1, so that a gate does not change what tau means: the form that the paper's models are trained with.
            scale = gpm_scale(logits, temperature=self.hidden_size**0.5, total=logits.shape[-1])
            return RewardOutput(values, scale)

    def states(
        self, input_ids: Tensor, attention_mask: Tensor, prompt_length: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states, float32, of each row's last token and of its prompt's last token, (B, H) each."""
        positions = {"position_ids": token_positions(attention_mask)} if self._takes_positions else {}
        hidden = self._hidden(input_ids=input_ids, attention_mask=attention_mask, **positions)
        answer = states_at(hidden, last_positions(attention_mask))
        if prompt_length is None:
            return answer, None
        if bool((prompt_length < 1).any()):
            raise ValueError("a prompt is empty: it has no last token to read")
        return answer, states_at(hidden, first_positions(attention_mask) + prompt_length - 1)

    def states_of(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """``states`` of the answers of ``rows`` and of their prompts, (A, H) each, in whatever layout."""
        hidden = self._hidden(**model_inputs(self.carrier, rows)).flatten(0, 1)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return hidden[rows.last_tokens()].to(dtype), hidden[rows.prompt_ends()].to(dtype)

    def _hidden(self, **inputs: Any) -> Tensor:
        """The backbone's last hidden states, with gradients where it learns."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.training != "frozen"):
            hidden: Tensor = self._backbone(**inputs, use_cache=False).last_hidden_state
        return hidden

    def score(self, prompts: Sequence[Content], completions: Sequence[Content], *, batch_size: int = 8) -> Tensor:
        """Values of N answers, as text or chat messages: (N,), (N, A) or embeddings (N, d).

        Args:
            batch_size: answers of one forward pass. It changes time and memory, and scores by the rounding of the
                backbone's dtype: about 1e-6 in float32, 1e-2 in bfloat16.

        Raises:
            ValueError: an empty answer, a prompt that leaves no room, or a score that is not finite.
        """
        return self.score_ids(*encode_rows(self.tokenizer, prompts, completions), batch_size=batch_size)

    def score_ids(self, prompt_ids: Sequence[Ids], completion_ids: Sequence[Ids], *, batch_size: int = 8) -> Tensor:
        """``score`` on token ids. An end token is added to answers that lack one. No gradients; on the CPU."""
        return self._run(prompt_ids, completion_ids, batch_size)[0]

    def rewards(self, prompts: Sequence[Content], completions: Sequence[Content], *, batch_size: int = 8) -> Tensor:
        """One number an answer, (N,): the reward, or the weighted sum of attributes that ranks.

        Raises:
            ValueError: a gpm, in which an answer is better or worse than another one, and not by itself.
        """
        return self.ranking(self.score(prompts, completions, batch_size=batch_size))

    def ranking(self, values: Tensor) -> Tensor:
        """What ranks answers, of their values: (N,) from (N,) or (N, A)."""
        if self.config.kind == "gpm":
            raise ValueError("a gpm gives no reward to a single answer: use score_pairs or score_groups")
        if self.config.kind != "attributes":
            return values
        return values @ torch.tensor(self.config.ranking, dtype=values.dtype, device=values.device)

    def score_pairs(
        self, prompts: Sequence[Content], first: Sequence[Content], second: Sequence[Content], *, batch_size: int = 8
    ) -> Tensor:
        """Log-odds that the first answer is preferred to the second, ``score / tau``, (N,); antisymmetric."""
        if not len(prompts) == len(first) == len(second):
            raise ValueError(f"{len(prompts)} prompts, {len(first)} first and {len(second)} second answers")
        matrices = self.score_groups(prompts, list(zip(first, second, strict=True)), batch_size=batch_size)
        return torch.stack([matrix[0, 1] for matrix in matrices]) if matrices else torch.zeros(0)

    def preference(
        self, prompts: Sequence[Content], first: Sequence[Content], second: Sequence[Content], *, batch_size: int = 8
    ) -> Tensor:
        """Probability that the first answer is preferred, ``sigma(score / tau)``, (N,)."""
        return torch.sigmoid(self.score_pairs(prompts, first, second, batch_size=batch_size))

    def score_groups(
        self, prompts: Sequence[Content], answers: Sequence[Sequence[Content]], *, batch_size: int = 8
    ) -> list[Tensor]:
        """All answers to a prompt against each other: K rows through the backbone, then one product.

        Args:
            answers: two or more a prompt.

        Returns:
            For each prompt a matrix (K, K); ``[i, j]`` is the log-odds that i is preferred to j, its score over j
            divided by tau; exactly antisymmetric.
        """
        if len(prompts) != len(answers):
            raise ValueError(f"{len(prompts)} prompts and {len(answers)} groups of answers")
        prompt_ids, completion_ids = [], []
        for row, (prompt, group) in enumerate(zip(prompts, answers, strict=True)):
            if len(group) < 2:
                raise ValueError(f"row {row}: {len(group)} answers; a comparison takes two or more")
            start, ends = encode_row(self.tokenizer, row, prompt, group)
            prompt_ids += [start] * len(ends)
            completion_ids += ends
        if not prompts:
            return []
        values, scale = self._run(prompt_ids, completion_ids, batch_size)
        sizes = [len(group) for group in answers]
        if self.config.kind != "gpm":
            columns = torch.split(self.ranking(values), sizes)
            return [(column[:, None] - column[None]) / self.config.tau for column in columns]
        scales = [None] * len(sizes) if scale is None else [rows.mean(0) for rows in torch.split(scale, sizes)]
        groups = zip(torch.split(values, sizes), scales, strict=True)
        return [pair_matrix(group, lam) / self.config.tau for group, lam in groups]

    def embed(
        self, prompts: Sequence[Content], completions: Sequence[Content], *, batch_size: int = 8
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of the last tokens of N answers, and of their prompts, (N, H) each, for heads of other kinds.

        Raises:
            ValueError: an empty prompt, besides what ``score`` refuses.
        """
        return self.embed_ids(*encode_rows(self.tokenizer, prompts, completions), batch_size=batch_size)

    def embed_ids(
        self, prompt_ids: Sequence[Ids], completion_ids: Sequence[Ids], *, batch_size: int = 8
    ) -> tuple[Tensor, Tensor]:
        """``embed`` on token ids."""
        found = list(self._states(prompt_ids, self.fit(prompt_ids, completion_ids), batch_size))
        return in_order([(o, a) for o, a, _ in found]), in_order([(o, p) for o, _, p in found if p is not None])

    @property
    def _backbone(self) -> Any:
        return getattr(self.carrier, self.carrier.base_model_prefix)

    def _set_backbone(self, backbone: Any) -> None:
        setattr(self.carrier, self.carrier.base_model_prefix, backbone)

    def _own_weights(self) -> dict[str, Tensor]:
        named = {"score": self.carrier.score.weight, "bias": self.bias, "gate": self.gate and self.gate.weight}
        return {name: weight for name, weight in named.items() if weight is not None}

    def _run(
        self, prompt_ids: Sequence[Ids], completion_ids: Sequence[Ids], batch_size: int
    ) -> tuple[Tensor, Tensor | None]:
        """Values and scales of all rows; equal rows go through the model once, so that they tie to the last bit."""
        if not len(prompt_ids):
            shape = (0, self.config.width) if self.config.kind in ("attributes", "gpm") else (0,)
            return torch.zeros(shape), None
        fitted = self.fit(prompt_ids, completion_ids)
        first, which = distinct(prompt_ids, fitted)
        prompts, answers = [prompt_ids[row] for row in first], [fitted[row] for row in first]
        batches = self._states(prompts, answers, batch_size)
        found = [(order, self.read(answer, prompt)) for order, answer, prompt in batches]
        values = in_order([(order, output.values) for order, output in found])
        check_finite("score", values)
        scales = [(order, output.scale) for order, output in found if output.scale is not None]
        return values[which], in_order(scales)[which] if scales else None

    def _states(
        self, prompt_ids: Sequence[Ids], completion_ids: Sequence[Ids], batch_size: int
    ) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
        """Numbers of fitted rows, with their ``states``; in evaluation mode, without gradients.

        A prompt is computed once for several answers, where the architecture allows it.
        """
        training = self.training
        shared = why_not_shared_prompt(self.carrier) is None and all(len(prompt) for prompt in prompt_ids)
        self.eval()
        try:
            with torch.no_grad():
                batches = self._shared if shared else self._separate
                yield from batches(prompt_ids, completion_ids, batch_size)
        finally:
            self.train(training)

    def _shared(
        self, prompt_ids: Sequence[Ids], completion_ids: Sequence[Ids], batch_size: int
    ) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
        for groups in by_prompt(prompt_ids, completion_ids, batch_size):
            prompts = [prompt_ids[group[0]] for group in groups]
            answers = [[completion_ids[row] for row in group] for group in groups]
            pad = self.tokenizer.pad_token_id
            rows = group_rows(prompts, answers, pad_token_id=pad, shared_prompt=True)
            order = [row for answer in zip(*groups, strict=True) for row in answer]
            yield order, *self.states_of(rows.to(self.carrier.score.weight.device))

    def _separate(
        self, prompt_ids: Sequence[Ids], completion_ids: Sequence[Ids], batch_size: int
    ) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
        rows = [[*prompt, *answer] for prompt, answer in zip(prompt_ids, completion_ids, strict=True)]
        prompted, device = all(len(prompt) for prompt in prompt_ids), self.carrier.score.weight.device
        for order in by_length(rows, batch_size):
            ids, mask = padded([rows[row] for row in order], self.tokenizer.pad_token_id)
            lengths = torch.tensor([len(prompt_ids[row]) for row in order], device=device)
            yield order, *self.states(ids.to(device), mask.to(device), lengths if prompted else None)

    def fit(self, prompt_ids: Sequence[Ids], completion_ids: Sequence[Ids]) -> list[list[int]]:
        """Answers with one end token each, held to ``max_length`` with their prompts by the model's rule.

        Raises:
            ValueError: an empty answer, one that is refused, or a prompt that leaves no room for one.
        """
        return fit_answers(
            prompt_ids,
            completion_ids,
            eos_token_id=self.config.eos_token_id,
            max_length=self.config.max_length,
            cut=self.config.over_long == "cut",
        )
