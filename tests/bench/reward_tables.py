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
MEAN = ", mean weights"


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
    peak: dict[str, float] = field(default_factory=dict)  # GB, of the process


def shown(found: Estimate) -> str:
    if found.low is None or found.high is None:
        return f"{100 * found.value:.1f}"
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def signed(found: Estimate) -> str:
    if found.low is None or found.high is None:
        return f"{100 * found.value:+.1f}"
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def compared(values: Sequence[float], base: Sequence[float], groups: Sequence[str]) -> str:
    """Cells of accuracy and of the difference to another model on the same rows."""
    gap = np.array(values) - np.array(base)
    against = signed(bootstrap_interval(gap, groups=groups)) if gap.any() else "-"
    return f"{shown(bootstrap_interval(values, groups=groups))} | {against}"


def cost_of(found: Results, name: str) -> str:
    """Cells of seconds and of the process's peak memory."""
    peak = found.peak.get(max((model for model in found.peak if name.startswith(model)), key=len, default=""))
    seconds = found.seconds.get(name.removesuffix(MEAN))
    return " | ".join("-" if cell is None else f"{cell:.{digits}f}" for cell, digits in ((seconds, 0), (peak, 1)))


def judged_of(users: Sequence[str]) -> str:
    counts = Counter(users)
    macro = sum(count >= LEAST_TESTED for count in counts.values())
    return (
        f"n = {len(users):,} judgements of {len(counts)} annotators, {macro} of them with "
        f"{LEAST_TESTED} or more tested, over which the macro average goes."
    )


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


def of_models(parts: Sequence[Results]) -> Results:
    """Results of several models on the same rows."""
    out = Results()
    for part in parts:
        for name, values in vars(part).items():
            getattr(out, name).update(values)
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


