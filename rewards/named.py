"""``module:function`` to a callable, as recipes name rewards and other functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

Reward = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""``(prompts, completions) -> one score each``, higher is better."""


def load_reward(spec: str) -> Reward:
    """Import the reward that ``spec`` names, such as ``align.rewards.rules:everyday_answer``.

    Raises:
        ValueError: not of the form ``module:function``, no such module or function, or not callable.
    """
    found: Reward = load_function(spec, "reward", "(prompts, completions)")
    return found


def split_choice(spec: str) -> tuple[str, str | None]:
    """``FOLDER@WHO`` as the two: a reward that several people have, and whose is meant. Else the name, and None."""
    if Path(spec).expanduser().is_dir():
        return spec, None
    folder, at, who = spec.partition("@")
    while at and not Path(folder).expanduser().is_dir():  # a folder's own name may hold an @
        more, at, who = who.partition("@")
        folder = f"{folder}@{more}"
    return (folder, who) if at else (spec, None)


def load_function(spec: str, what: str, arguments: str) -> Callable[..., Any]:
    """Import the function that ``spec`` names; ``what`` it is and its ``arguments`` are for messages.

    Raises:
        ValueError: not of the form ``module:function``, no such module or function, or not callable.
    """
    module_name, colon, function = spec.partition(":")
    if not (module_name and colon and function.isidentifier()):
        raise ValueError(f"{what} {spec!r} is not of the form module:function")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # its own module was found; something that it imports is missing
        raise ValueError(
            f"{what} {spec!r}: there is no module {error.name!r}; install it, or put its folder on PYTHONPATH"
        ) from error
    found = getattr(module, function, None)
    if found is None:
        close = get_close_matches(function, dir(module), n=1)
        hint = f"; did you mean {module_name}:{close[0]}?" if close else ""
        raise ValueError(f"{what} {spec!r}: module {module_name} has no {function}{hint}")
    if not callable(found):
        raise ValueError(f"{what} {spec!r} is a {type(found).__name__}, not a function of {arguments}")
    function_found: Callable[..., Any] = found
    return function_found
