"""Tables of what ``serving.py`` has measured."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

MARK = "<!-- What follows is written by make bench-serve. -->"
Row = dict[str, Any]
FREE, GREEDY = "unconstrained, temperature 1", "unconstrained, greedy"


def tables(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The section of each part that has rows."""
    of: dict[str, list[Row]] = {}
    about: dict[str, str] = {}
    for row in rows:
        if "about" in row:
            about[row["of"]] = row["about"]
        else:
            of.setdefault(row["of"], []).append(row)
    found = {}
    for part, (heading, make) in SECTIONS.items():
        if part in of:
            told = [about[part], ""] if part in about else []
            found[part] = [f"## {heading}", "", *told, *make(of[part])]
    return found


def page(before: str, made: Mapping[str, Sequence[str]], fresh: Collection[str]) -> str:
    """A page with the sections of the parts that were run now; those of the others stay as they are.

    Args:
        before: the page as it is.
        made: sections by part.
        fresh: parts that were run now. What else is made is for a page that lacks it.
    """
    prose, _, written = before.partition(MARK)
    sections = {text.partition("\n")[0]: text.strip() for text in re.split(r"^(?=## )", written, flags=re.M)[1:]}
    for part, lines in made.items():
        if part in fresh or lines[0] not in sections:
            sections[lines[0]] = "\n".join(lines).strip()
    order = [f"## {heading}" for heading, _ in SECTIONS.values()]
    known = [sections.pop(heading) for heading in order if heading in sections]
    return "\n\n".join([prose + MARK, *known, *sections.values()]) + "\n"


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
    return table(head, lines)


def mean_of_logs(values: Sequence[float]) -> float:
    """Log of the mean of exp."""
    most = max(values)
    return most + math.log(sum(math.exp(value - most) for value in values) / len(values))


def transfer(rows: Sequence[Row]) -> list[str]:
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
    return table(head, lines)


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
    return table(head, lines)


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
    return table(head, lines)


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
    return table([*head, "wrong answers"], lines)


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
    return table(["", ""], lines)


SECTIONS: dict[str, tuple[str, Callable[[Sequence[Row]], list[str]]]] = {
    "offline": ("One process", speeds),
    "threads": ("Two threads", speeds),
    "guidance": ("Structured outputs by llguidance", speeds),
    "peer": ("AWRS-SMC against genlm-control 0.4.1", peer),
    "transfer": ("Transfer-Q* against its naive loop, bfloat16", transfer),
    "exact": ("Transfer-Q* against its naive loop, float32", transfer),
    "rows": ("The sampler alone", alone),
    "memory": ("Memory, MiB resident", memory),
    "server": ("Over HTTP", http),
    "load": ("Load", load),
}
"""The heading of each part, and what makes its table; in the order of the page."""
