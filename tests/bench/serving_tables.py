"""Tables of what ``serving.py`` has measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

MARK = "<!-- What follows is written by make bench-serve. -->"
Row = dict[str, Any]
FREE, GREEDY = "unconstrained, temperature 1", "unconstrained, greedy"


def tables(rows: Sequence[Row]) -> list[str]:
    """All of them."""
    of: dict[str, list[Row]] = {}
    for row in rows:
        of.setdefault(row["of"], []).append(row)
    lines: list[str] = []
    for part, make in (
        ("offline", offline),
        ("threads", lambda found: ["## Two threads", "", *speeds(found)]),
        ("guidance", lambda found: ["## Structured outputs by llguidance", "", *speeds(found)]),
        ("peer", peer),
        ("transfer", lambda found: transfer(found, "bfloat16")),
        ("exact", lambda found: transfer(found, "float32")),
        ("rows", alone),
        ("memory", memory),
        ("server", http),
        ("load", load),
    ):
        if part in of:
            lines += [*make(of[part]), ""]
    return lines


def spread(values: Iterable[float], form: str = ".2f") -> str:
    """Median and range."""
    found = [value for value in values if math.isfinite(value)]
    if not found:
        return ""
    middle = format(statistics.median(found), form)
    return middle if len(found) == 1 else f"{middle} ({format(min(found), form)} to {format(max(found), form)})"


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that so large a share does not exceed."""
    found = sorted(values)
    return found[max(0, math.ceil(share * len(found)) - 1)]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """As Markdown."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]


def rate(row: Row, clock: str) -> float:
    """Tokens a second."""
    return float(row["tokens"] / row[clock]) if row[clock] else math.nan


def by(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], dict[int, Row]]:
    """Rows by these, and in them by round."""
    found: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), {})[row["round"]] = row
    return found


def offline(rows: Sequence[Row]) -> list[str]:
    """The engine in one process."""
    about = next((row["about"] for row in rows if "about" in row), "")
    return ["## One process", "", about, "", *speeds([row for row in rows if "way" in row])]


def speeds(rows: Sequence[Row]) -> list[str]:
    """Tokens a second of each way, and against the same number of rows without a constraint, round by round."""
    found = by(rows, "at", "way")
    lines = []
    for at in sorted({at for at, _ in found}):
        for (one, way), made in found.items():
            if one != at:
                continue
            particles = 24 if ", 24 particles" in way else 8 if ", 8 particles" in way else 1
            waits = [wait for row in made.values() for wait in row["waits"]]
            tokens = sum(row["tokens"] for row in made.values())
            asked = sum(row["evaluations"] for row in made.values())
            ratios = []
            for plain in (FREE, GREEDY):
                other = found.get((at, plain), {}) if particles == 1 else {}
                ratios.append(
                    spread(rate(row, "cpu") / rate(other[turn], "cpu") for turn, row in made.items() if turn in other)
                    if way != plain
                    else ""
                )
            lines.append(
                [
                    str(at),
                    way,
                    f"{statistics.median(rate(row, 'wall') for row in made.values()):.0f}",
                    f"{statistics.median(rate(row, 'cpu') for row in made.values()):.0f}",
                    *ratios,
                    f"{percentile(waits, 0.5):.2f}, {percentile(waits, 0.99):.2f} of {len(waits)}",
                    f"{asked / tokens:.1f}" if way.startswith("AWRS") else "",
                ]
            )
    head = ["requests at a time", "way", "tokens/s", "tokens per CPU second", "of unconstrained, temperature 1"]
    return table([*head, "of greedy", "seconds a request: p50, p99", "questions a token"], lines)


def peer(rows: Sequence[Row]) -> list[str]:
    """Ours against genlm-control."""
    found = by(rows, "particles", "way")
    lines = []
    for (particles, way), made in sorted(found.items(), key=lambda pair: pair[0][0]):
        other = found.get((particles, "genlm-control"), {})
        free = found.get((particles, "unconstrained, of the same lengths"), {})

        def against(there: dict[int, Row], clock: str, made: dict[int, Row] = made) -> str:
            return spread(rate(row, clock) / rate(there[turn], clock) for turn, row in made.items() if turn in there)

        ours = way == "ours"
        evidence = [row["log_normaliser"] for row in made.values() if row["log_normaliser"] is not None]
        alive = [value for value in evidence if math.isfinite(value)]
        lines.append(
            [
                str(particles),
                way,
                f"{statistics.median(rate(row, 'wall') for row in made.values()):.0f}",
                f"{statistics.median(rate(row, 'cpu') for row in made.values()):.0f}",
                against(other, "cpu") if ours else "",
                against(other, "wall") if ours else "",
                against(free, "cpu") if ours else "",
                f"{statistics.median(row['evaluations'] / row['tokens'] for row in made.values()):.1f}"
                if other
                else "",
                spread(alive, ".1f"),
                f"{mean_of_logs(evidence):.1f}" if alive else "",
            ]
        )
    head = ["particles", "way", "tokens/s", "tokens per CPU second", "against genlm-control, CPU", "by the clock"]
    head += ["of unconstrained, CPU", "questions a token", "log-evidence of a run", "log of the mean"]
    return ["## AWRS-SMC against genlm-control 0.4.1", "", *table(head, lines)]


def mean_of_logs(values: Sequence[float]) -> float:
    """Log of the mean of exp."""
    most = max(values)
    return most + math.log(sum(math.exp(value - most) for value in values) / len(values))


def transfer(rows: Sequence[Row], dtype: str) -> list[str]:
    """Transfer-Q* and its naive loop."""
    found = by(rows, "way")
    slow = found[("naive",)]
    lines = []
    for (way,), made in found.items():
        first = {turn: row for turn, row in made.items() if "begun" in row}
        each = [row["begun"]["cpu"] / row["begun"]["tokens"] for row in first.values()]
        ratios = [slow[turn]["begun"]["cpu"] / row["begun"]["cpu"] for turn, row in first.items()]
        whole = [row["cpu"] / row["tokens"] for row in made.values() if row.get("tokens")]
        lines.append(
            [
                way,
                spread(1e3 * value for value in each) if not each else f"{1e3 * statistics.median(each):.0f}",
                spread(ratios, ".1f") if way != "naive" else "",
                f"{sum(row['same'] for row in first.values())} of {len(first)}" if first else "",
                f"{1e3 * statistics.median(whole):.0f}" if whole else "",
                f"{statistics.median(r['rollout_tokens'] / r['tokens'] for r in made.values()):.1f}" if whole else "",
                f"{statistics.median(r['rewards'] / r['tokens'] for r in made.values()):.1f}" if whole else "",
                f"{statistics.mean(row['reward'] for row in made.values()):.2f}" if whole else "",
            ]
        )
    tokens = next(iter(slow.values()))["begun"]["tokens"]
    head = ["way", f"CPU ms a token, first {tokens}", "times as fast as naive", f"the same first {tokens} tokens"]
    head += ["CPU ms a token, whole answer", "rollout tokens a token", "rewards a token", "reward"]
    return [f"## Transfer-Q* against its naive loop, {dtype}", "", *table(head, lines)]


def alone(rows: Sequence[Row]) -> list[str]:
    """The sampler's milliseconds a row."""
    lines = [
        [
            f"{row['vocabulary']:,}",
            row["constraint"],
            str(row["batch"]),
            f"{row['ms']:.3f} ({row['low']:.3f} to {row['high']:.3f})",
        ]
        for row in rows
    ]
    head = ["vocabulary", "constraint", "rows", "CPU ms a row: median, 10th to 90th percentile"]
    return ["## The sampler alone", "", *table(head, lines)]


