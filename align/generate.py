"""Answers of a trained model: to one prompt, in a conversation, or to a file of prompts.

Text is a user's message where the tokenizer has a chat template, and is taken as it stands where it has none or where
``raw`` is asked for. Tokens are drawn from ``softmax(logits / temperature)``: no top-p, top-k or penalty, whatever the
model's own generation settings say. Answers under a constraint or a reward are drawn by ``align.controlled``, and by
``align.transfer`` where a baseline helps.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig, TextStreamer

from align.data.fields import FieldError, content, required
from align.data.load import read_rows
from align.data.rows import Content, Fault
from align.data.tokenize import encode_prompt
from align.decoding.constraints import Vocabulary
from align.decoding.engines import TransformersEngine
from align.decoding.generate import generate
from align.errors import AlignError
from align.evals.sampling import Sample, sample
from align.models.ends import end_tokens
from align.models.load import LoadedModel, load_run

from .answers import invalid_rows, make_place, read_done, sort_rows, write_rows
from .controlled import Control, Controller, Decode, Inputs, check_columns
from .transfer import Guide, Transfer

BATCH = 8
OF_ANSWERS = (
    *("chosen", "rejected", "response", "response_1", "response_2", "completion", "messages", "text", "label"),
    *("preference", "preference_strength", "strength", "margin", "scores", "win_rates", "row_id"),
)
"""Columns of a prompt's row that speak of other answers than those that are drawn."""


@dataclass(frozen=True)
class Settings:
    """How answers are drawn.

    Args:
        model: run folder, adapter folder, model folder, packaged name or hub id.
        max_new_tokens: longest answer, tokens.
        temperature: 0 for the likeliest token at each step.
        seed: seed of the draws.
        raw: take text as it stands, without the chat template.
        engine: what computes.
        n: independent answers a prompt, in one row; None for one that stands alone.
    """

    model: str
    max_new_tokens: int
    temperature: float
    seed: int
    raw: bool
    engine: Literal["transformers", "vllm"] = "transformers"
    n: int | None = None

    def kept(self) -> dict[str, Any]:
        """What an answer keeps of them: what came later only where it is not as it was before."""
        before = {"engine": "transformers", "n": None}
        return {name: value for name, value in asdict(self).items() if name not in before or value != before[name]}


@dataclass(frozen=True)
class Answered:
    """What became of a file of prompts.

    Args:
        rows: that the output has.
        faults: rows of the input that could not be used.
        invalid: rows of the output whose answer is not valid under the control, or missing.
        again: rows that had failed in an earlier call, and were made again.
    """

    rows: int
    faults: list[Fault]
    invalid: list[Fault]
    again: int


class Answerer:
    """A model that answers.

    Args:
        settings: the model and how to draw from it.
        loaded: the model, where it is at hand.

    Raises:
        AlignError: the model cannot be loaded.
    """

    def __init__(self, settings: Settings, loaded: LoadedModel | None = None) -> None:
        self.settings = settings
        loaded = loaded or load_run(settings.model)
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.eos_ids = end_tokens(self.model, self.tokenizer)
        self.context = getattr(self.model.config, "max_position_embeddings", None)
        self.has_template = bool(self.tokenizer.chat_template)

    def encode(self, prompt: Content) -> list[int]:
        """Token ids of a prompt, up to where the answer begins.

        Raises:
            AlignError: the prompt is empty, or leaves no room for an answer in the model's context.
        """
        if isinstance(prompt, str) and prompt and self.has_template and not self.settings.raw:
            prompt = [{"role": "user", "content": prompt}]
        ids = encode_prompt(prompt, self.tokenizer)
        if self.context and len(ids) + self.settings.max_new_tokens > self.context:
            raise AlignError(
                f"{len(ids):,} tokens and an answer of {self.settings.max_new_tokens:,} are more than the "
                f"{self.context:,} that the model reads"
            )
        return ids

    def stream(self, prompt: Content) -> str:
        """Print an answer as it is made, and return it."""
        ids = torch.tensor([self.encode(prompt)], device=self.model.device)
        drawing = {"do_sample": True, "temperature": self.settings.temperature} if self.settings.temperature else {}
        self.model.generation_config = GenerationConfig(
            max_new_tokens=self.settings.max_new_tokens,
            eos_token_id=sorted(self.eos_ids),
            pad_token_id=self.tokenizer.pad_token_id,
            **drawing,
        )
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        made = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer)
        return str(self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))

    def draw(
        self, prompts: Sequence[Sequence[int]], seed: int, on_batch: Callable[[Mapping[int, Sample]], None]
    ) -> None:
        """Answer prompts, by prompt, seed and how often the prompt came before, so that resuming changes nothing.

        Raises:
            ValueError: the model gives what cannot be drawn from.
        """
        sample(
            self.model,
            self.tokenizer,
            prompts,
            eos_ids=self.eos_ids,
            max_new_tokens=self.settings.max_new_tokens,
            temperature=self.settings.temperature,
            seed=seed,
            batch_size=BATCH if self.settings.n is None else 4 * BATCH,  # copies of a prompt are read once
            on_batch=on_batch,
        )

    def decoder(self) -> tuple[Vocabulary, Decode]:
        """The vocabulary, and what answers requests under constraints and rewards.

        Raises:
            ValueError: the model's cache cannot be forked, or its tokens cannot be read.
        """
        columns = self.model.get_output_embeddings().weight.shape[0]
        vocabulary = Vocabulary.of(self.tokenizer, size=columns, ends=self.eos_ids)
        return vocabulary, partial(generate, TransformersEngine(self.model))


