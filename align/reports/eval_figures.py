"""Pictures of the results of ``align eval``: for the comparison page, a run's page, and trackers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from align.evals.result import models_of
from align.tracking.wandb_eval import Image

from .drawing import COLOURS, Picture, Series, curve, dots, histogram, points
from .figures import evaluation_pictures, finite, gained_tokens

Models = Mapping[str, Mapping[str, Any]]
Row = Mapping[str, Any]
NAN = float("nan")
TRAINED = "training"
"""What checkpoints, runs and models are points of."""
SUBSET = "accuracy/"
"""What the metrics of subsets begin with."""
WINS = (("win rate", "win_rate"), ("at equal length", "length_controlled_win_rate"))


def result_pictures(result: Mapping[str, Any]) -> list[Picture]:
    """What there is to see in a result: of one model, or of several (``align.evals.result``)."""
    own = result.get("models") is None
    if own and result["suite"] in OWN:
        return evaluation_pictures({result["suite"]: result})
    draw = SUITES.get(result["suite"])
    return draw(models_of(result), result) if draw is not None else []


def result_images(result: Mapping[str, Any]) -> list[Image]:
    """The same as images."""
    return [Image(p.title, p.caption, p.png()) for p in result_pictures(result)]


def estimates(
    title: str,
    label: str,
    caption: str,
    models: Models,
    wanted: Sequence[tuple[str, str]],
    mark: float | None = None,
    scale: float = 1.0,
) -> list[Picture]:
    """Metrics with their intervals, a line a model that has one of them; none where no model has."""
    models = {name: one for name, one in models.items() if any(m in one.get("metrics", {}) for _, m in wanted)}
    series = []
    for place, (name, metric) in enumerate(wanted):
        entries = [found.get("metrics", {}).get(metric) for found in models.values()]
        if any(entries):
            series.append(_estimated(name, entries, scale, place))
    return [dots(title, label, caption, list(models), series, mark)] if series else []


def _estimated(name: str, entries: Sequence[Mapping[str, Any] | None], scale: float, colour: int) -> Series:
    def column(field: str) -> list[float | None]:
        found = [(entry or {}).get(field) for entry in entries]
        return [None if value is None else scale * value for value in found]

    values = [NAN if value is None else value for value in column("value")]
    return Series(name, values, low=column("low"), high=column("high"), colour=colour)


def _displacement(models: Models, result: Mapping[str, Any]) -> list[Picture]:
    sides = (("chosen", "chosen_delta_per_token"), ("rejected", "rejected_delta_per_token"))
    caption = f"{_pairs(result)}, against {result.get('reference')}; with 95 % intervals."
    found = estimates("Log-prob change, per token", "nats per token", caption, models, sides, mark=0.0)
    fell = "Share of the chosen answers that are less likely than under the reference."
    found += estimates("Chosen answers that fell", "%", fell, models, [("fell", "frac_chosen_down")], scale=100)
    name, last = list(models.items())[-1]
    return found + ([gained_tokens(last["gained"], name)] if last.get("gained") else [])


def _generation(models: Models, result: Mapping[str, Any]) -> list[Picture]:
    caption = f"{result['n']:,} prompts, a tie is half a win; with 95 % intervals."
    found = estimates("Win rate", "% of prompts", caption, models, WINS, mark=50.0, scale=100)
    means = "Means with 95 % intervals."
    found += estimates("Score by model", "score", means, models, [("score", "reward")])
    found += estimates("KL to the baseline", "nats per answer", means, models, [("KL", "kl_to_reference")])
    return found + _answer_histograms(models)


def _answer_histograms(models: Models) -> list[Picture]:
    found = []
    for title, label, key in (("Scores of the answers", "score", "reward"), ("Answer length", "tokens", "tokens")):
        series = []
        for place, (name, result) in enumerate(list(models.items())[: len(COLOURS)]):
            rows = [row.get("after") or row for row in result.get("rows", [])]
            if values := finite([row.get(key) for row in rows]):
                series.append(Series(name, values, colour=place, dashed=False))
        if series:
            found.append(histogram(title, label, "Answers of each model.", series))
    return found


def _preference(models: Models, result: Mapping[str, Any]) -> list[Picture]:
    caption = f"{_pairs(result)}: the chosen answer is ranked first, a tie is half; with 95 % intervals."
    found = estimates("Accuracy", "% of pairs", caption, models, [("accuracy", "accuracy")], mark=50.0, scale=100)
    caption = f"By {result['settings'].get('by') or 'subset'}, a tie is half; with 95 % intervals."
    return found + _by_part(models, "Accuracy by subset", caption)


def _by_part(models: Models, title: str, caption: str) -> list[Picture]:
    """Accuracy on parts of the data, of as many models as there are colours."""
    keys = dict.fromkeys(key for one in models.values() for key in one["metrics"] if key.startswith(SUBSET))
    series = [
        _estimated(name, [one["metrics"].get(key) for key in keys], 100, place)
        for place, (name, one) in enumerate(list(models.items())[: len(COLOURS)])
    ]
    parts = [key.removeprefix(SUBSET) for key in keys]
    return [dots(title, "% right", caption, parts, series, 50.0)] if parts else []


def _frontier(models: Models, result: Mapping[str, Any]) -> list[Picture]:
    """Reward against KL, and the judge's, where there is one, against KL."""
    caption = (
        f"{result['n']:,} prompts; mean reward of answers and KL to {result.get('reference')}, with 95 % intervals. "
        "Higher and further left is better. Dashed: the most that the KL can be."
        + "".join(f" {note}." for note in result.get("notes", []))
    )
    found = [points("Frontier", ("KL, nats per answer", "reward"), caption, _of_points(models, "reward"))]
    if all("judge" in point for one in models.values() for point in one["points"]):
        caption = f"The same answers by {result['settings']['judge']}, which chose none of them."
        series = _of_points(models, "judge")
        found.append(points("Frontier by the judge", ("KL, nats per answer", "reward of the judge"), caption, series))
    return found


