"""Rows of a batch that we draw: their constraints, states and records. Knows tensors, and nothing of vLLM."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from align.decoding.constraints import ConstraintError, Fault, FunctionError, Memo, StoppedError, Vocabulary, build
from align.decoding.constraints.worker import prepare, thread_seconds
from align.decoding.drawing import step
from align.decoding.law import Law
from align.decoding.lazy import Draws, Live
from align.decoding.request import Request

from .settings import DEAD, FAILED, Settings

CONSTRAINTS = 64
"""Constraints that are kept, with what is known of them: particles of a request share theirs."""
STATES = 8_000
"""States that are kept of all constraints together, at 5 to 65 kB each; past it the oldest constraints go."""
RECORDS = 8192
"""Records, and accounts, that wait to be fetched; those of aborted requests never are, and the oldest go."""


@dataclass
class Record:
    """What a request took, by position, so that a repeated step counts once.

    Args:
        evaluations, masks: see ``align.decoding.request.Answer``.
        refused: tokens that were refused, where they are traced.
        cut: whether the length limit ended it.
        why: why there was no token, if so.
        error: what the constraint raised, if so.
        fault: whose that is.
        logits: float32, of the next token, where they were asked for.
    """

    evaluations: dict[int, int] = field(default_factory=dict)
    masks: dict[int, int] = field(default_factory=dict)
    refused: dict[int, list[int]] = field(default_factory=dict)
    cut: bool = False
    why: str = ""
    error: str = ""
    fault: Fault = ""
    logits: bytes = b""

    def plain(self) -> dict[str, Any]:
        """As vLLM's messages can carry it."""
        return {
            "evaluations": [self.evaluations[position] for position in sorted(self.evaluations)],
            "masks": sum(self.masks.values()),
            "refused": [[position, tokens] for position, tokens in sorted(self.refused.items())],
            "cut": self.cut,
            "why": self.why,
            "error": self.error,
            "fault": self.fault,
            "logits": self.logits,
        }

    def failed(self, error: ConstraintError | None) -> None:
        """The constraint raised this, or nothing after all."""
        self.error, self.fault = (str(error), error.fault) if error is not None else ("", "")


@dataclass
class Account:
    """What the particles of a request have taken together.

    Args:
        seconds: of this thread, and of workers that it waited for.
        tokens: that were drawn.
        over: why their constraint is not asked any more, if so.
    """

    seconds: float = 0.0
    tokens: int = 0
    over: ConstraintError | None = None


@dataclass
class Row:
    """A request in the batch.

    Args:
        settings: how it is drawn.
        request: theirs, with the constraint.
        said: tokens of the answer that stand in the prompt.
        record: what it took.
        account: what it took with the other particles.
        tokens, state: where the constraint is.
    """

    settings: Settings
    request: Request
    said: tuple[int, ...]
    record: Record
    account: Account
    tokens: tuple[int, ...] = ()
    state: Any = None

    def follow(self, tokens: Sequence[int], vocabulary: Vocabulary) -> None:
        """Bring the constraint's state to where the answer is: on by the new tokens, or anew."""
        known = len(self.tokens)
        if known > len(tokens) or (known and tokens[known - 1] != self.tokens[-1]):
            self.tokens, known = (), 0
        constraint = self.request.constraint
        if constraint is None:
            self.tokens = tuple(tokens)
            return
        if not known:
            self.state = constraint.start()
        for token in tokens[known:]:
            after = constraint.advance(self.state, token) if token not in vocabulary.ends else None
            if after is None:
                raise ConstraintError(f"the answer goes on with token {token}, which the constraint refuses")
            self.state, self.tokens = after, (*self.tokens, token)


