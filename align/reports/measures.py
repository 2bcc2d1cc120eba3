"""What a run measured, in words: the numbers that the page, the card and the command line show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .record import RunRecord

# Names of the suites' metrics in words, and how their values read.
PERCENT, NATS, TOKENS, POINTS = "%", "nats", "tokens", ""
METRICS: dict[str, tuple[str, str]] = {
    "generation/win_rate": ("Win rate against the model before training", PERCENT),
    "generation/ties": ("Ties, each counted as half a win", PERCENT),
    "generation/reward_before": ("Score of the answers, before", POINTS),
    "generation/reward_after": ("Score of the answers, after", POINTS),
    "generation/reward_change": ("Change of the score, by prompt", POINTS),
    "generation/length_before": ("Answer length, before", TOKENS),
    "generation/length_after": ("Answer length, after", TOKENS),
    "generation/unfinished_before": ("Answers cut by the token limit, before", PERCENT),
    "generation/unfinished_after": ("Answers cut by the token limit, after", PERCENT),
    "generation/repetition_before": ("3-grams said before in the same answer, before", PERCENT),
    "generation/repetition_after": ("3-grams said before in the same answer, after", PERCENT),
    "generation/distinct_before": ("Different 2-grams over all answers, before", PERCENT),
    "generation/distinct_after": ("Different 2-grams over all answers, after", PERCENT),
    "generation/kl_to_reference": ("KL to the reference, per answer", NATS),
    "generation/kl_to_reference_per_token": ("KL to the reference, per token", NATS),
    "goals/good_all_before": ("Answers that are good in every reward, before", PERCENT),
    "goals/good_all_after": ("Answers that are good in every reward, after", PERCENT),
    "goals/good_all_change": ("Change of the share of answers that are good in every reward", PERCENT),
    "goals/length_before": ("Answer length at temperature 1, before", TOKENS),
    "goals/length_after": ("Answer length at temperature 1, after", TOKENS),
    "goals/kl_to_reference": ("KL to the model before training, per answer", NATS),
    "thumbs/auc": ("Thumbs up told from thumbs down, held-out (AUC)", PERCENT),
    "thumbs/accuracy": ("Held-out answers on the right side of the reward's threshold", PERCENT),
    "thumbs/reward_up": ("Implicit reward of thumbs up", POINTS),
    "thumbs/reward_down": ("Implicit reward of thumbs down", POINTS),
    "reward/accuracy": ("Held-out pairs ranked right by the reward model", PERCENT),
    "reward/ties": ("Held-out pairs that it gives equal scores", PERCENT),
    "reward/label_ties": ("Held-out pairs that are ties for people", PERCENT),
    "reward/margin": ("Score of preferred answers over the others", POINTS),
    "reward/log_loss": ("Log loss of held-out pairs (chance: 0.693)", NATS),
    "preference/accuracy": ("Preference accuracy on held-out pairs", PERCENT),
    "preference/margin": ("Margin of the implicit reward", POINTS),
    "preference/ties": ("Pairs with equal rewards", PERCENT),
    "preference/label_ties": ("Held-out pairs that are ties for people", PERCENT),
    "displacement/chosen_delta": ("Log-prob change of chosen answers", NATS),
    "displacement/chosen_delta_per_token": ("Log-prob change of chosen answers, per token", NATS),
    "displacement/rejected_delta": ("Log-prob change of rejected answers", NATS),
    "displacement/rejected_delta_per_token": ("Log-prob change of rejected answers, per token", NATS),
    "displacement/frac_chosen_down": ("Chosen answers that became less likely", PERCENT),
    "displacement/largest_fall": ("Largest fall of a chosen answer", NATS),
}


@dataclass(frozen=True)
class Measure:
    """A measured number, ready to print.

    Attributes:
        label: what it is.
        value: with its unit.
        interval: ``61.0 to 74.9``, in the value's unit, or empty where there is none.
        n: independent observations.
        note: what it says, where that follows from the interval.
    """

    label: str
    value: str
    interval: str
    n: int
    note: str = ""


def measures(record: RunRecord) -> list[Measure]:
    """Every metric of every suite, before and after next to each other; metrics without a name in words come last."""
    entries = {
        f"{s}/{name}": entry for s, content in record.evals.items() for name, entry in content["metrics"].items()
    }
    known = [name for name in METRICS if name in entries]
    return [_measure(name, entries[name]) for name in [*known, *(name for name in entries if name not in METRICS)]]


def headline(record: RunRecord) -> list[Measure]:
    """The numbers to look at first; those that were not measured are left out."""
    names = (
        "generation/win_rate",
        "thumbs/auc",
        "goals/good_all_after",
        "reward/accuracy",
        "cycles/accuracy",
        "cycles/ceiling",
        "cycles/whole",
        *_pal_headline(record),
        "preference/accuracy",
        "displacement/chosen_delta_per_token",
        "generation/kl_to_reference",
    )
    found = [m for name in names if (m := _find(record, name)) is not None]
    for label, name, kind in (
        ("Score of the answers, before and after", "generation/reward", POINTS),
        ("Answer length, before and after", "generation/length", TOKENS),
    ):
        before, after = _entry(record, f"{name}_before"), _entry(record, f"{name}_after")
        if before and after:
            value = f"{number(before['value'], kind)} → {number(after['value'], kind)}{unit(kind)}"
            intervals = " → ".join(i for side in (before, after) if (i := _interval(side, kind)))
            found.append(Measure(label, value, intervals, after["n"]))
    return found


def number(value: float | None, kind: str) -> str:
    """A value of a kind, without its unit."""
    if value is None:
        return "not finite"
    if kind == PERCENT:
        text = f"{100 * value:.1f}"
    elif kind == TOKENS or abs(value) >= 10:
        text = f"{value:.1f}"
    else:
        text = f"{value:.3f}"
    return text.replace("-", "−")


def unit(kind: str) -> str:
    """The unit with the space before it."""
    return f" {kind}" if kind else ""


def interval_words(record: RunRecord) -> str:
    """How the intervals were made: ``95 % percentile bootstrap, 10,000 resamples``, and what is another way."""
    made = [i for content in record.evals.values() if (i := (content.get("settings") or {}).get("interval"))]
    if not made:
        return ""
    ends = made[0].get("shares_at_0_or_1")
    others = f" ({ends} where a share is 0 or 100 %; {made[0]['distinct']} of different n-grams)" if ends else ""
    return f"{100 * made[0]['level']:g} % {made[0]['kind']}, {made[0]['resamples']:,} resamples{others}"


def _entry(record: RunRecord, name: str) -> dict[str, Any] | None:
    suite, metric = name.split("/", 1)
    entry = record.evals.get(suite, {}).get("metrics", {}).get(metric)
    return entry if entry and entry["value"] is not None else None


def _find(record: RunRecord, name: str) -> Measure | None:
    entry = _entry(record, name)
    return _measure(name, entry) if entry else None


def _measure(name: str, entry: Mapping[str, Any]) -> Measure:
    label, kind = _label(name)
    value = f"{number(entry['value'], kind)}{unit(kind)}"
    return Measure(label, value, _interval(entry, kind), entry["n"], _note(name, entry))


def _label(name: str) -> tuple[str, str]:
    if name.startswith("pal/"):
        return _pal_label(name)
    if name.startswith("cycles/"):
        return _cycles_label(name)
    return METRICS.get(name) or _goal_label(name)


def _cycles_label(name: str) -> tuple[str, str]:
    """``cycles/accuracy_3`` in words."""
    what, _, length = name.removeprefix("cycles/").partition("_")
    words = {
        "accuracy": "pairs ranked right",
        "ceiling": "the most that any one score an answer can rank right, (K − 1)/K",
        "whole": "cycles with every pair right",
        "ties": "pairs with equal scores",
    }
    return f"Held-out cycles{f' of {length}' if length else ''}: {words[what]}", PERCENT


def _goal_label(name: str) -> tuple[str, str]:
    """``goals/good_brief_after``: answers that are good in brief, after; other names as they are."""
    what, _, when = name.removeprefix("goals/").rpartition("_")
    if not name.startswith("goals/") or when not in ("before", "after", "change"):
        return name, POINTS
    if what.startswith("good_"):
        return f"Answers that are good in {what.removeprefix('good_')}, {when}", PERCENT
    return f"Reward {what}, {when}", POINTS


def _pal_headline(record: RunRecord) -> list[str]:
    """Known annotators, what one reward for all lacks, and new annotators with the most judgements of theirs."""
    found = record.evals.get("pal", {}).get("metrics", {})
    new = [name for name in found if name.startswith("unseen/accuracy/PAL")]
    return [f"pal/{name}" for name in ("seen/accuracy/PAL", "seen/gain/PAL/one group", *new[-1:])]


def _pal_label(name: str) -> tuple[str, str]:
    """``pal/seen/gain/PAL/one group`` in words."""
    _, part, what, model, *other = name.split("/")
    who = {"seen": "Known annotators", "unseen": "New annotators"}[part]
    words = {
        "accuracy": f"judgements ranked right, {model}",
        "macro": f"mean of their own shares ranked right, {model}",
        "gain": f"share ranked right, {model} less {' '.join(other)}",
    }
    return f"{who}: {words[what]}", PERCENT


def _interval(entry: Mapping[str, Any], kind: str) -> str:
    low, high = entry.get("low"), entry.get("high")
    return "" if low is None or high is None else f"{number(low, kind)} to {number(high, kind)}"


def _note(name: str, entry: Mapping[str, Any]) -> str:
    """What the interval says about the value that means nothing happened."""
    of_two = ("generation/win_rate", "thumbs/auc", "preference/accuracy", "reward/accuracy")
    even = dict.fromkeys(of_two, (0.5, "50 %"))
    zero = (
        "generation/reward_change",
        "goals/good_all_change",
        "displacement/chosen_delta_per_token",
        "displacement/chosen_delta",
    )
    point, words = even.get(name, (0.0, "0") if name in zero else (None, ""))
    if name.startswith("pal/") and "/gain/" in name:
        point, words = 0.0, "0"
    low, high = entry.get("low"), entry.get("high")
    if point is None or low is None or high is None:
        return ""
    if low > point:
        return f"the interval lies above {words}"
    return f"the interval lies below {words}" if high < point else f"the interval holds {words}: no clear change"
