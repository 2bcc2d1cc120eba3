"""Online preference training: the policy answers prompts, an annotator compares the answers, a loss learns from it.

One loop for online IPO and DPO (``mixture`` 0), IPO-MD (a mixture with the reference), Nash-MD-PG, GPO, SPPO and MDPO
(arXiv:2403.08635, 2312.00886, 2410.02197, 2405.00675, 2005.09814); ``grouped`` has what each loss is computed on.

- All answers of an optimiser step are drawn before its first gradient, over all its micro-batches, so that a step is
  the same however it is accumulated; over processes, each draws those of its own prompts.
- Answers are drawn at temperature 1, without top-p or top-k: the log-probs that losses compare are of that law.
- Randomness is a function of the seed, the step and the prompt: a run that is gone on with draws what it would have.
- ``kl/k1`` and ``kl/k3`` are means over answers of sums over tokens of ``d`` and ``exp(-d) - 1 + d``, with ``d`` the
  policy's log-prob less the reference's. Both are unbiased for the KL of the whole answer where the policy drew the
  answers, k3 with less variance near the reference; of answers drawn from a mixture, or drawn before the last
  ``inner_steps``, they are means over those answers, and no KL.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from align.data.prompts import ROW_ID
from align.data.tokenize import encode_prompt
from align.errors import AlignError
from align.evals.sampling import Mixture, Sample, sample
from align.losses.groups import all_pair_values
from align.models.ends import end_tokens
from align.models.memory import release_freed
from align.models.scoring import score
from align.rewards.annotators import Annotator, Verdicts
from align.tracking.files import finite, write_text

from .grouped import Group, GroupedTrainer
from .held_out import HeldOut
from .judging import LABELS, Jury, labelled, less_cut
from .kept import SAMPLES, forget_after, read, step_of, written
from .windows import Windows

logger = logging.getLogger(__name__)

SECONDS = 600.0


@dataclass(frozen=True)
class Drawing:
    """How a prompt is answered.

    Args:
        answers: to each prompt.
        mixture: weight of the reference in the token-level mixture that answers come from; 0 is the policy alone.
        max_new_tokens: longest answer.
        batch_size: answers that are drawn together.
    """

    answers: int = 2
    mixture: float = 0.0
    max_new_tokens: int = 64
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.answers < 2:
            raise ValueError(f"answers is {self.answers}: comparing takes two or more")
        if not 0 <= self.mixture <= 1:
            raise ValueError(f"mixture is {self.mixture}: it must be in [0, 1]")
        if self.mixture == 1:
            logger.warning("mixture is 1: all answers are the reference's, and none the policy's own")


class OnlineTrainer(GroupedTrainer):
    """``GroupedTrainer`` on answers of its own.

    Args:
        model, args: as there; of ``args`` the batch is a number of prompts.
        annotator: says which answers are preferred (``align.rewards.annotators``).
        drawing: how prompts are answered.
        labels: what the loss learns from: ``soft``, the probabilities; ``drawn``, 0 or 1 by them, which adds variance;
            ``argmax``, the likelier one, which is another game.
        inner_steps: optimiser steps on the same answers.
        cut_penalty: log-odds that an answer which ``max_new_tokens`` cut loses against one that has ended.
        annotator_seconds: how long the annotator may take for a step's answers.
        draw: draws the policy's answers in place of transformers, ``(prompts, seeds, max_new_tokens) -> samples``,
            once ``draw.push(model)`` has given it the weights; not for a mixture.
        train_dataset, eval_dataset: prompts (``align.data.prompts.TokenizedPrompts.dataset``). The second is answered
            by the policy and by the model before training whenever ``args`` says to evaluate.
        kwargs: as in ``GroupedTrainer``.

    Raises:
        ValueError: settings that do not go together, or fewer prompts than a step takes.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        annotator: Annotator,
        drawing: Drawing,
        labels: str = "soft",
        inner_steps: int = 1,
        cut_penalty: float = 0.0,
        annotator_seconds: float = SECONDS,
        draw: Any = None,
        **kwargs: Any,
    ) -> None:
        if labels not in LABELS:
            raise ValueError(f"labels is {labels!r}: it must be one of {', '.join(LABELS)}")
        if inner_steps < 1:
            raise ValueError(f"inner_steps is {inner_steps}: it must be at least 1")
        self.annotator, self.drawing, self.labels, self.inner_steps = annotator, drawing, labels, inner_steps
        if not 0 <= cut_penalty < torch.inf:
            raise ValueError(f"cut_penalty is {cut_penalty}: it must be a number, 0 or more")
        self.annotator_seconds, self.cut_penalty, self._draw_by = annotator_seconds, cut_penalty, draw
        self._window: tuple[int, list[list[Group]]] | None = None
        self._resumed_from: Path | None = None
        self.began = 0  # the step that training went on from
        self.jury, self._held_out = Jury(self), HeldOut(self)
        super().__init__(model, args, data_collator=list, **kwargs)
        size = self._window_size()
        if len(self.train_dataset) < size:
            raise ValueError(
                f"{len(self.train_dataset):,} prompts, and a step takes {size:,}: fewer a step, or more prompts"
            )
        if len(set(self.train_dataset[ROW_ID])) < len(self.train_dataset):
            raise ValueError(
                f"train_dataset: rows with the same {ROW_ID!r}, by which the draws of rows are told apart: leave "
                "out those that are there twice, or give them ids of their own"
            )
        self.moving.check(self.model, self.ref_model)
        if draw is not None and drawing.mixture and not self._against:
            raise ValueError("draw: it has the policy's weights, and answers of a mixture take the reference's too")
        if drawing.mixture and "advantage" in self.takes:
            raise ValueError("mixture: mdpo's ratios are to the policy that drew the answers, which a mixture is not")
        if self._against and inner_steps > 1:
            raise ValueError(f"inner_steps is {inner_steps}: a policy gradient is of answers of the policy as it is")
        if "scores" in self.takes and labels != "soft":
            raise ValueError(f"labels is {labels!r}: {self.group_loss.info.name} learns from scores, which have none")
        if self.accelerator.num_processes > 1 and annotator_seconds >= args.ddp_timeout:
            raise ValueError(
                f"annotator_seconds is {annotator_seconds:g}, and the other processes wait for {args.ddp_timeout:,} s "
                "(ddp_timeout): make that longer"
            )
        if args.eval_strategy != "no":
            self._held_out.check()
        if self._against and drawing.answers != 2:
            raise ValueError(
                f"answers is {drawing.answers}: {self.group_loss.info.name} takes 2, one from the mixture"
            )
        if "advantage" in self.takes and inner_steps == 1:
            logger.warning("inner_steps is 1: the first step of mdpo on its answers is a plain policy gradient")
        self.add_callback(Follow(self))

    def _window_size(self) -> int:
        """Prompts of a step, over all micro-batches and processes."""
        args = self.args
        return int(
            args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        data = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return Windows(len(data), self._window_size(), self.inner_steps, seed)

    # --- a step's answers ---------------------------------------------------------------------------------------

    def judged(self, batches: list[Any]) -> list[dict[str, Tensor]]:
        """Answers to the prompts, by the policy as it is now or as it was when the window began."""
        number, inner = divmod(self.state.global_step, self.inner_steps)
        if inner and self._window is None and self._resumed_from is not None:
            self._window = number, self._read_window(self._resumed_from)
        if self._window is None or self._window[0] != number:
            self._window = number, self._drawn(number, batches)
        return super().judged(self._window[1])

    def _drawn(self, number: int, batches: list[list[dict[str, Any]]]) -> list[list[Group]]:
        rows = [row for batch in batches for row in batch]
        prompts = [encode_prompt(row["prompt"], self.tokenizer) for row in rows]
        keys = [int.from_bytes(hashlib.sha256(str(row[ROW_ID]).encode()).digest()[:7], "big") for row in rows]
        answers = self._answers(prompts, keys, number)
        verdicts = self.jury.of_step(rows, [[answer.text for answer in own] for own in answers])
        self._keep_samples(number, rows, answers, verdicts)
        release_freed()
        cut = torch.tensor([[not answer.finished for answer in own] for own in answers])
        learnt = less_cut(verdicts, cut, self.cut_penalty)
        groups = []
        for row, ids, own, preference, scores in zip(
            rows, prompts, answers, learnt.preference, learnt.scores, strict=True
        ):
            labels = labelled(preference, self.labels, f"{self.args.seed}:{number}:{row[ROW_ID]}")
            groups.append(Group.of(ids, [answer.tokens for answer in own], labels, scores))
        self.count("length/truncated", cut.sum(), cut.numel())
        pairs = all_pair_values(verdicts.preference)
        known = pairs[~pairs.isnan()]
        self.count("preference/decided", (2 * known - 1).abs().sum(), len(known))
        self.count("preference/set_aside", len(pairs) - len(known), len(pairs))
        ends = torch.tensor([0, *[len(batch) for batch in batches]]).cumsum(0).tolist()
        parts = [groups[start:end] for start, end in itertools.pairwise(ends)]
        return [self._with_behaviour(part) for part in parts] if "advantage" in self.takes else parts

    def _answers(self, prompts: Sequence[Sequence[int]], keys: Sequence[int], number: int) -> list[list[Sample]]:
        """K answers to each prompt; ``keys`` tell rows apart whose prompts are equal, on whatever process they are."""
        drawing, base = self.drawing, 2 * (self.args.seed * 1_000_003 + number)
        if self._against:
            first = self.sampled(prompts, base, keys)
            second = self.sampled(prompts, base + 1, keys, self._mixture())
            return [list(both) for both in zip(first, second, strict=True)]
        count = drawing.answers
        repeated = [ids for ids in prompts for _ in range(count)]
        found = self.sampled(repeated, base, [key for key in keys for _ in range(count)], self._mixture())
        return [found[place * count : (place + 1) * count] for place in range(len(prompts))]

    def _mixture(self) -> Mixture | None:
        if self.drawing.mixture == 0:
            return None
        if self.ref_model is not None:
            return Mixture(self.ref_model, self.drawing.mixture)
        return Mixture("ref" if "ref" in self.model.peft_config else "__base__", self.drawing.mixture)

    def sampled(
        self,
        prompts: Sequence[Sequence[int]],
        seed: int,
        keys: Sequence[int] | None = None,
        mixture: Mixture | None = None,
    ) -> list[Sample]:
        """Answers of the policy as it is, or of its mixture."""
        if self._draw_by is not None and mixture is None:
            self._draw_by.push(self.accelerator.unwrap_model(self.model))
            seen: Counter[int] = Counter()  # the answers of a prompt are numbered, wherever it stands in the batch
            seeds = []
            for key in keys if keys is not None else [0] * len(prompts):
                seeds.append((seed * 1_000_003 + key + seen[key]) % (1 << 62))
                seen[key] += 1
            found: list[Sample] = self._draw_by(prompts, seeds=seeds, max_new_tokens=self.drawing.max_new_tokens)
            return found
        with self.accelerator.autocast():
            return self.by_transformers(self.model, prompts, seed, keys, mixture)

    def by_transformers(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        seed: int,
        keys: Sequence[int] | None = None,
        mixture: Mixture | None = None,
    ) -> list[Sample]:
        """Answers of a model, or of its mixture with the reference."""
        return sample(
            model,
            self.tokenizer,
            prompts,
            eos_ids=end_tokens(self._inner(), self.tokenizer),
            max_new_tokens=self.drawing.max_new_tokens,
            temperature=1.0,
            seed=seed,
            batch_size=self.drawing.batch_size,
            mixture=mixture,
            keys=keys,
        )

    @torch.no_grad()
    def _with_behaviour(self, groups: list[Group]) -> list[Group]:
        """Log-probs of the answers' tokens under the policy as it is now, by the kernel that training uses."""
        rows = self.rows([group.prompt_ids for group in groups], [group.answer_ids for group in groups])
        rows = rows.to(self.args.device)
        training = self.model.training
        self.model.eval()
        with self.accelerator.autocast():
            logps = score(self.model, rows).logps.float()
        self.model.train(training)
        by_answer = [logps[rows.answer == answer].tolist() for answer in range(rows.answers)]
        return [replace(group, behaviour=by_answer[place :: len(groups)]) for place, group in enumerate(groups)]

    # --- what is kept -------------------------------------------------------------------------------------------

    def _keep_samples(
        self, number: int, rows: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[Sample]], verdicts: Verdicts
    ) -> None:
        entries = [
            {
                "step": number * self.inner_steps + 1,
                "row_id": row[ROW_ID],
                "prompt": row["prompt"],
                "answers": [answer.text for answer in own],
                "tokens": [len(answer.tokens) for answer in own],
                "finished": [answer.finished for answer in own],
                "preference": finite(preference.tolist()),
                "scores": finite(scores.tolist()),
            }
            for row, own, preference, scores in zip(rows, answers, verdicts.preference, verdicts.scores, strict=True)
        ]
        for problem in verdicts.problems:
            entries[problem.prompt].setdefault("set_aside", []).append(
                {"answers": [problem.first, problem.second], "reason": problem.reason}
            )
        everywhere = gather_object(entries)
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / SAMPLES
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in everywhere)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        output = Path(self.args.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(str(output)) if output.is_dir() else None
            if resume_from_checkpoint is None:
                raise ValueError(f"resume_from_checkpoint: no checkpoint in {output}; leave it out to start anew")
        self._resumed_from = Path(str(resume_from_checkpoint)) if resume_from_checkpoint else None
        self.began = step_of(self._resumed_from) if self._resumed_from else 0
        if self.is_world_process_zero():
            forget_after(output / SAMPLES, self.began)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """With what is needed in the middle of a window, written first: ``trainer_state.json`` ends a checkpoint."""
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.should_save:
            self.moving.save(self.ref_model, folder)
        if self._window is not None and self.state.global_step % self.inner_steps:
            kept = [[written(group) for group in part] for part in self._window[1]]
            write_text(folder / self._window_file, json.dumps(kept))
        super()._save_checkpoint(model, trial)

    @property
    def _window_file(self) -> str:
        return f"window-{self.accelerator.process_index}.json"

    def _read_window(self, folder: Path) -> list[list[Group]]:
        path = folder / self._window_file
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AlignError(
                f"{path}: the answers of the step in hand cannot be read ({error}): go on with as many processes as "
                "the run was started with"
            ) from error
        return [[read(group) for group in part] for part in kept]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.moving.load(self.ref_model, Path(resume_from_checkpoint))

    # --- held-out prompts ---------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """``HeldOut.measure`` of held-out prompts, logged."""
        values = self._held_out.measure(list(self.eval_dataset if eval_dataset is None else eval_dataset))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Follow(TrainerCallback):  # type: ignore[misc]
    """Moves the reference after each optimiser step, and makes up for an evaluation that ended the run."""

    def __init__(self, trainer: OnlineTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Gone on with; a checkpoint that was written within an evaluation says so."""
        due = state.stateful_callbacks["TrainerControl"]["args"]["should_evaluate"]
        if due and args.eval_strategy != "no" and not args.eval_on_start:
            control.should_evaluate = True  # until it is done
            self.trainer.evaluate()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """One step has been taken."""
        trainer = self.trainer
        policy = trainer.accelerator.unwrap_model(trainer.model)
        trainer.moving.follow(policy, trainer.ref_model, state.global_step)
