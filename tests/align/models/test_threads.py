"""How many threads a run computes with, and why."""

from __future__ import annotations

import pytest
import torch

from align.models import threads
from align.models.threads import choose_threads


@pytest.fixture(autouse=True)
def six_cores(monkeypatch):
    """Of twelve logical processors, and an environment that says nothing; torch has its number back afterwards."""
    for name in threads.SAYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "cores", lambda: 6)
    monkeypatch.setattr(threads, "usable", lambda: 12)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("seconds", "count", "reason"),
    [
        ({6: 1.0, 3: 1.5, 12: 0.9}, 6, "one for each of 6 cores; 3 would take 1.50 times as long, 12 would take 0.90"),
        ({6: 1.0, 3: 0.5, 12: 2.0}, 3, "timed to be fastest; 6 would take 2.00 times as long, 12 would take 4.00"),
        (None, 6, "one for each of 6 cores; not timed, as other processes are at work on them"),
    ],
)
def test_one_a_core_unless_another_number_is_clearly_faster(monkeypatch, seconds, count, reason):
    monkeypatch.setattr(threads, "timed", lambda numbers: seconds)
    found = choose_threads()
    assert found.count == torch.get_num_threads() == count
    assert found.reason.startswith(reason)
    assert found.facts == {"threads": {"count": count, "reason": found.reason}}


def test_what_the_environment_or_the_run_before_says_is_not_timed(monkeypatch):
    monkeypatch.setattr(threads, "timed", None)
    before = {"threads": {"count": 2, "reason": "any"}}
    assert str(choose_threads(before)) == "2: as before the run was interrupted"
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("MKL_NUM_THREADS", "2")
    assert str(choose_threads({"threads": {"count": 5}})) == "2: MKL_NUM_THREADS says so"
    monkeypatch.delenv("MKL_NUM_THREADS")
    monkeypatch.setattr(threads, "cores", lambda: 1)
    monkeypatch.setattr(threads, "usable", lambda: 1)
    assert str(choose_threads(before)) == "1: there is one core"  # another machine


def test_timing_leaves_everything_as_it_was(monkeypatch):
    """The threads, and the random numbers that come next; who gets no processors times nothing."""
    monkeypatch.setattr(threads, "SECONDS", 0.01)
    monkeypatch.setattr(threads, "ALONE", 0.0)
    before, state = torch.get_num_threads(), torch.get_rng_state()
    found = threads.timed([1])
    assert found is not None
    assert found[1] > 0
    monkeypatch.setattr(threads, "ALONE", 100.0)
    assert threads.timed([1]) is None
    assert torch.get_num_threads() == before
    assert torch.equal(torch.get_rng_state(), state)
