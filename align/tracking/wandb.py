"""The mirror of a run in Weights & Biases: offline unless the recipe says online, and never the record.

``metrics.jsonl`` and the run folder are the record. Whatever goes wrong here is said once, in the log and in the
manifest, and the run goes on.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .files import finite
from .run_folder import RunFolder

logger = logging.getLogger(__name__)

Mode = Literal["offline", "online", "disabled"]
SAMPLE_COLUMNS = ("prompt", "before", "after", "reward before", "reward after", "tokens before", "tokens after")


@dataclass(frozen=True)
class Place:
    """Where a W&B run goes.

    Attributes:
        folder: its files lie in ``wandb/`` there.
        mode, project, group, name: as W&B knows them.
    """

    folder: Path
    mode: Mode = "offline"
    project: str = "align"
    group: str | None = None
    name: str | None = None

    @property
    def sync(self) -> str:
        """The command that sends what lies there; several starts of one run are sent in order."""
        return f"wandb sync {shlex.quote(str(self.folder / 'wandb'))}/offline-run-*"


class WandbMirror:
    """One W&B run that follows one run folder; its files lie in ``<run>/wandb``.

    Args:
        run: the run folder, started.
        config: the resolved recipe.
        mode: ``offline`` writes files for ``wandb sync``, ``online`` sends as it goes, ``disabled`` does nothing.
        project, group, name: as W&B knows them; group and name fall back to the folder's name.
    """

    def __init__(
        self,
        run: RunFolder,
        config: Mapping[str, Any],
        *,
        mode: Mode = "offline",
        project: str = "align",
        group: str | None = None,
        name: str | None = None,
    ) -> None:
        self._folder = run
        self._run: Any = None
        folder = run.path.resolve().name
        self.place = Place(run.path, mode, project, group or folder, name or folder)
        if mode == "disabled":
            run.update_manifest(wandb=None)
            return
        known = run.manifest.get("wandb") or {}
        self._section: dict[str, Any] = {"mode": mode, "id": known.get("id") or os.urandom(4).hex(), "dir": "wandb"}
        self._guard("start", lambda: self._start(config))
        run.update_manifest(wandb=self._section)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Mirror one line of metrics."""
        self._guard("log", lambda: self._run.log(finite(values), step=step))

    def summary(self, evals: Mapping[str, Mapping[str, Any]]) -> None:
        """Mirror the final evaluation: ``eval/NAME.json`` contents by name."""
        values = {
            f"{suite}/{metric}{suffix}": entry[field]
            for suite, content in evals.items()
            for metric, entry in content["metrics"].items()
            for field, suffix in (("value", ""), ("low", "_low"), ("high", "_high"))
            if entry[field] is not None
        }
        self._guard("summary", lambda: self._run.summary.update(finite(values)))

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Mirror the before and after samples as a table."""
        self._guard("samples", lambda: self._log_table(rows))

    def file(self, path: Path) -> None:
        """Mirror a file, such as ``report.html``."""
        self._guard("file", lambda: self._save(path))

    def finish(self) -> str | None:
        """Close the W&B run.

        Returns:
            The command that sends an offline run, or None where there is nothing to send.
        """
        self._guard("finish", lambda: self._run.finish())
        return None if self._run is None else self._section.get("sync")

    def _start(self, config: Mapping[str, Any]) -> None:
        self._run = start_wandb(
            self.place,
            job_type="train",
            id=self._section["id"],
            resume="allow" if self.place.mode == "online" else None,
            config=finite(config),
        )
        if self._run.offline:
            self._section["sync"] = self.place.sync

    def _log_table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        sides = ("before", "after")
        data = [
            [row["prompt"], *(row[side][field] for field in ("text", "reward", "tokens") for side in sides)]
            for row in rows
        ]
        self._run.log({"samples": wandb.Table(columns=list(SAMPLE_COLUMNS), data=data)})

    def _save(self, path: Path) -> None:
        copy = Path(shutil.copy(path, self._run.dir))
        self._run.save(str(copy), base_path=self._run.dir, policy="now")

    def _guard(self, what: str, action: Callable[[], object]) -> None:
        """Do it, or say once why W&B is left out from here on: the mirror must not stop the run."""
        if self._run is None and what != "start":
            return
        try:
            action()
        except Exception as error:
            self._run = None
            reason = "not installed" if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: {error}"
            logger.warning(
                "W&B is left out from here on (%s: %s); %s is complete", what, reason, self._folder.metrics_path
            )
            self._section = {**self._section, "error": f"{what}: {reason}"}
            self._folder.update_manifest(wandb=self._section)


def start_wandb(place: Place, **given: Any) -> Any:
    """A W&B run; nothing of the machine is looked at, and nothing is printed.

    Args:
        place: where it goes.
        given: to ``wandb.init``, too.
    """
    import wandb

    return wandb.init(
        dir=place.folder,
        mode=place.mode,
        project=place.project,
        group=place.group,
        name=place.name,
        reinit="create_new",
        settings=wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_save_requirements=False,
            login_timeout=30,
        ),
        **given,
    )