def table_of(found: Results, facts: dict[str, Any], further: dict[str, int], costs: dict[str, dict[str, Any]]) -> str:
    lines = ["### Pairs of held-out debates, by the majority of about five annotators", ""]
    groups = found.rows["pair_debate"]
    lines += [f"n = {len(groups):,} pairs of {len(set(groups))} debates.", ""]
    lines += ["| model | accuracy, % | against BT | seconds, 5 folds | peak, GB |", "| --- | --- | --- | --- | --- |"]
    for what, cost in costs.items():
        count, seconds = cost["found"]["answers"], cost["found"]["seconds"]
        if count:
            lines.append(f"| embeddings of {count:,} {what}, once | - | - | {seconds:.0f} | {cost['peak_gb']:.1f} |")
    for name, values in found.pairs.items():
        lines.append(f"| {name} | {compared(values, found.pairs['BT'], groups)} | {cost_of(found, name)} |")
    lines += [
        "",
        f"Of {facts['triples']:,} triples of arguments that were all compared, {facts['circles']:,} "
        f"({100 * facts['circles'] / facts['triples']:.1f} %) run in a circle by majority.",
        "",
    ]
    for title, values_of, part, seconds in (
        ("Judgements of seen annotators, in held-out debates", found.judged, "seen", "seconds, 5 folds"),
        ("Judgements of unseen annotators, in held-out debates", found.unseen, "unseen", "seconds to fit the weights"),
    ):
        groups, users = found.rows[f"{part}_debate"], found.rows[f"{part}_user"]
        lines += [f"### {title}", "", judged_of(users), ""]
        lines += [f"| model | accuracy, % | against BT | macro, % | against K = 1 | {seconds} | peak, GB |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        for name, values in values_of.items():
            one = f"{name.split(',')[0]}, K = 1" + (MEAN if part == "unseen" else "")
            alone = "-"
            if one in values_of and name != one:
                alone = signed(bootstrap_interval(np.array(values) - np.array(values_of[one]), groups=groups))
            cost = cost_of(found, "BT, judgements" if name == "BT" else name)
            if part == "unseen" and "judgements" not in name:
                cost = f"- | {cost.split(' | ')[1]}"
            lines.append(
                f"| {name} | {compared(values, values_of['BT'], groups)} | "
                f"{shown(bootstrap_interval(per_user(values, users)))} | {alone} | {cost} |"
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


def lora_tables(found: Results, lora: dict[str, dict[int, dict[str, Any]]], tested: Sequence[Results]) -> str:
    """A trained backbone against the frozen one, on the same rows of some of the folds.

    Args:
        found: of the frozen backbone, all folds.
        lora: by model and fold, in the order of ``tested``.
        tested: the rows of those folds.
    """
    rows = merged(tested)
    debates = set(rows.rows["pair_debate"])
    lines = ["", f"### A trained backbone (LoRA), {len(tested)} of the five folds", ""]
    steps = sum(part["found"]["steps"] for part in lora["BT"].values())
    lines += [f"{steps} steps each, on the same arguments in the same order; tests of {len(debates)} debates.", ""]
    lines += ["| model, LoRA | seconds, with tests | peak, GB |", "| --- | --- | --- |"]
    for name, folds in lora.items():
        seconds = sum(part["found"]["seconds"] for part in folds.values())
        lines.append(f"| {name} | {seconds:.0f} | {max(part['peak_gb'] for part in folds.values()):.1f} |")
    lines.append("")
    for title, part, key, suffix in (
        ("pairs by majority", "pair", "pairs", MEAN),
        ("judgements of seen annotators", "seen", "judged", ""),
        ("judgements of unseen annotators", "unseen", "unseen", MEAN),
    ):
        groups = rows.rows[f"{part}_debate"]
        here = np.isin(found.rows[f"{part}_debate"], sorted(debates))
        frozen = {name: np.array(values)[here] for name, values in getattr(found, key).items()}
        trained = {
            name: np.concatenate([folds[fold]["found"][key] for fold in sorted(folds)]) for name, folds in lora.items()
        }
        lines += [f"n = {len(groups):,} {title}.", ""]
        lines += [
            "| model | frozen, % | LoRA, % | LoRA against frozen | LoRA against BT, LoRA | against K = 1, LoRA |"
        ]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        for name, values in trained.items():
            before = frozen.get(name + suffix if name.startswith("PAL") else name)
            cells = ["-", shown(bootstrap_interval(values, groups=groups)), "-"]
            if before is not None:
                cells[0] = shown(bootstrap_interval(before, groups=groups))
                cells[2] = signed(bootstrap_interval(values - before, groups=groups))
            for base in ("BT", "PAL-A, K = 1"):
                same = name == base or (base != "BT" and not name.startswith("PAL"))
                cells.append("-" if same else signed(bootstrap_interval(values - trained[base], groups=groups)))
            lines.append(f"| {name} | {' | '.join(cells)} |")
        guess = np.array(rows.__dict__[key]["longer answer"])
        accuracy, against = compared(guess, trained["BT"], groups).split(" | ")
        lines.append(f"| longer answer | {accuracy} | - | - | {against} | - |")
        lines.append("")
    return "\n".join([*lines, *lora_further(found, lora)])


def lora_further(found: Results, lora: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """Of the further tests, the models of the folds in which LoRA was trained."""
    tests = {test: len(folds[0]) for test, folds in found.further["BT"].items()}
    if not tests:
        return []
    lines = ["Other data, with the models of these folds; intervals resample rows.", ""]
    lines += ["| model | " + " | ".join(f"{test}, n = {count:,}" for test, count in tests.items()) + " |"]
    lines += ["| --- |" + " --- |" * len(tests)]
    for name, folds in lora.items():
        before = found.further[name + MEAN if name.startswith("PAL") else name]
        cells: list[list[str]] = [[], [], []]
        for test in tests:
            frozen = np.mean([before[test][fold] for fold in folds], axis=0)
            trained = np.mean([part["found"]["further"][test] for part in folds.values()], axis=0)
            cells[0].append(shown(bootstrap_interval(frozen)))
            cells[1].append(shown(bootstrap_interval(trained)))
            cells[2].append(signed(bootstrap_interval(trained - frozen)))
        for what, row in zip(("frozen", "LoRA", "LoRA against frozen"), cells, strict=True):
            lines.append(f"| {name}, {what} | {' | '.join(row)} |")
    return [*lines, ""]
