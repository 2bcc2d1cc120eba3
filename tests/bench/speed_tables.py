"""Tables of what ``speed.py`` has measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

MARK = "<!-- What follows is written by make bench and make bench-full. -->"
Row = dict[str, Any]
DEFAULTS, FLOAT32, BEST, OURS = "TRL, defaults", "TRL, defaults in float32", "TRL, best settings", "Align"
TITLES = {
    "lora": "an adapter",
    "full": "all weights",
    "tiny": "a model of 13 M, all weights",
    "hh": "prompts of 200 tokens, answers of 70",
    "tldr": "prompts of 350 tokens, answers of 35",
    "uf": "prompts of 120 tokens, answers of 250",
    "dialogues": "real dialogues",
}


def tables(rows: Sequence[Row], parts: Iterable[str]) -> list[str]:
    """All of them, in the order of the ``parts``; one that was not measured to its end is left out."""
    of: dict[str, list[Row]] = {}
    for row in rows:
        of.setdefault(row["part"], []).append(row)
    done = [part for part in parts if any("finished" in row for row in of.get(part, ()))]
    made = {part: timed(of[part]) for part in done if part.partition("/")[0] not in _MAKERS}
    lines = overview({part: found for part, found in made.items() if OURS in found and BEST in found})
    for part in done:
        kind, _, rest = part.partition("/")
        about = next(row for row in of[part] if "about" in row)
        head = [f"## {title(kind, rest)}", "", says(about), ""]
        lines += [*head, *_MAKERS.get(kind, ways)(of[part]), ""]
    return lines


def title(kind: str, rest: str) -> str:
    """Of a part's table."""
    names = {"without": "What each of ours gives", "tried": "Settings of TRL", "curves": "Losses beside TRL's"}
    names |= {"profile": "Where the time of a step goes", "sweep": "Five betas, one epoch"}
    if kind in names:
        return names[kind] + (f": {TITLES[rest]}" if rest else "")
    return f"{TITLES[kind].capitalize()}, {TITLES[rest]}"


def says(about: Row) -> str:
    """Of the machine, and how much was measured."""
    rates = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in about["rates"].items())
    return (
        f"{about['about']}; GFLOP a second of large products: {rates}. {about['pairs']} pairs a step, "
        f"{about['rounds']} steps of each."
    )


def spread(values: Iterable[float], form: str = ".2f") -> str:
    """Median and range."""
    found = list(values)
    middle = format(statistics.median(found), form)
    return middle if len(found) == 1 else f"{middle} ({format(min(found), form)} to {format(max(found), form)})"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """As Markdown."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]


class Timed:
    """What was measured of a way: its steps by round, the pass of its reference, its peak."""

    def __init__(self, ready: Row, steps: dict[int, Row], rate: float) -> None:
        self.steps = steps
        self.rate = rate
        self.peak = max(row["peak"] for row in steps.values()) / 1024
        self._pass = ready["reference"] / ready["tokens"]

    @property
    def seconds(self) -> dict[int, float]:
        """Of each step."""
        return {turn: row["seconds"] for turn, row in self.steps.items()}

    @property
    def whole(self) -> dict[int, float]:
        """Of each step, with its part of the reference's pass before the first: a run of one epoch."""
        return {turn: row["seconds"] + self._pass * row["tokens"] for turn, row in self.steps.items()}

    @property
    def reference(self) -> float:
        """Seconds of the reference's pass over the pairs of a step."""
        return statistics.median(self._pass * row["tokens"] for row in self.steps.values())

    def each(self, what: str) -> float:
        """``pairs`` or ``tokens`` a second."""
        return statistics.median(row[what] / row["seconds"] for row in self.steps.values())

    @property
    def utilisation(self) -> float:
        """Share of the machine's rate of products: FLOP that a step needs, by the second."""
        return statistics.median(row["flops"] / row["seconds"] / 1e9 / self.rate for row in self.steps.values())


def timed(rows: Sequence[Row]) -> dict[str, Timed]:
    """By way. The machine's rate is the best that was measured in the part."""
    ready = {row["way"]: row for row in rows if "built" in row}
    steps: dict[str, dict[int, Row]] = {}
    for row in rows:
        if "round" in row:
            steps.setdefault(row["way"], {})[row["round"]] = row
    rates = [rate for row in rows if "rates" in row for rate in row["rates"].values()]
    best = max([*rates, *(row["rate"] for row in rows if "rate" in row)], default=0.0)
    return {way: Timed(ready[way], found, best) for way, found in steps.items()}


