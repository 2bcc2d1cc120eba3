"""The run folder: manifest, metrics and their mirror in W&B.

- ``run_folder``: one folder per run, held by one process at a time; status, metrics, checkpoints, resume.
- ``metrics``: ``metrics.jsonl``, one JSON object per logged step, written so that a kill costs at most one line.
- ``manifest``: what is needed to tell a run apart later: versions, commit, machine, command without secrets.
- ``callback``: what the trainer calls: the metrics writer and the progress lines.
- ``progress``: how far an evaluation is.
- ``files``: writing that leaves the old file or the new one, nothing between.
- ``wandb``: the mirror in Weights & Biases, offline unless the recipe says otherwise; never the record itself.
- ``wandb_eval``: an evaluation as a W&B run of its own, in the group of its training run.
- ``telemetry``: usage reporting of dependencies, switched off in one place.
"""