def _of_points(models: Models, of: str) -> list[Series]:
    """A colour and a marker a kind of point, filled by model; a kind of a model is one line."""
    several: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for name, one in models.items():
        for point in one["points"]:
            kind = TRAINED if point["kind"] in ("checkpoint", "run", "model") else point["kind"]
            several.setdefault((kind, name), []).append(point)
    kinds = list(dict.fromkeys(kind for kind, _ in several))
    series = []
    for (kind, name), own in several.items():
        alone = sum(other == kind for other, _ in several) == 1
        title, colour = kind if alone else f"{kind}, {name}", kinds.index(kind)
        fill = [model for other, model in several if other == kind].index(name)
        reward, kl = ([point[field] for point in own] for field in (of, "kl"))
        series.append(_points(title, reward, kl, colour, fill))
        if any("kl_bound" in point for point in own):
            bound = [point.get("kl_bound") or point["kl"] for point in own]
            series.append(_points(f"{title}, bound", reward, bound, colour, fill, dashed=True))
    return series


def _points(
    name: str, reward: Sequence[Row], kl: Sequence[Row], colour: int, fill: int, dashed: bool = False
) -> Series:
    def column(of: Sequence[Row], field: str) -> list[Any]:
        return [one.get(field) for one in of]

    y, x = column(reward, "value"), column(kl, "value")
    if dashed:
        return Series(name, y, x, colour=colour, dashed=True, fill=fill)
    low, high, left, right = (column(of, field) for of in (reward, kl) for field in ("low", "high"))
    return Series(name, y, x, low, high, left, right, colour=colour, dashed=False, fill=fill)


def _pluralism(models: Models, result: Mapping[str, Any]) -> list[Picture]:
    wanted = (
        ("judgements", "accuracy"),
        ("mean of annotators", "macro"),
        ("worst annotator", "worst_annotator"),
        ("worst group", "worst_group"),
    )
    caption = f"{result['n']:,} judgements ranked right; with 95 % intervals."
    found = estimates("Whom rewards serve", "%", caption, models, wanted, mark=50.0, scale=100)
    series = [
        Series(name, [100 * who["accuracy"] for who in one["annotators"]], colour=place, dashed=False)
        for place, (name, one) in enumerate(list(models.items())[: len(COLOURS)])
    ]
    caption = "Annotators by the share of their own judgements that is ranked right, however few they are."
    found.append(histogram("Annotators", "% of an annotator's judgements", caption, series))
    return found + _by_part(models, "Accuracy by group", "Judgements of each group ranked right; with 95 % intervals.")


def _cycles(models: Models, result: Mapping[str, Any]) -> list[Picture]:
    wanted = (("pairs", "accuracy"), ("one score at most", "ceiling"), ("whole cycles", "whole"))
    caption = "Pairs of circles ranked right, the most that any one score an answer can reach, and whole circles."
    return estimates("Cycles", "% right", caption, models, wanted, scale=100)


def _judges(models: Models, result: Mapping[str, Any]) -> list[Picture]:
    caption = f"{_pairs(result)}: how often an annotator agrees with people; with 95 % intervals."
    found = estimates("Agreement with people", "% of pairs", caption, models, [("agreement", "agreement")], 50.0, 100)
    sides = (("the annotator's choice", "longer"), ("people's choice", "longer_people"))
    caption = "How often the longer answer is chosen; with 95 % intervals."
    found += estimates("Longer answers chosen", "% of pairs", caption, models, sides, 50.0, 100)
    sides = (("the first one chosen", "first_preferred"), ("the order decides", "inconsistent"))
    caption = "Asked in both orders: 50 % and 0 % where position does not matter; with 95 % intervals."
    return found + estimates("Position", "% of pairs", caption, models, sides, scale=100)


