"""What is let in, and whose fault it is where that cannot be."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from transformers import PreTrainedTokenizerFast

from align.decoding.constraints import Vocabulary, wire
from align.decoding.constraints.worker import shared
from align.serve.admission import Admission
from align.serve.checker import Checker
from align.serve.errors import RefusedError
from align.serve.metrics import Metrics
from align.serve.options import Options
from align.serve.rewards import Rewards
from align.serve.wire import Settings
from align.serve.work import Drawing, Service

FUNCTIONS = """
import time
from pathlib import Path

been = Path(__file__).with_suffix(".been")
time.sleep(2 * been.exists())
been.touch()

def one_argument(text):
    return True

def says_yes(text, complete):
    return "yes"

def hangs(text, complete):
    time.sleep(60)
"""


@pytest.fixture
def service(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Service]:
    """One with functions that were found to be right when it was started, and are not any more."""
    (tmp_path / "changed.py").write_text(FUNCTIONS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(wire, "SECONDS", 0.3)
    shared.cache_clear()
    predicates = tuple(f"changed:{name}" for name in ("one_argument", "says_yes", "hangs"))
    yield Service(
        SimpleNamespace(generate=None, vllm_config=SimpleNamespace(model_config=SimpleNamespace(max_model_len=64))),
        Vocabulary.of(tiny_tokenizer),
        Options(predicates=predicates),
        admission=Admission(8, 0),
        metrics=Metrics(registry=CollectorRegistry()),
        checker=Checker(5.0, predicates),
        rewards=Rewards({}),
    )
    shared.cache_clear()


def refusals(service: Service, *constraints: dict[str, Any]) -> list[RefusedError]:
    async def admit() -> list[RefusedError]:
        found = []
        try:
            for constraint in constraints:
                with pytest.raises(RefusedError) as refused:
                    await service.admit("r", Settings(constraint=constraint), Drawing(), (5,), "a", 0.0)
                found.append(refused.value)
        finally:
            await service.checker.close()
        return found

    return asyncio.run(admit())


@pytest.mark.parametrize(
    ("function", "said"),
    [("one_argument", "raised TypeError"), ("says_yes", "which is no bool"), ("hangs", "took over 0.3 s on ''")],
)
def test_a_function_that_fails_while_its_constraint_is_built_is_the_operators(
    function: str, said: str, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        (refused,) = refusals(service, {"python": f"changed:{function}"})
    assert refused.status == 500
    assert "tell its operator" in refused.message
    assert said in refused.message
    assert said in caplog.text


def test_one_that_starts_again_then_is_nobodys(service: Service) -> None:
    """It was stopped, and importing its module takes two seconds the second time."""
    first, second = refusals(service, *[{"python": "changed:hangs"}] * 2)
    assert (first.status, second.status) == (500, 503)
    assert second.headers == {"Retry-After": "5"}
    assert "is starting again" in second.message


def test_what_is_no_constraint_is_the_clients(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        found = refusals(service, {"regex": "("}, {"python": "os:system"})
    assert [one.status for one in found] == [400, 400]
    assert not caplog.text
