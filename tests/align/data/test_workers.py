"""Several processes give the ids, faults, counts and warnings of one, in its order; they end with their caller."""

from __future__ import annotations

import copy
import logging
import os
import signal
import time

import psutil
import pytest

from align.data import kept, workers
from align.data.encode import Encoder
from align.data.pairs import pair_table
from align.data.tokenize import tokenize_pairs
from align.errors import AlignError
from align.models import processors


def rows(count: int) -> list:
    """Pairs of text and of messages; every seventh leaves no room, every fifth moves the end of its prompt."""
    found = []
    for number in range(count):
        prompt = f"cat {number}" + "x" * 40 * (number % 7 == 0) + "\n" + " a" * (number % 5 == 0)
        row = {"prompt": prompt, "chosen": f"n {number}" + "y" * (number % 30), "rejected": "no"}
        if number % 3 == 0:
            row = {"prompt": [{"role": "user", "content": prompt}], "chosen": row["chosen"], "rejected": "no"}
        found.append(("d", number, row))
    return pair_table(found).rows


@pytest.fixture
def in_processes(monkeypatch: pytest.MonkeyPatch):
    """``in_processes(2)``: however few the rows, two processes tokenise them."""
    return lambda count: monkeypatch.setattr(workers, "processes_for", lambda size: count)


def test_two_processes_say_what_one_says(tiny_tokenizer, in_processes, caplog):
    """121 rows in 18 parts, of which the last is short; the first moved end of a prompt is that of the first row."""
    caplog.set_level(logging.WARNING)
    pairs = rows(121)
    one = tokenize_pairs(pairs, tiny_tokenizer, 40)
    in_processes(2)
    assert tokenize_pairs(pairs, tiny_tokenizer, 40) == one
    assert one.counts["boundary_moved"] > 5
    assert len(one.faults) > 5
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2
    assert warned[0] == warned[1]


def test_what_stops_one_stops_all(tiny_tokenizer, in_processes):
    """No chat template for messages: said once, as one process says it."""
    plain = copy.deepcopy(tiny_tokenizer)
    plain.chat_template = None
    in_processes(2)
    with pytest.raises(AlignError, match="the tokenizer has no chat template"):
        tokenize_pairs(rows(30), plain, None)


@pytest.mark.parametrize("command", ["", "raise SystemExit(3)", "print('x', flush=True)"])
def test_processes_that_end_are_told_of_and_not_needed(tiny_tokenizer, in_processes, monkeypatch, caplog, command):
    pairs = rows(30)
    one = tokenize_pairs(pairs, tiny_tokenizer, 40)
    monkeypatch.setattr(workers, "COMMAND", command)
    in_processes(2)
    assert tokenize_pairs(pairs, tiny_tokenizer, 40) == one
    assert any("this one does it alone" in record.getMessage() for record in caplog.records)


def test_a_tokenizer_that_cannot_go_to_another_process(tiny_tokenizer, in_processes, caplog):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.own = lambda text: text
    in_processes(2)
    assert tokenize_pairs(rows(8), tokenizer, None) == tokenize_pairs(rows(8), tiny_tokenizer, None)
    assert any("this one does it alone" in record.getMessage() for record in caplog.records)


def test_ctrl_c_ends_them_all(tiny_tokenizer, in_processes, monkeypatch, fork, tmp_path):
    """Interrupted while both processes are at work: nobody is left a second later, and nothing was printed by them."""
    monkeypatch.setattr(workers, "COMMAND", f"import pathlib, time; {BEGUN.format(folder=tmp_path)}; time.sleep(60)")
    in_processes(2)
    process = fork(lambda: tokenize_pairs(rows(30), tiny_tokenizer, None))
    until = time.monotonic() + 60
    while len(list(tmp_path.glob("begun-*"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 1  # of the KeyboardInterrupt, which goes on
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert process.said.read_text().count("KeyboardInterrupt") == 1


BEGUN = "pathlib.Path('{folder}', f'begun-{{time.monotonic_ns()}}').touch()"


def test_no_more_processes_than_are_of_use(monkeypatch):
    """3 processors save two thirds of 0.23 s a million characters; twice 3.2 s to start is that of 41.7 million."""
    monkeypatch.setattr(processors, "allowed", lambda: list(range(4)))
    monkeypatch.setattr(processors, "quota", lambda: 3.0)
    assert [workers.processes_for(size) for size in (41_000_000, 42_000_000)] == [1, 3]
    monkeypatch.setattr(processors, "quota", lambda: 0.5)
    assert workers.processes_for(10**12) == 1
    monkeypatch.setattr(processors, "allowed", lambda: list(range(64)))
    monkeypatch.setattr(processors, "quota", lambda: 64.0)
    assert workers.processes_for(10**12) == 8


def test_the_encoder_counts_in_the_caller(tiny_tokenizer, in_processes, monkeypatch):
    """What is kept and what is counted go through one place, however many processes there are."""
    asked = []
    monkeypatch.setattr(workers, "processes_for", lambda size: asked.append(size) or 1)
    counts = dict.fromkeys(("boundary_moved", "eos_inside", "truncated_chosen", "truncated_rejected"), 0)
    encoder = Encoder(tiny_tokenizer, None, counts)
    questions = [("the cat", {"chosen": " is", "rejected": " no"}), ([{"role": "user", "content": "a"}], {})]
    list(kept.encoded(encoder, questions, ["1", "2"], None))
    assert asked == [len("the cat is no") + len("a")]