def against(theirs: dict[int, float], ours: dict[int, float]) -> str:
    """How many times as long theirs takes, round by round."""
    return spread(theirs[turn] / ours[turn] for turn in ours if turn in theirs)


def overview(parts: dict[str, dict[str, Timed]]) -> list[str]:
    """One line a part."""
    if not parts:
        return []
    lines = []
    for part, found in parts.items():
        kind, _, rest = part.partition("/")
        ours, best = found[OURS], found[BEST]
        lines.append(
            [
                f"{TITLES[kind]}, {TITLES[rest]}",
                against(best.seconds, ours.seconds),
                against(best.whole, ours.whole),
                *(against(found[n].seconds, ours.seconds) if n in found else "" for n in (DEFAULTS, FLOAT32)),
                f"{ours.peak / best.peak:.2f}",
                f"{100 * ours.utilisation:.0f} %",
            ]
        )
    head = ["", "steps, of TRL's best", "one epoch, of TRL's best", "steps, of its defaults", "of those in float32"]
    head += ["peak memory, of TRL's best", "of the rate of products"]
    return ["## How many times as fast", "", *table(head, lines), ""]


def ways(rows: Sequence[Row]) -> list[str]:
    """A part in which ways took turns."""
    found = timed(rows)
    first = found.get(OURS) or next(iter(found.values()))
    lines = [
        [
            way,
            spread(one.seconds.values(), ".1f"),
            f"{one.each('pairs'):.2f}",
            f"{one.each('tokens'):.0f}",
            f"{one.reference:.1f}" if one.reference else "in the step",
            f"{one.peak:.2f}",
            f"{100 * one.utilisation:.0f} %",
            against(one.seconds, first.seconds) if one is not first else "",
            against(one.whole, first.whole) if one is not first else "",
        ]
        for way, one in found.items()
    ]
    head = ["way", "seconds a step", "pairs/s", "tokens/s", "reference, seconds for a step's pairs", "peak, GiB"]
    name = next(way for way, one in found.items() if one is first)
    return table([*head, "of the rate of products", f"times as long as {name}", "over one epoch"], lines)


def profile(rows: Sequence[Row]) -> list[str]:
    """Groups of operations by way, and what the rest of ours is."""
    groups = [row for row in rows if "group" in row]
    names = list(dict.fromkeys(row["way"] for row in groups))
    seconds = {(row["group"], row["way"]): row["seconds"] for row in groups}
    totals = {name: sum(row["seconds"] for row in groups if row["way"] == name) for name in names}

    def share(group: str, way: str) -> str:
        found = seconds.get((group, way), 0.0)
        return f"{found:.2f} ({100 * found / totals[way]:.0f} %)" if found else ""

    lines = [[group, *(share(group, way) for way in names)] for group in dict.fromkeys(row["group"] for row in groups)]
    rest = [
        [row["within"], row["operation"], f"{row['seconds']:.2f}", str(row["times"])]
        for row in rows
        if row.get("way") == OURS and "operation" in row
    ]
    first = table(["seconds of a step", *names], [*lines, ["in all", *(f"{totals[way]:.2f}" for way in names)]])
    head = ["in", "operation", "seconds", "times"]
    return [*first, "", f"What costs most outside products, head and attention, {OURS}:", "", *table(head, rest)]


def curves(rows: Sequence[Row]) -> list[str]:
    """Losses of both, and how far they are apart."""
    found = [row for row in rows if "theirs" in row]
    apart = max(abs(row["ours"] / row["theirs"] - 1) for row in found)
    lines = [[str(row["step"] + 1), f"{row['theirs']:.6f}", f"{row['ours']:.6f}"] for row in found]
    said = f"{len(found)} steps of {rows[0]['pairs']} pairs in float32: relative difference {apart:.1e} at most."
    return [said, "", *table(["step", "TRL", "Align"], lines)]


def sweep(rows: Sequence[Row]) -> list[str]:
    """Seconds of all runs, with the cache and without."""
    found = [row for row in rows if "beta" in row]
    lines = []
    for name, cached in (("one pass of the reference, shared", True), ("the reference in each step", False)):
        runs = [row["seconds"] for row in found if row["cache"] is cached]
        lines.append([name, " + ".join(f"{seconds:.0f}" for seconds in runs), f"{sum(runs):.0f}"])
    ratio = sum(r["seconds"] for r in found if not r["cache"]) / sum(r["seconds"] for r in found if r["cache"])
    return [*table(["", "seconds of each run", "in all"], lines), "", f"The sweep is {ratio:.2f} times as fast."]


_MAKERS: dict[str, Callable[[Sequence[Row]], list[str]]] = {"profile": profile, "curves": curves, "sweep": sweep}
