"""Heads on a frozen backbone's embeddings, fold by fold, for ``reward_study.py``."""

from __future__ import annotations

import time

import numpy as np
import torch
from reward_data import SHOTS, Arguments, fold_sets, judged_sets, majority, part_of
from reward_heads import Head, Loss, bt_loss, gpm_loss, right_or_tie, scaled_loss, soft_loss, train_head
from reward_pal import Table, deltas, fitted_pal
from reward_tables import Results
from torch import Tensor

from align.rewards.pal import Pal

PAIRED: dict[str, tuple[Loss, int]] = {
    "BT": (bt_loss, 1),
    "BT, shares of votes": (soft_loss, 1),
    "scaled BT, by agreement": (scaled_loss, 1),
    "GPM, d = 2": (gpm_loss, 2),
    "GPM, d = 4": (gpm_loss, 4),
    "GPM, d = 8": (gpm_loss, 8),
}
BT_JUDGED = "BT, judgements"
PALS = ("PAL-A, K = 1", "PAL-A, K = 2", "PAL-A, K = 4", "PAL-B, K = 1", "PAL-B, K = 2")
FROZEN = (*PAIRED, BT_JUDGED, *PALS)
# Of each further test its embeddings, rows of left and right answers in them, and labels.
Others = dict[str, tuple[Table, np.ndarray, np.ndarray, np.ndarray]]


def rows_of_fold(data: Arguments, fold: int) -> Results:
    """What is tested in a fold, the same for all models, with the guess that the longer answer wins."""
    out = Results()
    _, _, test = fold_sets(data, fold)
    judged = judged_sets(data, fold)
    _, _, margin = majority(data)
    pairs = np.flatnonzero(test[data.ends[:, 0]] & (margin != 0))
    out.rows["pair_debate"] = data.debate[data.ends[pairs, 0]].tolist()
    out.pairs["longer answer"] = longer(data, *data.ends[pairs].T, np.sign(margin[pairs]))
    for part, where, rows in (("seen", out.judged, judged.seen), ("unseen", out.unseen, judged.unseen)):
        out.rows[f"{part}_debate"] = data.debate[data.left[rows]].tolist()
        out.rows[f"{part}_user"] = data.users[rows].tolist()
        where["longer answer"] = longer(data, data.left[rows], data.right[rows], data.label[rows])
    return out


def run_pairs(data: Arguments, table: Table, others: Others, fold: int, name: str) -> Results:
    """A model of pairs, by the annotators' majority. A tie of the votes is nobody's preference and is not tested."""
    out = Results()
    loss, width = PAIRED[name]
    preferred, other, margin = majority(data)
    at, sign = data.ends[:, 0], np.sign(margin)
    fit, val, tst = (np.flatnonzero(part[at] & (margin != 0)) for part in fold_sets(data, fold))
    share = (np.max(data.votes[:, :2], 1) + data.votes[:, 2] / 2) / data.votes.sum(1)
    weight = np.clip(abs(margin), 0, 5).astype(float) if loss is scaled_loss else share

    def right(head: Head, rows: np.ndarray) -> np.ndarray:
        return right_or_tie(head.scores(table.answers, *data.ends[rows].T), sign[rows])

    began = time.perf_counter()
    head, chosen = train_head(
        table.answers,
        preferred[fit],
        other[fit],
        weight[fit],
        loss,
        lambda head: float(right(head, val).mean()),
        width=width,
    )
    out.seconds[name] = time.perf_counter() - began
    out.choices[name].append(round(chosen, 4))
    out.pairs[name] = right(head, tst).tolist()
    for test_name, (found, first, second, label) in others.items():
        out.further[name][test_name] = right_or_tie(head.scores(found.answers, first, second), label).tolist()
    return out