def _constrained(models: Models, result: Mapping[str, Any]) -> list[Picture]:
    caption = f"{result['n']:,} prompts: answers that meet the constraint; with 95 % intervals."
    found = estimates("Valid answers", "% of prompts", caption, models, [("valid", "valid")], scale=100)
    caption = "Log of the estimated probability of the constraint, mean over prompts, with 95 % intervals."
    return found + estimates("Log-probability", "nats", caption, models, [("log Z", "log_normaliser")])


def _lm_eval(models: Models, result: Mapping[str, Any]) -> list[Picture]:
    """Tasks whose metrics are shares; perplexities and bits have scales of their own."""
    several = {name: one["metrics"] for name, one in list(models.items())[: len(COLOURS)]}
    keys = [
        key
        for key in next(iter(several.values()))
        if all(of[key]["low"] is not None and of[key]["low"] >= 0 and of[key]["high"] <= 1 for of in several.values())
    ]
    if not keys:
        return []
    series = [
        _estimated(name, [of[key] for key in keys], 100, place) for place, (name, of) in enumerate(several.items())
    ]
    caption = f"{result['n']:,} documents; with 95 % intervals."
    return [dots("Tasks", "%", caption, keys, series)]


def _calibration(models: Models, result: Mapping[str, Any]) -> list[Picture]:
    found = []
    several = {name: one["reliability"]["equal_width"] for name, one in models.items() if one.get("reliability")}
    for start in range(0, len(several), len(COLOURS)):
        part = list(several.items())[start : start + len(COLOURS)]
        series = [
            Series(
                name or "pairs",
                [point["right"] for point in bins],
                [point["confidence"] for point in bins],
                [point["low"] for point in bins],
                [point["high"] for point in bins],
                colour=place,
            )
            for place, (name, bins) in enumerate(part)
        ]
        caption = (
            f"{_pairs(result)}: how often the answer was right that the model was so sure of, in bins of equal width; "
            "Wilson's intervals. On the dashed line a model is as right as it says."
        )
        labels = ("confidence", "share that was right")
        found.append(points("Reliability", labels, caption, series, square=(0.5, 1.0)))
    errors = (("ECE", "ece"), ("if it were calibrated", "ece_if_calibrated"))
    caption = "Expected calibration error, and where 95 % of calibrated models of these confidences would be."
    return found + estimates("Calibration error", "ECE", caption, models, errors, mark=0.0)


def _resampling(models: Models, result: Mapping[str, Any]) -> list[Picture]:
    several = list(enumerate(list(models.items())[: len(COLOURS)]))
    series = []
    for place, (name, one) in several:
        curves, ceiling = one["curves"], one["metrics"].get("ceiling")
        series.append(_by_samples(name, curves["k"], curves["correct"], place))
        series.append(_by_samples(f"{name}, perfect", curves["k"], curves["perfect"], place, dashed=True))
        if ceiling is not None:
            y = [ceiling["value"]] * len(curves["k"])
            series.append(Series(f"{name}, ceiling", y, curves["k"], colour=place, dotted=True, legend=False))
    caption = (
        "Share of problems answered right, by samples allowed, with 95 % intervals. Dashed: with a verifier that "
        "knows the truth. Dotted: the ceiling, of the problems of which some sample passed."
    )
    found = [curve("Right answers by samples", "share of problems", caption, series, by="samples allowed")]
    for cost in next(iter(models.values()))["best"]:
        series, words = [], []
        for place, (name, one) in several:
            k, utility = one["curves"]["k"], one["curves"]["utility"][cost]
            best = one["best"][cost]["k"]
            series.append(_by_samples(name, k, utility, place))
            at = utility["value"][k.index(best["value"])]
            series.append(Series(f"{name}, best", [at], [best["value"]], colour=place, fill=1, legend=False))
            ends = "" if best["low"] is None else f" ({best['low']:.0f} to {best['high']:.0f})"
            words.append(f"{name} {best['value']}{ends}")
        caption = (
            f"Right answers less {cost} times the wrong ones; no answer counts 0. Hollow: the best number of samples, "
            f"{', '.join(words)}. 95 % intervals."
        )
        found.append(curve(f"Worth at cost {cost}", "utility", caption, series, by="samples allowed"))
    return found


def _by_samples(name: str, k: Sequence[int], of: Row, colour: int, *, dashed: bool = False) -> Series:
    low, high = of["low"] or (), of["high"] or ()
    return Series(name, of["value"], k, low, high, colour=colour, dashed=dashed, legend=not dashed)


def _pairs(result: Mapping[str, Any]) -> str:
    source = (result.get("data") or {}).get("source")
    return f"{result['n']:,} pairs" + (f" of {source}" if source else "")


OWN = ("generation", "thumbs", "reward", "preference", "displacement")
SUITES: dict[str, Callable[[Models, Mapping[str, Any]], list[Picture]]] = {
    "displacement": _displacement,
    "generation": _generation,
    "preference": _preference,
    "calibration": _calibration,
    "frontier": _frontier,
    "pluralism": _pluralism,
    "cycles": _cycles,
    "judges": _judges,
    "resampling": _resampling,
    "constrained": _constrained,
    "lm-eval": _lm_eval,
}
