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
from pathlib import Path
from typing import Any, Literal

from .files import finite
from .run_folder import RunFolder

logger = logging.getLogger(__name__)

SAMPLE_COLUMNS = ("prompt", "before", "after", "reward before", "reward after", "tokens before", "tokens after")


class WandbMirror:
    """One W&B run that follows one run folder; its files lie in ``<run>/wandb``.

    Args:
        run: the run folder, started.
        config: the resolved recipe.
        mode: ``offline`` writes files for ``wandb sync``, ``online`` sends as it goes, ``disabled`` does nothing.
        project, group, name: as W&B knows them; the name falls back to the folder's.
    """

    def __init__(
        self,
        run: RunFolder,
        config: Mapping[str, Any],
        *,
        mode: Literal["offline", "online", "disabled"] = "offline",
        project: str = "align",
        group: str | None = None,
        name: str | None = None,
    ) -> None:
        self._folder = run
        self._run: Any = None
        if mode == "disabled":
            run.update_manifest(wandb=None)
            return
        known = run.manifest.get("wandb") or {}
        self._section: dict[str, Any] = {"mode": mode, "id": known.get("id") or os.urandom(4).hex(), "dir": "wandb"}
        self._guard(
            "start",
            lambda: self._start(config, project=project, group=group, name=name or run.path.resolve().name),
        )
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

    def _start(self, config: Mapping[str, Any], project: str, group: str | None, name: str) -> None:
        import wandb

        self._run = wandb.init(
            project=project,
            group=group,
            name=name,
            id=self._section["id"],
            mode=self._section["mode"],
            resume="allow" if self._section["mode"] == "online" else None,
            config=finite(config),
            dir=self._folder.path,
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                x_save_requirements=False,
                login_timeout=30,
            ),
        )
        if self._run.offline:
            # A resumed run leaves one folder per start, with one id between them; sync sends them in order.
            folder = shlex.quote(str(self._folder.path / "wandb"))
            self._section["sync"] = f"wandb sync {folder}/offline-run-*-{self._section['id']}"

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
