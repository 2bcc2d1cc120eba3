"""The laws of constraints, tried on any of them: ``check(my_constraint, vocabulary, texts=[...])`` in a test.

It walks at random through what the constraint allows and asks, at every step:

- *prefix-closed*: a token is allowed whenever a longer token that begins with its bytes is; a text that may be ended
  is never reached through a refused prefix, however it is cut into tokens, nor is one that ``complete`` wants; and no
  text is left without any next token or end (a *dead end*), unless the constraint says that it has some.
- *incremental as from scratch*: the same tokens from ``start()`` give the same verdicts, whatever was asked between.
- *one text, one verdict*: another way to cut the same bytes into tokens changes nothing.
- *forks*: what is done with one state, and with those after it, leaves every other as it was.
- *ends*: ``may_end`` is a bool, false within a character, and says what ``complete`` says where one is given; some
  text may end.
- *special tokens* are refused, nothing raises, and the mask of ``allowed`` is what ``advance`` says.

A finite number of walks finds no proof: what it finds is broken, what it does not find was not there to be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .protocol import Constraint, ConstraintError, Masking, Vocabulary

SHOWN = 2  # problems of each law in one message
REFUSED = 64  # refused tokens at one state that `complete` is asked about


@dataclass
class Conformance:
    """What was tried: verdicts asked for, texts that could end, and dead ends that were met."""

    verdicts: int = 0
    ends: int = 0
    dead_ends: int = 0
    problems: list[str] = field(default_factory=list)


def check(
    constraint: Constraint,
    vocabulary: Vocabulary,
    *,
    texts: Sequence[str] = (),
    complete: Callable[[str], bool] | None = None,
    dead_ends: bool = False,
    walks: int = 12,
    length: int = 24,
    tokens: int = 256,
    seed: int = 0,
) -> Conformance:
    """Put a constraint to the proof.

    Args:
        texts: answers that it must allow, each in several ways to cut it into tokens; give some that are typical.
        complete: whether a text, any text, is wanted, judged in another way (``re.fullmatch``, a parser). With it,
            refusals are judged too: of what follows a refused token, some is tried.
        dead_ends: the constraint may keep texts that nothing completes, as predicates and ANDs do.
        walks, length: random walks through allowed texts, and their most tokens.
        tokens: tokens asked about at every state, besides the next bytes of ``texts``; all, where there are fewer.
        seed: of the walks.

    Raises:
        ConstraintError: with the laws that it broke, each with a text that shows it; or one of ``texts`` is none that
            the vocabulary could spell.
    """
    trial = _Trial(constraint, vocabulary, complete, dead_ends, tokens, np.random.default_rng(seed))
    try:
        for text in texts:
            cuts = trial.cuts(text.encode())
            if not cuts:
                raise ConstraintError(f"texts: no tokens of the vocabulary spell {text!r}, so it says nothing here")
            for cut in cuts:
                trial.follow(cut)
        for _ in range(walks):
            trial.walk(length)
        if not trial.found.ends:
            trial.found.problems.append(
                f"ends: no text that may end was met in {walks} walks of {length} tokens: give one in `texts`"
            )
    except _RaisedError as error:
        trial.found.problems.append(str(error))
    if trial.found.problems:
        laws: dict[str, list[str]] = {}
        for problem in dict.fromkeys(trial.found.problems):
            laws.setdefault(problem.partition(":")[0], []).append(problem)
        shown = [problem for problems in laws.values() for problem in problems[:SHOWN]]
        more = sum(map(len, laws.values())) - len(shown)
        raise ConstraintError(
            f"{type(constraint).__name__} does not conform:\n  "
            + "\n  ".join(shown)
            + (f"\n  and {more} more of these kinds" if more else "")
        )
    return trial.found


class _RaisedError(Exception):
    """The constraint raised: nothing more can be asked of it."""


class _Trial:
    def __init__(
        self,
        constraint: Constraint,
        vocabulary: Vocabulary,
        complete: Callable[[str], bool] | None,
        dead_ends: bool,
        tokens: int,
        generator: np.random.Generator,
    ) -> None:
        self.constraint, self.vocabulary, self.complete, self.generator = constraint, vocabulary, complete, generator
        self.dead_ends, self.tokens, self.found = dead_ends, tokens, Conformance()
        self.of_bytes: dict[bytes, int] = {}
        for token in vocabulary.usable.tolist():
            self.of_bytes.setdefault(vocabulary.tokens[token] or b"", token)
        self.longest = max(map(len, self.of_bytes), default=0)
        self.singles = [token for said, token in self.of_bytes.items() if len(said) == 1]
        silent = [
            index for index, said in enumerate(vocabulary.tokens) if said is None and index not in vocabulary.ends
        ]
        self.silent = silent[:4]
        self.taken: list[int] = []  # tokens of texts that were allowed

    # What is asked of the constraint, with what it raises named.

    def start(self) -> Any:
        state = self._called("start", [], self.constraint.start)
        if state is None:
            raise _RaisedError("start: gives None, which is no state")
        return state

    def advance(self, state: Any, path: list[int], token: int) -> Any | None:
        return self._called("advance", [*path, token], lambda: self.constraint.advance(state, token))

    def may_end(self, state: Any, path: list[int]) -> bool:
        verdict = self._called("may_end", path, lambda: self.constraint.may_end(state))
        if not isinstance(verdict, bool):
            self.problem("ends", path, f"may_end gives {verdict!r}, which is no bool")
        return bool(verdict)

    def _called(self, name: str, path: list[int], call: Callable[[], Any]) -> Any:
        self.found.verdicts += 1
        try:
            return call()
        except Exception as error:
            raise _RaisedError(f"{name}: raises {type(error).__name__}: {error}; {self.said(path)}") from error

    # Laws.

    def walk(self, length: int) -> None:
        """One random text, as far as it goes; every state on the way is looked at, and again at the end."""
        state, path = self.start(), list[int]()
        seen = []
        for _ in range(length):
            verdicts = self.look(state, path)
            seen.append((state, list(path), verdicts))
            allowed = [token for token, verdict in verdicts[0].items() if verdict]
            if not allowed:
                break
            token = int(self.generator.choice(allowed))
            after = self.advance(state, path, token)
            if after is None:
                self.problem("forks", [*path, token], "a token that was allowed is refused when asked again")
                return
            state, path = after, [*path, token]
            self.taken.append(token)
        else:
            seen.append((state, list(path), self.look(state, path)))
        for old, before, verdicts in seen:
            self.same("forks", before, verdicts, self.ask(old, before, verdicts[0]), "after other states were used")
        for rank in {len(seen) // 2, len(seen) - 1}:
            _, before, verdicts = seen[rank]
            self.same("from scratch", before, verdicts, self.replay(before, verdicts[0]), "from start() again")
            for cut in self.cuts(self.vocabulary.bytes(before)):
                if cut != before:
                    self.same("one text", before, verdicts, self.replay(cut, verdicts[0]), f"as {self.pieces(cut)}")

    def follow(self, path: list[int]) -> None:
        """A text that must be allowed."""
        self.taken += path
        state = self.start()
        for rank, token in enumerate(path):
            after = self.advance(state, path[:rank], token)
            if after is None:
                self.problem("prefix-closed", path[: rank + 1], "is refused, and yet begins a text that is wanted")
                return
            state = after
        if not self.may_end(state, path):
            self.problem("ends", path, "may not end, and yet is a text that is wanted")
        self.look(state, path)

    def look(self, state: Any, path: list[int]) -> tuple[dict[int, bool], bool]:
        """Verdicts at one state, held against the laws that need no other state."""
        verdicts, end = self.ask(state, path, self.candidates(path))
        text = self.vocabulary.bytes(path)
        self.found.ends += end
        for token, allowed in verdicts.items():
            if allowed and token in self.silent:
                self.problem("special tokens", [*path, token], f"token {token} stands for nothing and is allowed")
            for shorter in self.prefixes(token) if allowed else ():
                taken = verdicts[shorter] if shorter in verdicts else self.advance(state, path, shorter) is not None
                if not taken:
                    self.problem("prefix-closed", [*path, shorter], f"is refused, and {self.piece(token)} is not")
        try:
            characters = text.decode()
        except UnicodeDecodeError:
            if end:
                self.problem("ends", path, "may end within a character")
        else:
            if self.complete is not None and self.complete(characters) is not end:
                self.problem("ends", path, f"may_end says {end}, complete says {not end}")
        if not end and not any(verdicts.values()) and self.nothing_follows(state, path):
            self.found.dead_ends += 1
            if not self.dead_ends:
                self.problem("prefix-closed", path, "is a dead end: no token may follow, and it may not end")
        self.judge_refusals(path, [token for token, allowed in verdicts.items() if not allowed])
        self.compare_mask(state, path, verdicts)
        return verdicts, end

    def judge_refusals(self, path: list[int], refused: list[int]) -> None:
        """Nothing that ``complete`` wants begins with what is refused: by itself, or with tokens that were taken."""
        tokens = [token for token in refused if self.vocabulary.tokens[token] is not None]
        if self.complete is None or not tokens:
            return
        some = self.generator.permutation(tokens)[:REFUSED].tolist()
        tails = [self.generator.choice(self.taken, count).tolist() for count in (1, 2, 3)] if self.taken else []
        for token in some:
            for tail in ([], *tails):
                try:
                    text = self.vocabulary.bytes([*path, token, *tail]).decode()
                except UnicodeDecodeError:
                    continue
                if self.complete(text):
                    self.problem(
                        "prefix-closed", [*path, token], f"is refused, and yet begins {text!r}, which is wanted"
                    )
                    return

    def compare_mask(self, state: Any, path: list[int], verdicts: dict[int, bool]) -> None:
        if not isinstance(self.constraint, Masking):
            return
        masking = self.constraint
        mask = self._called("allowed", path, lambda: masking.allowed(state))
        if mask is None:
            return
        if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != (self.vocabulary.size,):
            self.problem("mask", path, f"allowed is no array of {self.vocabulary.size} bools")
            return
        for token in [*verdicts, *self.vocabulary.ends]:
            if bool(mask[token]) is not verdicts.get(token, False):
                self.problem("mask", path, f"allowed says {bool(mask[token])} of token {token}, advance does not")

    def same(
        self, law: str, path: list[int], before: tuple[Any, bool], after: tuple[Any, bool] | None, when: str
    ) -> None:
        if after is None:
            self.problem(law, path, f"is refused {when}")
            return
        if before[1] is not after[1]:
            self.problem(law, path, f"may_end says {before[1]}, and {after[1]} {when}")
        for token, verdict in before[0].items():
            if after[0][token] is not verdict:
                said = {True: "allowed", False: "refused"}
                self.problem(law, [*path, token], f"is {said[verdict]}, and {said[not verdict]} {when}")
                return

    def replay(self, path: list[int], tokens: Iterable[int]) -> tuple[dict[int, bool], bool] | None:
        state = self.start()
        for rank, token in enumerate(path):
            state = self.advance(state, path[:rank], token)
            if state is None:
                return None
        return self.ask(state, path, tokens)

    def ask(self, state: Any, path: list[int], tokens: Iterable[int]) -> tuple[dict[int, bool], bool]:
        verdicts = {token: self.advance(state, path, token) is not None for token in tokens}
        return verdicts, self.may_end(state, path)

    def nothing_follows(self, state: Any, path: list[int]) -> bool:
        return all(self.advance(state, path, token) is None for token in self.vocabulary.usable.tolist())

    # Which tokens, and what they say.

    def candidates(self, path: list[int]) -> list[int]:
        usable = self.vocabulary.usable
        if len(usable) <= self.tokens:
            return [*usable.tolist(), *self.silent]
        some = self.generator.choice(usable, self.tokens, replace=False).tolist()
        return list(dict.fromkeys([*self.singles, *some, *self.silent]))

    def prefixes(self, token: int) -> Iterator[int]:
        said = self.vocabulary.tokens[token] or b""
        for end in range(1, len(said)):
            if said[:end] in self.of_bytes:
                yield self.of_bytes[said[:end]]

    def cuts(self, text: bytes) -> list[list[int]]:
        """Ways to write a text: the longest token first, the shortest, and some at random."""
        ways = [self.cut(text, lambda sizes: sizes[-1]), self.cut(text, lambda sizes: sizes[0])]
        ways += [self.cut(text, lambda sizes: int(self.generator.choice(sizes))) for _ in range(2)]
        return [way for index, way in enumerate(ways) if way is not None and way not in ways[:index]]

    def cut(self, text: bytes, choose: Callable[[list[int]], int]) -> list[int] | None:
        path, here = list[int](), 0
        while here < len(text):
            sizes = [size for size in range(1, self.longest + 1) if text[here : here + size] in self.of_bytes]
            sizes = [size for size in sizes if here + size <= len(text)]
            if not sizes:
                return None
            size = choose(sizes)
            path.append(self.of_bytes[text[here : here + size]])
            here += size
        return path

    def piece(self, token: int) -> str:
        return repr((self.vocabulary.tokens[token] or b"").decode(errors="backslashreplace"))

    def pieces(self, path: list[int]) -> str:
        return "+".join(map(self.piece, path))

    def said(self, path: list[int]) -> str:
        return f"text {self.vocabulary.bytes(path).decode(errors='backslashreplace')!r} (tokens {path[-12:]})"

    def problem(self, law: str, path: list[int], what: str) -> None:
        self.found.problems.append(f"{law}: {self.said(path)} {what}")
