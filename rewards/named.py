"""Names of rewards: ``module:function`` to a callable, and what else a recipe or a command calls a reward."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

CONFIG_FILE = "reward.json"
"""In the folder of a reward model."""
FITTED_FILE = "annotators.json"
"""In the folder of a PAL model: weights of annotators that came after its training."""
OF_TRL = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
"""What TRL gives a reward beside the columns of the data: of the very answers that it sampled."""
Reward = Callable[..., Sequence[float | None]]
"""``(prompts, completions) -> one score each``, higher is better; None where it does not apply."""


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


def is_rule(spec: str) -> bool:
    """Whether a name is ``module:function``, and not a folder that has a colon in its path or in ``FOLDER@WHO``."""
    return ":" in spec.partition("@")[0] and not Path(split_choice(spec)[0]).exists()


def reward_name(spec: str) -> str:
    """What a reward is called where it is given no name.

    A rule by its function, a reward model by its folder (its run, for ``RUN/model``), ``FOLDER@WHO`` by both.
    """
    if is_rule(spec):
        return spec.rpartition(":")[2]
    folder, who = split_choice(spec)
    if who is not None:
        return f"{reward_name(folder)}_{who.removeprefix('annotator:').replace(':', '_')}"
    path = Path(spec)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def reward_folder(spec: str) -> str | None:
    """Where the reward model of ``spec`` is: the folder itself, a run's ``model`` folder, or a hub id; None: a rule.

    What ``FOLDER@WHO`` says of annotators stays with the folder.

    Raises:
        ValueError: a folder that holds none.
    """
    name, who = split_choice(spec)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return None if is_rule(spec) else spec
    for place in (folder, folder / "model"):
        if (place / CONFIG_FILE).is_file() or _is_classifier(place / "config.json"):
            return f"{place}@{who}" if who is not None else str(place)
    raise ValueError(f"{spec}: no {CONFIG_FILE} in this folder, so it holds no reward model")


def is_gpm(spec: str) -> bool:
    """Whether a name leads to a folder on this machine with a preference model."""
    path = Path(split_choice(reward_folder(spec) or "")[0]) / CONFIG_FILE
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")).get("kind") == "gpm")


def _is_classifier(path: Path) -> bool:
    if not path.is_file():
        return False
    names = json.loads(path.read_text(encoding="utf-8")).get("architectures") or [""]
    return str(names[0]).endswith("ForSequenceClassification")


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