def answerer_of(settings: Settings, control: Control | Transfer | None = None) -> Answerer:
    """The model, in the engine that is asked for; with a baseline under ``control``, where that can run beside it.

    Raises:
        AlignError: it cannot be loaded, or the engine is not installed.
    """
    if settings.engine == "transformers":
        return Answerer(settings)
    from .inside import Inside

    return Inside(settings, control.baseline if isinstance(control, Transfer) else None)


def answer_prompt(settings: Settings, prompt: str) -> None:
    """Print the answer to one prompt."""
    torch.manual_seed(settings.seed)
    answerer_of(settings).stream(prompt)


def answer_controlled(settings: Settings, control: Control | Transfer, prompt: str) -> dict[str, Any]:
    """The answer to one prompt under control, as a row of ``answer_file`` has it.

    Raises:
        AlignError: the prompt, the model or a setting cannot be used.
    """
    answerer = answerer_of(settings, control)
    made: dict[int, dict[str, Any]] = {}
    _steered(answerer, control).answer({0: answerer.encode(prompt)}, {0: {"prompt": prompt}}, made.update)
    return made[0]


def chat(settings: Settings, read: Callable[[], str]) -> None:
    """A conversation: each line is a message, ``/reset`` starts anew, ``/quit`` or the end of the input ends it.

    Args:
        settings: the model and how to draw from it.
        read: gives the next line; raises EOFError at the end.

    Raises:
        AlignError: the model has no chat template.
    """
    answerer = Answerer(settings)
    if not answerer.has_template:
        raise AlignError(
            f"{settings.model}: no chat template, so it cannot chat; use --prompt, which takes plain text"
        )
    torch.manual_seed(settings.seed)
    history: list[dict[str, str]] = []
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/reset":
            history = []
        elif line:
            history = _turn(answerer, history, line)


def answer_file(
    settings: Settings,
    source: str,
    output: Path,
    progress: Callable[[int, int], None],
    control: Control | Transfer | None = None,
    make: Callable[[Settings, Control | Transfer | None], Answerer] = answerer_of,
) -> Answered:
    """Answer every prompt of a file; answers are written as they are made, and a second call goes on.

    A row of the output is ``{row, prompt, completion, tokens, finished, settings}``, with the row's number in the
    input, and under control what weights and questions came to, and the ``inputs`` that the answer depends on. With
    ``settings.n`` it is ``{row, prompt, completions, finished, prompt_ids, completion_ids, settings}``: lists of n,
    the token ids that were read and drawn, and the other columns of the input, which rules may ask for. Rows are in
    the order of the input once all are there. What has failed on a row is tried again by the next call.

    Args:
        settings: the model and how to draw from it; a prompt that is listed twice gets two independent answers.
        source: rows with a ``prompt``: text or chat messages; any file that ``align train`` reads.
        output: JSONL; its folder is made where it is missing.
        progress: called with the number of rows done and of all, after every batch.
        control: constraint or reward of the answers, and the baseline if there is one.
        make: loads the model, where there is something to answer.

    Raises:
        AlignError: the output is something else than answers to these prompts with these settings and inputs (it is
            left as it was), its folder cannot be made, or no prompt can be used.
    """
    rows, faults = _read_prompts(source)
    prompts: dict[int, Content] = {number: row["prompt"] for number, row in rows.items()}
    kept = settings.kept() | (asdict(control) if control is not None else {})
    if isinstance(control, Control):
        check_columns(control, source, rows.values())
    judged = Control(reward=control.reward) if isinstance(control, Transfer) else control
    inputs = Inputs(judged) if judged is not None else None
    wanted = {
        row: {"prompt": prompts[row], "settings": kept, **({"inputs": inputs.of(rows[row])} if inputs else {})}
        for row in rows
    }
    make_place(output, source)
    done, failed = read_done(output, wanted)
    pending = {row: prompt for row, prompt in prompts.items() if row not in done}
    if pending:
        answerer = make(settings, control)
        encoded = dict(_encoded(answerer, source, pending, faults))
        controller = _steered(answerer, control) if control is not None else None
        with output.open("a", encoding="utf-8") as file:

            def write(answers: Mapping[int, Mapping[str, Any]]) -> None:
                own = {row: {"prompt": prompts[row], **made, **wanted[row]} for row, made in answers.items()}
                if settings.n is not None:
                    own = {row: made | _others(rows[row], made) for row, made in own.items()}
                write_rows(file, own)
                done.update(answers)
                progress(len(done), len(encoded) + len(prompts) - len(pending))

            if controller is not None:
                controller.answer(encoded, rows, write)
            else:
                for copy, copies in _copies(prompts, encoded):
                    _draw(answerer, copy, copies, write)
    if not done:
        first = faults[0]
        raise AlignError(f"{source}: no prompt can be used; row {first.row}: {first.field}: {first.reason}")
    sort_rows(output)
    count, invalid = invalid_rows(output)
    return Answered(count, faults, invalid, again=len(failed & done))


