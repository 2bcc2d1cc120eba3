"""What the page and the card both say, so that they cannot differ."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.losses import LOSSES

from .record import RunRecord

SFT_FORMULA = "-log pi(answer | prompt), mean per token"
GRPO_FORMULA = "-mean of A pi / pi_old + beta KL(pi || pi_ref), A: the reward less the mean of its group"
GRPO_PURPOSE = "raises answers of its own that are rewarded above the others to their prompt"
GRPO_PAPER = "arXiv:2402.03300"
PAL_FORMULA = "log(1 + exp(r_l - r_w)), r = -|f(x) - w P|, or s cos(f(x), sum_k w_k g_k(prompt))"
PAL_PURPOSE = "learns a reward an annotator: weights w of their own over prototypes that all share"
PAL_PAPER = "arXiv:2406.08469"
NOTATION = (
    "w: the chosen answer, l: the rejected one; S: its log-prob under the policy, R: under the reference (nats); "
    "r = S - R; n: tokens; sigma: the logistic function."
)
THUMBS_NOTATION = (
    "up, down: answers with that thumb; r: log-prob under the policy less that under the reference (nats); delta: the "
    "reward shift, a point between the rewards of both thumbs; w: weight of a thumb down by its prompt, 1 where none "
    "is asked for; KL: mean r of mismatched answers, at least 0; sigma: the logistic function."
)
REWARD_NOTATION = (
    "w: the chosen answer, l: the rejected one; r: the model's score of an answer; s(w, l): its score of one answer "
    "over another; m: margin or strength of the preference; o, l of an attribute: output and rating; sigma: the "
    "logistic function."
)
SELFPLAY_NOTATION = (
    "i, j: answers to one prompt; S: an answer's log-prob under the policy, h, r and d: log-ratios to the reference, "
    "d of a token (nats); p: probability that an answer is preferred; s and P: its mean log-odds and win rate against "
    "all of them, itself counted (in pointwise forms against the others); A: win rate over 1/2, less the penalty; "
    "t: step_size."
)

COUNTS = {
    "set_aside": "rows set aside",
    "without_reference": "prompts without a reference, set aside too",
    "truncated": "answers cut at the length limit",
    "kept": "kept by the filter, and trained on",
    "dropped": "dropped by the filter",
    "as_drawn": "groups by the token ids that were drawn",
}
REFERENCES = {
    "none": "none: the loss does not compare with a reference",
    "adapters-off": "the same weights with the adapter switched off",
    "frozen-copy": "a frozen copy of the weights that training started from",
    "log-probs": "the weights that training started from, by their log-probs, computed before the first step",
    "ema": "a moving average of the policy",
    "previous": "the policy of some steps before",
}
SPEED: dict[str, tuple[str, Callable[[Any], str]]] = {
    "rows": ("Rows", str),
    "padding": ("Padding, of all positions", lambda share: f"{100 * share:.1f} %"),
    "reference": ("Reference", lambda rows: _reference_words(rows)),
    "threads": ("Threads", lambda chosen: f"{chosen['count']}: {chosen['reason']}"),
    "checkpointing": (
        "Gradient checkpointing",
        lambda chosen: f"{'on' if chosen['on'] else 'off'}: {chosen['reason']}",
    ),
    "estimated_peak_gb": ("Memory at most, estimated", lambda gb: f"{gb:.1f} GB"),
    "peak_rss_gb": ("Memory at most, to the end of training", lambda gb: f"{gb:.1f} GB"),
    "peak_gpu_gb": ("Memory of the GPU at most", lambda gb: f"{gb:.1f} GB"),
}
"""What section ``speed`` of a manifest may say: the heading, and the value in words."""


@dataclass(frozen=True)
class Term:
    """One loss of the run, in words.

    Attributes:
        name, weight, settings: as in the recipe.
        formula, purpose: from the table of losses.
        paper: such as ``arXiv:2305.18290``; empty where there is none.
        url: of the paper, or empty.
    """

    name: str
    weight: float
    settings: dict[str, Any]
    formula: str
    purpose: str
    paper: str
    url: str


def terms(recipe: Mapping[str, Any]) -> list[Term]:
    """The losses of a resolved recipe, with what the table says of them."""
    if recipe.get("method") == "sft":
        return [Term("sft", 1.0, {}, SFT_FORMULA, "imitates the answers of the data", "", "")]
    if recipe.get("method") == "grpo":
        return [Term("grpo", 1.0, {}, GRPO_FORMULA, GRPO_PURPOSE, GRPO_PAPER, "https://arxiv.org/abs/2402.03300")]
    if is_pal(recipe):
        settings = {key: (recipe.get("pal") or {}).get(key) for key in ("variant", "groups", "dimension")}
        return [Term("pal", 1.0, settings, PAL_FORMULA, PAL_PURPOSE, PAL_PAPER, "https://arxiv.org/abs/2406.08469")]
    if recipe.get("losses"):
        raw = [dict(term) for term in recipe["losses"]]
    elif recipe.get("method"):
        raw = [{"name": recipe["method"], **(recipe.get("loss") or {})}]
    else:
        return []
    return [_term(term.pop("name"), term.pop("weight", 1.0), term) for term in raw]


def _term(name: str, weight: float, settings: dict[str, Any]) -> Term:
    info = LOSSES.get(name)
    if info is None:  # a loss of the user's own, which this process has not imported
        return Term(name, weight, settings, "", "", "", "")
    url = f"https://arxiv.org/abs/{info.paper.removeprefix('arXiv:')}" if info.paper.startswith("arXiv:") else ""
    return Term(name, weight, settings, info.formula, info.purpose, info.paper, url)


def method_name(recipe: Mapping[str, Any]) -> str:
    """``ln_dpo``, or ``0.8 dpo + 0.2 sft``."""
    found = terms(recipe)
    if len(found) == 1:
        return found[0].name
    return " + ".join(f"{term.weight:g} {term.name}" for term in found) or "unknown method"


def model_name(record: RunRecord) -> str:
    """The model as the recipe names it."""
    recipe_model = record.recipe.get("model")
    named = recipe_model.get("name") if isinstance(recipe_model, dict) else recipe_model
    return str(record.section("model").get("name") or named or "unknown model")


def judge(record: RunRecord) -> str:
    """The function that scored the sampled answers, or empty."""
    settings = record.evals.get("generation", {}).get("settings") or {}
    return str(settings.get("reward") or "")


def trains_reward(recipe: Mapping[str, Any]) -> bool:
    """Whether the run made a reward model, and no policy."""
    return any(term.name in LOSSES and LOSSES[term.name].kind == "reward" for term in terms(recipe))


def is_pal(recipe: Mapping[str, Any]) -> bool:
    """Whether the run made a reward an annotator."""
    return bool(recipe.get("method") == "pal")


def notation(recipe: Mapping[str, Any]) -> str:
    """What the letters of the formulas mean; empty where no formula uses them."""
    found = terms(recipe)
    if trains_reward(recipe):
        return REWARD_NOTATION
    if any(term.name in LOSSES and LOSSES[term.name].kind == "thumbs" for term in found):
        return THUMBS_NOTATION
    if any(term.name in LOSSES and LOSSES[term.name].kind == "selfplay" for term in found):
        return SELFPLAY_NOTATION
    return NOTATION if any(term.name in LOSSES and term.paper for term in found) else ""


def first_use(record: RunRecord) -> tuple[str, str] | None:
    """What to do with what the run has made, and the command; None where nothing is there yet."""
    if not any((record.path / part).is_dir() for part in ("adapter", "model", "merged")):
        return None
    folder = str(Path(record.output) / "model")
    if trains_reward(record.recipe):
        return "Score a data set", f"align score DATA --with {shlex.quote(folder)} --output OUT.jsonl"
    if is_pal(record.recipe):
        command = f"align score DATA --with {shlex.quote(f'{folder}@mean')} --output OUT.jsonl"
        return "Score a data set", f"{command}   # or @annotator:NAME"
    return "Chat with the result", f"align generate --model {shlex.quote(record.output)} --chat"


def commands(record: RunRecord) -> list[tuple[str, str]]:
    """What to type next, each with a word on what it does."""
    typed = record.manifest.get("command")
    use = first_use(record)
    found = [] if use is None else [use]
    if record.recipe:
        again = shlex.quote(str(Path(record.output) / "config.resolved.yaml"))
        found.append(("Train it again", f"align train {again} output={shlex.quote(record.output + '-again')}"))
    if typed:
        found.append(("The command that started this run", shlex.join(typed)))
    if sync := record.section("wandb").get("sync"):
        found.append(("Send the metrics to Weights & Biases", sync))
    return found


def data_rows(data: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """One table row per field of the data sections, in their order."""
    names: dict[str, None] = {}
    for part in data.values():
        names.update(dict.fromkeys(key for key, value in part.items() if not isinstance(value, dict | list)))
    return [
        (COUNTS.get(name, name.replace("_", " ")), [_cell(name, part.get(name)) for part in data.values()])
        for name in names
    ]


def filter_words(record: RunRecord) -> str:
    """What ``data.filter`` did; empty where the recipe has none, or the run did not come to it."""
    found = record.section("filter")
    if not found:
        return ""
    counts, scored = found["counts"], ", ".join(found["scored"])
    made = f" ({scored}: scored with the model before training)" if scored else ""
    return (
        f"{found['description']}{made}. {counts['kept']:,} of {counts['rows']:,} usable rows were trained on; "
        f"{counts['dropped']:,} were dropped"
        + (f" and {counts['set_aside']:,} had no score" if counts["set_aside"] else "")
    )


def capitalise(text: str) -> str:
    """The text with its first letter large, and the others as they are."""
    return text[:1].upper() + text[1:]


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "—"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)[:16] if name.endswith("sha256") else str(value)


def speed_rows(speed: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Section ``speed`` of a manifest, heading and words; keys that nobody here knows come last, as they are."""
    known = [(label, words(speed[key])) for key, (label, words) in SPEED.items() if key in speed]
    return known + [(key, str(value)) for key, value in speed.items() if key not in SPEED]


def _reference_words(rows: Mapping[str, Any]) -> str:
    """``{"cached": 3, "computed": 21, "seconds": 4.0}`` in words."""
    words = f"log-probs of {rows.get('cached', 0):,} rows read, of {rows.get('computed', 0):,} computed"
    return f"{words}; {rows['seconds']:g} s before the first step" if rows.get("seconds") else words
