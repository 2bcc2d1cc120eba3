"""What a user reads when something is wrong: what, where, and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class AlignError(Exception):
    """The run cannot go on. The message is for the user; the command line ends with ``exit_code``."""

    exit_code = 1


class ConfigError(AlignError):
    """A recipe or a command line that cannot be used, with all its problems at once.

    Args:
        source: the file or command that was read.
        problems: ``(where, what)`` per problem, such as ``("loss.betaa", "unknown key; did you mean loss.beta?")``.
    """

    exit_code = 2

    def __init__(self, source: str, problems: Sequence[tuple[str, str]]) -> None:
        self.source = source
        self.problems = list(problems)
        width = max((len(where) for where, _ in self.problems), default=0)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        lines = [f"{source}: {count}", *(f"  {where:<{width}}  {what}" for where, what in self.problems)]
        super().__init__("\n".join(lines))
