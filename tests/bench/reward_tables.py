"""Tables of ``reward_study.py``."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from reward_data import Arguments

from align.evals.statistics import Estimate, bootstrap_interval

LEAST_TESTED = 10


@dataclass
class Results:
    """Per tested row, by model; kept by fold on disk so that a stopped study goes on."""

    pairs: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    judged: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    unseen: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    further: dict[str, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(dict))
    rows: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    choices: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))


def shown(found: Estimate) -> str:
    if found.low is None or found.high is None:
        return f"{100 * found.value:.1f}"
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def signed(found: Estimate) -> str:
    if found.low is None or found.high is None:
        return f"{100 * found.value:+.1f}"
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def per_user(values: Sequence[float], users: Sequence[str]) -> list[float]:
    by = defaultdict(list)
    for value, user in zip(values, users, strict=True):
        by[user].append(value)
    return [float(np.mean(found)) for found in by.values() if len(found) >= LEAST_TESTED]


def merged(folds: Sequence[Results]) -> Results:
    out = Results()
    for fold in folds:
        for name in ("pairs", "judged", "unseen", "rows", "choices"):
            for key, values in getattr(fold, name).items():
                getattr(out, name)[key] += values
        for key, seconds in fold.seconds.items():
            out.seconds[key] += seconds
        for model, tests in fold.further.items():
            for test, values in tests.items():
                out.further[model].setdefault(test, []).append(values)  # type: ignore[arg-type]
    return out


def facts_of(data: Arguments) -> dict[str, Any]:
    """How far annotators agree, and how often majorities run in a circle."""
    others, total = 0.0, 0
    by_pair: dict[int, list[int]] = defaultdict(list)
    for row, pair in enumerate(data.pair):
        by_pair[int(pair)].append(int(data.label[row]))
    for labels in by_pair.values():
        for place, label in enumerate(labels):
            rest = sum(labels[:place] + labels[place + 1 :])
            if label:
                others += 0.5 if rest == 0 else float(np.sign(rest) == label)
                total += 1
    margin = data.votes[:, 1] - data.votes[:, 0]
    beats: dict[int, dict[int, int]] = defaultdict(dict)
    for (a, b), m in zip(data.ends.tolist(), margin.tolist(), strict=True):
        if m:
            beats[a][b], beats[b][a] = -m, m  # positive: the row beats the column
    circles = triples = 0
    for a in beats:
        for b, c in itertools.combinations([x for x in beats[a] if x > a], 2):
            if c in beats[b]:
                triples += 1
                circles += (beats[a][b] > 0) == (beats[b][c] > 0) == (beats[c][a] > 0)
    return {"agreement": others / total, "judgements": total, "circles": circles, "triples": triples} | taste(data)


def taste(data: Arguments, *, least: int = 20, halves: int = 50) -> dict[str, Any]:
    """How stably annotators differ in one thing that can be counted: how often they prefer the longer argument.

    Debates are halved at random; of annotators with ``least`` judgements in either half, the correlation of their
    shares between the halves, mean over the draws, and the spread of the shares.
    """
    lengths = np.array([len(text) for text in data.texts])
    rows = np.flatnonzero((data.label != 0) & (lengths[data.left] != lengths[data.right]))
    longer = (np.sign(lengths[data.right] - lengths[data.left]) == data.label)[rows]
    users, debates = data.users[rows], data.debate[data.left[rows]]
    of = {user: np.flatnonzero(users == user) for user, count in Counter(users).items() if count >= 2 * least}
    rng = np.random.default_rng(0)
    correlations, shares = [], []
    for _ in range(halves):
        half = np.isin(debates, rng.permutation(sorted(set(debates)))[: len(set(debates)) // 2])
        pairs = [
            (longer[mine[half[mine]]].mean(), longer[mine[~half[mine]]].mean())
            for mine in of.values()
            if half[mine].sum() >= least and (~half[mine]).sum() >= least
        ]
        correlations.append(float(np.corrcoef(np.array(pairs).T)[0, 1]))
        shares += [pair[0] for pair in pairs]
    low, high = np.quantile(shares, [0.05, 0.95])
    return {"taste": float(np.mean(correlations)), "taste_low": float(low), "taste_high": float(high)}


def table_of(found: Results, facts: dict[str, Any], further: dict[str, int]) -> str:
    lines = ["### Pairs of held-out debates, by the majority of about five annotators", ""]
    groups = found.rows["pair_debate"]
    lines += [f"n = {len(groups):,} pairs of {len(set(groups))} debates.", ""]
    lines += ["| model | accuracy, % | against BT | seconds, 5 folds |", "| --- | --- | --- | --- |"]
    base = np.array(found.pairs["BT"])
    for name, values in found.pairs.items():
        against = signed(bootstrap_interval(np.array(values) - base, groups=groups)) if name != "BT" else ""
        took = f"{found.seconds[name]:.0f}" if name in found.seconds else ""
        lines.append(f"| {name} | {shown(bootstrap_interval(values, groups=groups))} | {against} | {took} |")
    lines += [
        "",
        f"Of {facts['triples']:,} triples of arguments that were all compared, {facts['circles']:,} "
        f"({100 * facts['circles'] / facts['triples']:.1f} %) run in a circle by majority.",
        "",
    ]
    for title, values_of, prefix in (
        ("Judgements of seen annotators, in held-out debates", found.judged, "seen"),
        ("Judgements of unseen annotators, in held-out debates", found.unseen, "unseen"),
    ):
        groups, users = found.rows[f"{prefix}_debate"], found.rows[f"{prefix}_user"]
        macro = per_user(values_of["BT"], users)
        lines += [f"### {title}", ""]
        lines += [
            f"n = {len(users):,} judgements of {len(set(users))} annotators, {len(macro)} of them with "
            f"{LEAST_TESTED} or more tested, over which the macro average goes.",
            "",
        ]
        lines += ["| model | accuracy, % | macro, % | against BT | against K = 1 | seconds |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        base = np.array(values_of["BT"])
        for name, values in values_of.items():
            against = signed(bootstrap_interval(np.array(values) - base, groups=groups)) if name != "BT" else ""
            one = f"{name.split(',')[0]}, K = 1" + (", mean weights" if prefix == "unseen" else "")
            alone = ""
            if one in values_of and name != one:
                alone = signed(bootstrap_interval(np.array(values) - np.array(values_of[one]), groups=groups))
            took = found.seconds.get("BT, judgements" if name == "BT" else name)
            lines.append(
                f"| {name} | {shown(bootstrap_interval(values, groups=groups))} | "
                f"{shown(bootstrap_interval(per_user(values, users)))} | {against} | {alone} | "
                f"{'' if took is None else f'{took:.0f}'} |"
            )
        lines.append("")
    lines += [
        f"An annotator's clear judgement agrees with the majority of the pair's other annotators in "
        f"{100 * facts['agreement']:.1f} % of cases (n = {facts['judgements']:,}; an even split counts half).",
        "",
        f"Annotators prefer the longer argument in {100 * facts['taste_low']:.0f} to "
        f"{100 * facts['taste_high']:.0f} % of their judgements (5th to 95th percentile of those with 20 or more in "
        f"either half of the debates), with a correlation of {facts['taste']:.2f} between random halves.",
        "",
    ]
    if further:
        lines += ["### Other data, with the models trained on arguments", ""]
        lines += ["Mean over the models of the five folds; intervals resample rows.", ""]
        lines += ["| model | " + " | ".join(f"{name}, n = {count:,}" for name, count in further.items()) + " |"]
        lines += ["| --- |" + " --- |" * len(further)]
        for name, tests in found.further.items():
            cells = [shown(bootstrap_interval(np.mean(tests[test], axis=0))) for test in further]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def lora_table(found: Sequence[tuple[Results, dict[str, Any]]]) -> str:
    """LoRA and frozen heads on the same test pairs; nothing where no fold trained LoRA."""
    if not found:
        return ""
    debates = [debate for _, lora in found for debate in lora["debate"]]
    right = np.array([value for _, lora in found for value in lora["right"]])
    lines = ["", "### A trained backbone (LoRA) on some of the folds", ""]
    lines += [
        f"n = {len(right):,} pairs of {len(set(debates))} debates, {len(found)} of the five folds; "
        f"{sum(lora['steps'] for _, lora in found)} steps in {sum(lora['seconds'] for _, lora in found):.0f} s, "
        f"peak {max(lora['peak_gb'] for _, lora in found):.1f} GB.",
        "",
        "| model | accuracy, % | LoRA against it |",
        "| --- | --- | --- |",
        f"| BT, LoRA | {shown(bootstrap_interval(right, groups=debates))} | |",
    ]
    for name in ("longer answer", "BT", "BT, shares of votes"):
        frozen = np.array([value for fold, _ in found for value in fold.pairs[name]])
        against = signed(bootstrap_interval(right - frozen, groups=debates))
        lines.append(f"| {name} | {shown(bootstrap_interval(frozen, groups=debates))} | {against} |")
    return "\n".join([*lines, "", ""])