class Rows:
    """What draws tokens inside an engine.

    Args:
        vocabulary: of the model.
        predicates: Python functions that constraints may call; None for any.
        allowance: seconds that a request's constraint may take here, at first and for each token of its particles
            more, so that it does not hold up the rows beside it for long; None for no limit.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        predicates: Collection[str] | None,
        allowance: tuple[float, float] | None = None,
    ) -> None:
        self.vocabulary, self._predicates, self._allowance = vocabulary, predicates, allowance
        self._constraints: OrderedDict[str, Memo | ConstraintError] = OrderedDict()
        self._end = min(vocabulary.ends)
        self.records: OrderedDict[str, Record] = OrderedDict()
        self._accounts: OrderedDict[str, Account] = OrderedDict()
        prepare(predicates or ())

    def open(self, settings: Settings, prompt: Sequence[int]) -> Row:
        """A row for a request; what is wrong with its constraint ends it when it is drawn."""
        said = tuple(prompt[len(prompt) - settings.prefix :]) if settings.prefix else ()
        record = self.records.get(settings.name) if settings.name else None  # a preempted one goes on with its own
        row = Row(settings, settings.request, said, record or Record(), self._account(settings.name))
        if settings.name:
            self.records[settings.name] = row.record
            if len(self.records) > RECORDS:
                self.records.popitem(last=False)
        if settings.constraint is not None:
            found = row.account.over or self._constraint(settings.constraint, row.account)
            if isinstance(found, ConstraintError):
                row.record.failed(found)
            else:
                row.request = replace(settings.request, constraint=found)
        return row

    def pop(self, names: Sequence[str]) -> list[dict[str, Any] | None]:
        """The records of these requests, None for one that is not known; they are forgotten."""
        for name in names:
            self._accounts.pop(_whole(name), None)
        found = (self.records.pop(name, None) for name in names)
        return [None if record is None else record.plain() for record in found]

    def refused(self, since: Mapping[str, int]) -> list[tuple[str, int, list[int]]]:
        """Tokens that were refused in these requests, each from a position on: name, position, tokens."""
        known = [(name, first, self.records[name]) for name, first in since.items() if name in self.records]
        return [
            (name, position, tokens)
            for name, first, record in known
            for position, tokens in sorted(record.refused.items())
            if position >= first
        ]

    def draw(self, logits: Tensor, rows: Mapping[int, tuple[Row, Sequence[int]]]) -> None:
        """Draw the next token of rows of the batch: it alone stays, and its logit is its log-weight.

        Args:
            logits: (N, V), changed in place.
            rows: by their number in it: the row, and the tokens that it has so far beside those in its prompt.
        """
        drawn = {number: row for number, (row, _) in rows.items() if not row.settings.capture}
        for number, (row, _) in rows.items():
            if row.settings.capture:
                row.record.logits = logits[number].float().cpu().numpy().tobytes()
        laws: dict[Law, list[int]] = {}
        for number, row in drawn.items():
            laws.setdefault(row.settings.request.law, []).append(number)
        written: dict[int, tuple[int, float]] = {}
        for law, numbers in laws.items():
            for number, live in zip(numbers, _lives(law, logits, numbers), strict=True):
                row, tokens = rows[number]
                written[number] = self._one(row, [*row.said, *tokens], live, logits[number])
        if not written:
            return
        index = torch.tensor(list(written))
        token, weight = zip(*written.values(), strict=True)
        if len(written) == len(logits):
            logits.fill_(-math.inf)
        else:
            logits.index_fill_(0, index.to(logits.device), -math.inf)
        logits[index, list(token)] = torch.tensor(weight, dtype=logits.dtype, device=logits.device)

    def _one(self, row: Row, tokens: Sequence[int], live: Live | ValueError, logits: Tensor) -> tuple[int, float]:
        """The token and the log-weight of a row; never raises."""
        settings, record, position = row.settings, row.record, len(tokens)
        if settings.constraint is not None and row.request.constraint is None:
            return self._end, FAILED * settings.scale
        account = row.account
        if account.over is not None:
            record.failed(account.over)
            return self._end, FAILED * settings.scale
        record.failed(None)  # of a token that was drawn in the middle of the prompt and thrown away
        began = thread_seconds()
        try:
            if isinstance(live, ValueError):
                raise live
            row.follow(tokens, self.vocabulary)
            request = row.request
            draws = Draws(request.seed, position, settings.particle)
            done = step(request, self.vocabulary, row.tokens, row.state, live, draws)
            account.seconds, account.tokens = account.seconds + thread_seconds() - began, account.tokens + 1
            self._check_time(account)
            record.evaluations[position], record.masks[position] = done.draw.evaluations, done.draw.masks
            if settings.trace:
                record.refused[position] = list(done.refused)
            record.cut, record.why = done.cut, done.why
            if done.draw.token is None:
                return self._end, DEAD * settings.scale
            weight = done.draw.log_weight
            if request.law.target == "model":
                weight += request.law.log_correction(logits, done.draw.token)
            return done.draw.token, weight * settings.scale
        except StoppedError as error:
            record.failed(error.with_traceback(None))
            account.over = error
        except ConstraintError as error:
            record.failed(error)
        except (Exception, SystemExit) as error:
            record.failed(FunctionError(f"{type(error).__name__}: {error}"))
        return self._end, FAILED * settings.scale

    def _check_time(self, account: Account) -> None:
        if self._allowance is None:
            return
        first, more = self._allowance
        if account.seconds > first + more * account.tokens:
            raise StoppedError(
                f"the constraint took {account.seconds:.1f} s, waits for its functions counted, for {account.tokens} "
                f"tokens, more than the {first:g} s and {1e3 * more:g} ms a token that a request may; write a "
                "simpler one"
            )

    def _account(self, name: str) -> Account:
        """Of the request that has a particle of this name; a row without a name is a request of its own."""
        if not name:
            return Account()
        found = self._accounts.setdefault(_whole(name), Account())
        if len(self._accounts) > RECORDS:
            self._accounts.popitem(last=False)
        return found

    def _constraint(self, text: str, account: Account) -> Memo | ConstraintError:
        """The constraint, or why it is none."""
        if text not in self._constraints:
            try:
                found: Memo | ConstraintError = Memo(
                    build(json.loads(text), self.vocabulary, predicates=self._predicates)
                )
            except StoppedError as error:  # which says nothing of the next time
                account.over = error.with_traceback(None)
                return error
            except ConstraintError as error:
                found = error.with_traceback(None)
            except (Exception, SystemExit) as error:  # whatever a predicate's module does when it is imported
                found = FunctionError(f"{type(error).__name__}: {error}")
            self._constraints[text] = found
        self._constraints.move_to_end(text)
        while len(self._constraints) > 1 and (len(self._constraints) > CONSTRAINTS or self._states() > STATES):
            self._constraints.popitem(last=False)
        return self._constraints[text]

    def _states(self) -> int:
        return sum(found.states for found in self._constraints.values() if isinstance(found, Memo))


def _whole(name: str) -> str:
    """The request of which a particle has this name."""
    return name.rpartition("-")[0] or name


def _lives(law: Law, logits: Tensor, numbers: list[int]) -> Sequence[Live | ValueError]:
    """The law of each row; where one cannot be used, the error stands in its place."""
    wanted = logits if numbers == list(range(len(logits))) else logits[numbers]
    try:
        return law.rows(wanted)
    except ValueError:
        found: list[Live | ValueError] = []
        for row in wanted:
            try:
                found += law.rows(row[None])
            except ValueError as error:
                found.append(error)
        return found