def _steered(answerer: Answerer, control: Control | Transfer) -> Controller | Guide:
    return Guide(answerer, control) if isinstance(control, Transfer) else Controller(answerer, control)


def _turn(answerer: Answerer, history: list[dict[str, str]], line: str) -> list[dict[str, str]]:
    """The history after one message and its answer; unchanged where there is no room for them."""
    asked = [*history, {"role": "user", "content": line}]
    try:
        answer = answerer.stream(asked)
    except AlignError as error:
        print(f"{error}: /reset starts anew")
        return history
    return [*asked, {"role": "assistant", "content": answer}]


def _read_prompts(source: str) -> tuple[dict[int, dict[str, Any]], list[Fault]]:
    """Rows by number, each with its prompt as text or messages."""
    rows: dict[int, dict[str, Any]] = {}
    faults: list[Fault] = []
    for number, (file, row, found) in enumerate(read_rows(source), start=1):
        if isinstance(found, Fault):
            faults.append(found)
            continue
        try:
            rows[number] = {**found, "prompt": content("prompt", required("prompt", found, "prompt"))}
        except FieldError as problem:
            faults.append(Fault(file, row, problem.field, problem.reason, found))
    return rows, faults


def _encoded(
    answerer: Answerer, source: str, prompts: Mapping[int, Content], faults: list[Fault]
) -> Iterator[tuple[int, list[int]]]:
    for row, prompt in prompts.items():
        try:
            yield row, answerer.encode(prompt)
        except AlignError as error:
            faults.append(Fault(source, row, "prompt", str(error).removeprefix("prompt: "), {"prompt": prompt}))


def _copies(
    prompts: Mapping[int, Content], encoded: Mapping[int, list[int]]
) -> list[tuple[int, dict[int, list[int]]]]:
    """The rows to answer, by how often their prompt came before in the input."""
    seen: Counter[str] = Counter()
    copies: dict[int, dict[int, list[int]]] = {}
    for row, prompt in prompts.items():
        key = json.dumps(prompt)
        if row in encoded:
            copies.setdefault(seen[key], {})[row] = encoded[row]
        seen[key] += 1
    return sorted(copies.items())


def _draw(
    answerer: Answerer,
    copy: int,
    rows: Mapping[int, list[int]],
    write: Callable[[Mapping[int, Mapping[str, Any]]], None],
) -> None:
    """Answer rows whose prompts all differ; a row is written once all its answers are there."""
    settings = answerer.settings
    count = settings.n or 1
    numbers = [number for number in rows for _ in range(count)]
    waiting: dict[int, dict[int, Sample]] = {number: {} for number in rows}

    def keep(batch: Mapping[int, Sample]) -> None:
        for place, made in batch.items():
            waiting[numbers[place]][place] = made
        whole = [number for number, made in waiting.items() if len(made) == count]
        several = {number: [made for _, made in sorted(waiting.pop(number).items())] for number in whole}
        if settings.n is None:
            write({number: _columns(made) for number, (made,) in several.items()})
        else:
            write({number: _listed(rows[number], made) for number, made in several.items()})

    try:
        answerer.draw([rows[number] for number in numbers], settings.seed + 1_000_003 * copy, keep)
    except ValueError as error:
        raise AlignError(f"{settings.model}: {error}") from error


def _others(row: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in OF_ANSWERS and name not in {"row", *made}}


def _columns(made: Sample) -> dict[str, Any]:
    return {"completion": made.text, "tokens": len(made.tokens), "finished": made.finished}


def _listed(prompt: list[int], made: Sequence[Sample]) -> dict[str, Any]:
    """With the token ids: what is trained on these answers is to read what the model read and wrote."""
    return {
        "completions": [one.text for one in made],
        "finished": [one.finished for one in made],
        "prompt_ids": prompt,
        "completion_ids": [one.tokens for one in made],
    }
