"""``align models fit-annotators``: weights of new annotators for a PAL model that stays as it is."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from align.data.judgements import JudgementTable, read_judgements
from align.data.report import fault_report
from align.data.rewards import tokenize_reward_pairs
from align.data.rows import bad_rows
from align.data.splits import Split
from align.errors import AlignError
from align.models.hardware import resolve_dtype
from align.models.load import LOAD_ERRORS
from align.rewards.pal_model import FITTED_FILE, PalRewardModel, is_pal
from align.tracking.files import write_json
from align.trainers.build_pal import judged


@dataclass(frozen=True)
class FittedAnnotator:
    """A new annotator.

    Attributes:
        name: of the data.
        judgements: that the weights were fitted to.
        weights: K, on the simplex.
        before, after: share of these judgements that is ranked right, by the mean of the known annotators and by the
            weights.
    """

    name: str
    judgements: int
    weights: list[float]
    before: float
    after: float


def fit_annotators(model: str, source: str) -> tuple[list[FittedAnnotator], int, int]:
    """Weights of the new annotators in some judgements, written to ``annotators.json`` beside a PAL model.

    All else stays as it is. An annotator who was fitted before is fitted anew.

    Args:
        model: folder of a PAL model, or of its run.
        source: judgements, as for training.

    Returns:
        The new annotators, by name; how many judgements are left out since they are by annotators of training; and how
        many since they are ties.

    Raises:
        AlignError: no PAL model, rows that cannot be used (over 5 % of them), or nobody who is new.
    """
    folder = Path(model).expanduser()
    folder = folder / "model" if is_pal(folder / "model") else folder
    if not is_pal(folder):
        raise AlignError(f"{model}: no pal.json in this folder, so it holds no PAL model; name what method: pal wrote")
    table = read_judgements(source)
    try:
        judge = PalRewardModel.from_pretrained(folder, dtype=resolve_dtype("auto")[0])
    except LOAD_ERRORS as error:
        raise AlignError(f"{model}: cannot be loaded: {error}") from error
    known = set(judge.pal.settings["users"])
    rows = [row for row in table.rows if row.annotator not in known]
    ids = tokenize_reward_pairs(rows, judge.tokenizer, judge.config.max_length)
    split = Split(JudgementTable(rows, table.faults, table.counts, source), ids)
    if split.faults:
        print(fault_report(split.faults, table.counts["rows"]), file=sys.stderr)
    if not ids.rows:
        raise AlignError(
            f"{source}: no judgement of a new annotator can be used: of {table.counts['rows']:,} rows "
            f"{len(table.rows) - len(rows):,} are of annotators of the model's training, who have their weights, "
            f"{table.counts['ties']:,} are ties and {bad_rows(split.faults):,} are set aside"
        )
    split.check(0.05)
    data = judged(judge, split.dataset())
    found = []
    for name in sorted(set(data.users)):
        left, right, prompts = (own := data.of([name])).pairs()
        weights = judge.pal.fit_user(left, right, own.label, prompts, prior="mean")
        shares = [
            float((judge.pal.reward(right, w, prompts) > judge.pal.reward(left, w, prompts)).float().mean())
            for w in (judge.pal.prior("mean"), weights)
        ]
        found.append(FittedAnnotator(name, len(own), weights.tolist(), *shares))
    write_json(folder / FITTED_FILE, {**judge.fitted, **{one.name: one.weights for one in found}})
    return found, len(table.rows) - len(rows), table.counts["ties"]