def memory(rows: Sequence[Row]) -> list[str]:
    """Peaks."""
    ats = sorted({row["at"] for row in rows})
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        found.setdefault(row["way"], {})[row["at"]] = row
    lines = [
        [way, f"{next(iter(made.values()))['before']:.0f}", *(f"{made[at]['peak']:.0f}" for at in ats)]
        for way, made in found.items()
    ]
    head = ["way", "engine started", *(f"most at {at}" for at in ats)]
    return ["## Memory, MiB resident", "", *table(head, lines)]


def http(rows: Sequence[Row]) -> list[str]:
    """Over HTTP."""
    found = by(rows, "at", "way")
    lines = []
    for (at, way), made in found.items():
        free = found[at, FREE]
        waits = [wait for row in made.values() for wait in row["waits"]]
        faults = [fault for row in made.values() for fault in row["faults"]]
        ratios = [rate(row, "cpu") / rate(free[turn], "cpu") for turn, row in made.items()]
        lines.append(
            [
                str(at),
                way,
                f"{statistics.median(rate(row, 'wall') for row in made.values()):.0f}",
                f"{statistics.median(rate(row, 'cpu') for row in made.values()):.0f}",
                spread(ratios) if way != FREE else "",
                f"{percentile(waits, 0.5):.2f}, {percentile(waits, 0.99):.2f} of {len(waits)}",
                f"{len(faults)}" + (f": {faults[0][:80]}" if faults else ""),
            ]
        )
    head = ["clients", "way", "tokens/s", "tokens per CPU second", "of unconstrained", "seconds a request: p50, p99"]
    return ["## Over HTTP", "", *table([*head, "wrong answers"], lines)]


def load(rows: Sequence[Row]) -> list[str]:
    """The load test."""
    (row,) = rows
    memory = row["memory"]
    lines = [
        ["clients, seconds", f"{row['clients']}, {row['seconds']:.0f}"],
        ["good requests", f"{row['good']:,}"],
        ["bad requests", ", ".join(f"{kind} {count}" for kind, count in row["bad"].items())],
        ["wrong answers", str(len(row["faults"])) + "".join(f"; {fault[:100]}" for fault in row["faults"][:3])],
        ["told to come back (429), and did", str(row["busy"])],
        [
            "seconds a good request: p50, p99",
            f"{percentile(row['waits'], 0.5):.2f}, {percentile(row['waits'], 0.99):.2f}",
        ],
        ["left at the end", ", ".join(f"{name} {value:g}" for name, value in row["left"].items())],
        [
            "memory by second, MiB of each process",
            "; ".join(
                f"{second:.0f}: {', '.join(map(str, sizes))}" for second, sizes in memory[:: max(1, len(memory) // 8)]
            ),
        ],
    ]
    return ["## Load", "", *table(["", ""], lines)]