def run_linear(data: Arguments, table: Table, fold: int) -> Results:
    """Bradley-Terry on the judgements of annotators."""
    out = Results()
    sets = judged_sets(data, fold)
    wins = np.where(data.label > 0, data.right, data.left)[sets.fit]
    loses = np.where(data.label > 0, data.left, data.right)[sets.fit]

    def right(head: Head, rows: np.ndarray) -> np.ndarray:
        return right_or_tie(head.scores(table.answers, data.left[rows], data.right[rows]), data.label[rows])

    began = time.perf_counter()
    head, chosen = train_head(
        table.answers, wins, loses, np.ones(len(wins)), bt_loss, lambda head: float(right(head, sets.valid).mean())
    )
    out.seconds[BT_JUDGED] = time.perf_counter() - began
    out.choices[BT_JUDGED].append(round(chosen, 4))
    out.judged["BT"], out.unseen["BT"] = (right(head, rows).tolist() for rows in (sets.seen, sets.unseen))
    return out


def run_pal(data: Arguments, table: Table, others: Others, fold: int, name: str) -> Results:
    """PAL on the judgements of annotators; of unseen ones with the mean of the known weights, and with fitted ones."""
    out = Results()
    sets = judged_sets(data, fold)
    fitted, valid, seen = (
        table.judgements(data, rows, sets.names[rows]) for rows in (sets.fit, sets.valid, sets.seen)
    )
    began = time.perf_counter()
    model, chosen, spread = fitted_pal(name, fitted, valid)
    out.seconds[name] = time.perf_counter() - began
    out.choices[name].append([round(chosen, 4), round(spread, 3)])
    out.judged[name] = right_or_tie(deltas(model, seen, "error"), data.label[sets.seen]).tolist()
    _, _, margin = majority(data)
    pairs = np.flatnonzero(fold_sets(data, fold)[2][data.ends[:, 0]] & (margin != 0))
    found = right_or_tie(mean_gap(model, table, *data.ends[pairs].T), np.sign(margin[pairs]))
    out.pairs[f"{name}, mean weights"] = found.tolist()
    for test_name, (rows, first, second, label) in others.items():
        delta = mean_gap(model, rows, first, second)
        out.further[f"{name}, mean weights"][test_name] = right_or_tie(delta, label).tolist()
    strange = sets.unseen
    unknown = table.judgements(data, strange, ["?"] * len(strange))
    out.unseen[f"{name}, mean weights"] = right_or_tie(deltas(model, unknown, "mean"), data.label[strange]).tolist()
    for count in SHOTS[1:] if model.groups > 1 else ():
        began = time.perf_counter()
        right = np.zeros(len(strange))
        for user, rows in sets.able.items():
            here = np.flatnonzero(data.users[strange] == user)
            shown = np.random.default_rng(part_of(user, 2**32)).permutation(rows)[:count]
            left_x, right_x, prompt_x = table.judgements(data, shown, [user] * count).pairs()
            label = torch.as_tensor(data.label[shown])
            w = model.fit_user(left_x, right_x, label, prompt_x, prior="mean", steps=40, learning_rate=0.1)
            a, b, p = unknown.part(here).pairs()
            with torch.no_grad():
                delta = model.reward(b, w, p) - model.reward(a, w, p)
            right[here] = right_or_tie(delta, data.label[strange[here]])
        out.unseen[f"{name}, {count} judgements"] = right.tolist()
        out.seconds[f"{name}, {count} judgements"] = time.perf_counter() - began
    return out


def mean_gap(model: Pal, table: Table, left: np.ndarray, right: np.ndarray) -> Tensor:
    """By how much the right answers are better for the mean of the known annotators' weights."""
    weights = model.prior("mean")
    with torch.no_grad():
        ours, theirs = (model.reward(table.answers[side], weights, table.prompts[side]) for side in (right, left))
    return ours - theirs


def run_frozen(data: Arguments, table: Table, others: Others, fold: int, name: str) -> Results:
    """One of ``FROZEN``, in one fold."""
    if name in PAIRED:
        return run_pairs(data, table, others, fold, name)
    return run_linear(data, table, fold) if name == BT_JUDGED else run_pal(data, table, others, fold, name)


def longer(data: Arguments, left: np.ndarray, right: np.ndarray, label: np.ndarray) -> list[float]:
    lengths = np.array([len(text) for text in data.texts])
    return right_or_tie(torch.as_tensor(lengths[right] - lengths[left]).float(), label).tolist()
