"""One folder per run: held by one process at a time, never half-written, and resumable after a kill."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from align.errors import AlignError

from .files import write_json
from .metrics import metrics_line, read_metrics, truncate_metrics

Status = Literal["running", "interrupted", "failed", "finished"]
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
REFERENCES = "references.jsonl"
"""Of grpo: rewards of the starting model's own answers, which references are quantiles of."""
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class RunFolder:
    """The folder of one run, used as ``with RunFolder(path) as run:``.

    Inside the block no other process can hold the folder; the lock goes with the process, also when it is killed.

    Args:
        path: the recipe's ``output``; made where it is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None
        self._metrics: IO[str] | None = None
        self._clock = 0.0
        self._started = False

    def __enter__(self) -> RunFolder:
        """Make and lock the folder.

        Raises:
            AlignError: another process holds it, it cannot be written, or it is not a folder.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a+")
        except (FileExistsError, NotADirectoryError):
            raise AlignError(f"{self.path} is a file, not a folder: choose another output") from None
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            raise AlignError(
                f"{self.path} cannot be written ({error.strerror}): choose another output, or make the folder writable"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise AlignError(
                f"{self.path} is in use by the run of process {holder}: wait for it, stop it, or choose another output"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        self._lock = lock
        for leftover in self.path.glob(".*.tmp"):  # of a process that was killed while writing
            leftover.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Record how the run ended where nobody has done so, and let go of the folder."""
        try:
            if self._started and self.manifest.get("status") == "running":
                self.end(_ending(kind))
        finally:
            if self._metrics is not None:
                self._metrics.close()
            if self._lock is not None:
                self._lock.close()
            self._metrics = self._lock = None

    # Manifest

    @property
    def has_manifest(self) -> bool:
        """Whether a run was ever started here."""
        return (self.path / "manifest.json").exists()

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it stands on disk.

        Raises:
            AlignError: there is none, or it is not a JSON object.
        """
        return read_manifest(self.path)

    def update_manifest(self, **sections: Any) -> None:
        """Set top-level sections of the manifest, in one step; ``speed`` is added to what is there."""
        current = self.manifest if self.has_manifest else {}
        if "speed" in sections:
            sections["speed"] = {**current.get("speed", {}), **sections["speed"]}
        write_json(self.path / "manifest.json", {**current, **sections})

    def end(self, status: Literal["interrupted", "failed", "finished"]) -> None:
        """Record how the run ended, when, and its peak memory.

        Raises:
            ValueError: the run is not running, so it cannot end.
        """
        if self.manifest.get("status") != "running":
            raise ValueError(f"the run is {self.manifest.get('status')}, not running: it cannot become {status}")
        self.update_manifest(status=status, finished=now(), peak_rss_gb=peak_rss_gb())

    # Resume

    def open_or_resume(self, recipe_hash: str, resume: Literal["auto", "never"] = "auto") -> Path | None:
        """Start a run here, or go on with the one that stopped; the manifest says ``running`` afterwards.

        Metrics after the checkpoint are removed, so that nothing stands twice.

        Args:
            recipe_hash: hash of everything in the recipe that changes the result.
            resume: ``auto`` goes on with an unfinished run of the same recipe; ``never`` refuses to.

        Returns:
            The newest complete checkpoint to resume from, or None to start at step 0.

        Raises:
            AlignError: the folder holds a finished run, another recipe's run, or files of something else.
        """
        if not self.has_manifest:
            self._refuse_foreign_files()
            self.update_manifest(recipe_hash=recipe_hash, status="running", started=now(), finished=None, resumed=[])
            self._started = True
            return None
        manifest = self.manifest
        if manifest.get("recipe_hash") != recipe_hash and self._nothing_done(manifest):
            # Of a set-up that was refused: the mended recipe may have its folder, and nothing that the other one made.
            (self.path / REFERENCES).unlink(missing_ok=True)
            (self.path / "manifest.json").unlink()
            self.update_manifest(recipe_hash=recipe_hash, status="running", started=now(), finished=None, resumed=[])
            self._started = True
            return None
        self._refuse_other_recipe(manifest, recipe_hash)
        if manifest["status"] == "finished":
            raise AlignError(
                f"{self.path} holds this very run, finished {manifest.get('finished')}: "
                "choose another output, or delete the folder to run it again"
            )
        checkpoint = self.newest_checkpoint()
        if resume == "never":
            raise AlignError(
                f"{self.path} holds an unfinished run of this recipe ({_last_state(checkpoint)}) and resume is never: "
                "set resume: auto to go on with it, choose another output, or delete the folder"
            )
        step = checkpoint_step(checkpoint) if checkpoint else -1
        self.truncate_metrics(step)
        resumed = [*manifest.get("resumed", []), {"at": now(), "from_step": max(step, 0)}]
        self.update_manifest(status="running", finished=None, resumed=resumed)
        self._started = True
        return checkpoint

    def newest_checkpoint(self) -> Path | None:
        """The complete ``checkpoint-N`` with the largest N; folders that a kill left incomplete are passed over."""
        complete = [p for p in self.path.glob("checkpoint-*") if checkpoint_is_complete(p)]
        return max(complete, key=checkpoint_step, default=None)

    def _refuse_foreign_files(self) -> None:
        foreign = sorted(p.name for p in self.path.iterdir() if p.name != ".lock")
        if foreign:
            raise AlignError(
                f"{self.path} is not empty and not a run ({', '.join(foreign[:3])}{', ...' if foreign[3:] else ''}): "
                "choose another output"
            )

    def _nothing_done(self, manifest: Mapping[str, Any]) -> bool:
        """Whether the run that is here has neither a step nor a checkpoint to lose."""
        stepped = self.metrics_path.exists() and self.metrics_path.stat().st_size > 0
        return manifest.get("status") != "finished" and not stepped and self.newest_checkpoint() is None

    def _refuse_other_recipe(self, manifest: Mapping[str, Any], recipe_hash: str) -> None:
        theirs = str(manifest.get("recipe_hash"))
        if theirs != recipe_hash:
            raise AlignError(
                f"{self.path} holds a run of another recipe: {theirs[:12]} there, {recipe_hash[:12]} here\n"
                f"  its recipe is {self.path / 'config.resolved.yaml'}\n"
                "  choose another output, or delete the folder"
            )

    # Metrics

    @property
    def metrics_path(self) -> Path:
        """``metrics.jsonl`` of this run."""
        return self.path / "metrics.jsonl"

    def start_clock(self) -> None:
        """Start counting ``seconds``; a resumed run goes on counting where its metrics end."""
        rows = read_metrics(self.metrics_path)
        self._clock = time.monotonic() - (rows[-1].get("seconds", 0.0) if rows else 0.0)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``; it is on its way to the disk when this returns."""
        if self._metrics is None:
            if not self._clock:
                self.start_clock()
            self._metrics = self.metrics_path.open("a", encoding="utf-8")
        self._metrics.write(metrics_line(step, time.monotonic() - self._clock, values))
        self._metrics.flush()

    def truncate_metrics(self, step: int) -> None:
        """Remove the metrics after ``step``, and a line that a kill has torn."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        truncate_metrics(self.metrics_path, step)


def read_manifest(run: Path) -> dict[str, Any]:
    """``manifest.json`` of a run folder.

    Raises:
        AlignError: the folder is missing, is not a run, or its manifest is not a JSON object.
    """
    path = run / "manifest.json"
    if not path.exists():
        what = "has no manifest.json, so it is not a run folder" if run.is_dir() else "does not exist"
        raise AlignError(f"{run} {what}: give the folder that `align train` wrote to (the recipe's output)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise AlignError(f"{path}: not JSON ({error.msg}, line {error.lineno}); restore the file") from None
    if not isinstance(manifest, dict):
        raise AlignError(f"{path}: not a JSON object; restore the file")
    return manifest


def checkpoint_step(checkpoint: Path) -> int:
    """N of ``checkpoint-N``; -1 for a folder that is not named so."""
    match = CHECKPOINT.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def checkpoint_is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint can be resumed from: transformers writes ``trainer_state.json`` last, and it must parse."""
    if checkpoint_step(checkpoint) < 0:
        return False
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and state.get("global_step") == checkpoint_step(checkpoint)


def peak_rss_gb() -> float:
    """Largest resident memory of this process so far, GB (10^9 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 3))  # Linux counts in KiB


def now() -> str:
    """The time, UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _ending(kind: type[BaseException] | None) -> Literal["interrupted", "failed", "finished"]:
    if kind is None:
        return "finished"
    return "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"


def _last_state(checkpoint: Path | None) -> str:
    return f"last checkpoint: step {checkpoint_step(checkpoint)}" if checkpoint else "no complete checkpoint"
