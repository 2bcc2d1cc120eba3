"""PAL suite: numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch

from align.evals.pal import Margins, pal_suite


def test_by_hand():
    """Ann judged three pairs and bob one. PAL: right, right, tie | right; the other: right, wrong, wrong | wrong.

    PAL: 3.5/4 of judgements; annotators (2.5/3 + 1)/2 = 11/12. The other: 1/4 and (1/3 + 0)/2 = 1/6. Gain 5/8.
    """
    margins = Margins(
        {"PAL": torch.tensor([1.0, 0.5, 0.0, 2.0]), "one": torch.tensor([1.0, -1.0, -0.1, -3.0])},
        ["ann", "ann", "ann", "bob"],
    )
    result = pal_suite({"seen": margins, "unseen": Margins({}, [])}, against=["one"], settings={"groups": 2})
    values = {name: metric["value"] for name, metric in result["metrics"].items()}
    assert values == {
        "seen/accuracy/PAL": pytest.approx(3.5 / 4),
        "seen/macro/PAL": pytest.approx(11 / 12),
        "seen/accuracy/one": pytest.approx(0.25),
        "seen/macro/one": pytest.approx(1 / 6),
        "seen/gain/PAL/one": pytest.approx(0.625),
    }
    assert all(metric["n"] == 2 for metric in result["metrics"].values())  # annotators
    assert result["rows"][0] == {
        "annotator": "ann",
        "part": "seen",
        "n": 3,
        "PAL": pytest.approx(2.5 / 3),
        "one": pytest.approx(1 / 3),
    }
    assert result["settings"]["groups"] == 2


def test_what_pairs_of_theirs_gain():
    """With 0 pairs 1 of 2 is right, with 4 both: a half more. Known annotators have no such start."""
    margins = Margins({"0 pairs": torch.tensor([1.0, -1.0]), "4 pairs": torch.ones(2)}, ["ann", "bob"])
    known = Margins({"PAL": torch.ones(2)}, ["cy", "di"])
    found = pal_suite({"seen": known, "unseen": margins}, against=[], start="0 pairs")["metrics"]
    gains = {name: entry["value"] for name, entry in found.items() if "/gain/" in name}
    assert gains == {"unseen/gain/4 pairs/0 pairs": 0.5}


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match="no held-out judgements"):
        pal_suite({"seen": Margins({}, [])}, against=[])
    with pytest.raises(ValueError, match="1 margins and 2 annotators"):
        pal_suite({"seen": Margins({"PAL": torch.ones(1)}, ["ann", "bob"])}, against=[])
    with pytest.raises(ValueError, match=r"PAL\[1\] is nan"):
        pal_suite({"seen": Margins({"PAL": torch.tensor([1.0, math.nan])}, ["ann", "bob"])}, against=[])
