"""Table and figure of docs/results/online.md, of run folders.

python tests/bench/online_results.py runs/online_ipo runs/ipo_md ... --figure docs/results/online.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from matplotlib.figure import Figure
from scipy.special import expit

from align.evals.statistics import Estimate, bootstrap_interval

PANELS = (
    ("win rate against the model before training", "eval_win_rate"),
    ("KL to the model before training, nats an answer (held out)", "eval_kl"),
    ("answer length, tokens (learnt from)", "length/tokens"),
    ("entropy, nats a token (learnt from)", "entropy"),
)
SMOOTHED = 5  # steps
COLUMNS = (
    *("run", "method", "win rate, %", "the same, soft, %", "score", "length, tokens", "cut off, %"),
    *("KL, nats an answer", "training, s"),
)


def main() -> None:
    """Print the table, and draw the figure where one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |")
    print(f"|{' --- |' * len(COLUMNS)}")
    for run in given.runs:
        print(row(run))
    if given.figure:
        draw(given.runs, given.figure)


def row(run: Path) -> str:
    """One run."""
    generation = json.loads((run / "eval" / "generation.json").read_text(encoding="utf-8"))
    metrics = generation["metrics"]
    recipe = yaml.safe_load((run / "config.resolved.yaml").read_text(encoding="utf-8"))
    seconds = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["timings"]["train_seconds"]

    annotator = (recipe.get("online") or {}).get("annotator")
    if isinstance(annotator, dict) and annotator.get("reward") == recipe["generation"]["reward"]:
        metrics["soft"] = vars(soft_win_rate(generation["rows"], annotator.get("temperature", 1.0)))

    def interval(name: str, factor: float = 1.0, digits: int = 1) -> str:
        if name not in metrics:
            return ""
        value, low, high = (metrics[name][key] * factor for key in ("value", "low", "high"))
        return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    def change(name: str, factor: float = 1.0, digits: int = 1) -> str:
        return " → ".join(f"{metrics[f'{name}_{side}']['value'] * factor:.{digits}f}" for side in ("before", "after"))

    cells = [run.name, f"`{recipe['method']}`", interval("win_rate", 100), interval("soft", 100)]
    cells += [change("reward", 1, 2), change("length"), change("unfinished", 100)]
    cells += [interval("kl_to_reference", 1, 2), f"{seconds:.0f}"]
    return f"| {' | '.join(cells)} |"


def soft_win_rate(rows: list[dict[str, Any]], temperature: float) -> Estimate:
    """Mean of the annotator's probability that the answer after training is preferred."""
    change = [row["after"]["reward"] - row["before"]["reward"] for row in rows]
    return bootstrap_interval([float(expit(one / temperature)) for one in change])


def draw(runs: list[Path], path: Path) -> None:
    """Curves by step."""
    matplotlib.rcParams.update({"svg.hashsalt": "align", "font.size": 8})
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    for place, (title, name) in enumerate(PANELS):
        axes = figure.add_subplot(2, 2, place + 1, title=title, xlabel="step")
        for run in runs:
            lines = (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
            rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line]
            steps, values = zip(*[(one["step"], one[name]) for one in rows if name in one] or [((), ())], strict=True)
            if not steps:
                continue
            marked = len(values) < 2 * SMOOTHED
            shown = values if marked else [mean(values[max(0, n - SMOOTHED + 1) : n + 1]) for n in range(len(values))]
            axes.plot(steps, shown, marker="o" if marked else None, label=run.name, linewidth=1.2)
        axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def mean(values: Any) -> float:
    """Of some numbers."""
    return float(sum(values) / len(values))


if __name__ == "__main__":
    main()
