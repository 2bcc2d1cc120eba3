"""What requests may say, and what is said to those that may not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from align.serve.errors import RefusedError
from align.serve.options import Options
from align.serve.wire import ScoreBody, Settings, SmcBody, check_limits, check_openai, read, settings_of

REGEX = {"regex": "[0-9]+"}


def refusal(work: Any) -> str:
    with pytest.raises(RefusedError) as refused:
        work()
    assert refused.value.status == 400
    return refused.value.message


def test_settings_come_as_the_text_of_an_object() -> None:
    settings = settings_of({"align": '{"constraint": {"regex": "[0-9]+"}, "particles": 3}'})
    assert (settings.constraint, settings.particles, settings.method) == (REGEX, 3, "awrs-smc")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "vllm_xargs.align: not JSON"),
        ("[]", "vllm_xargs.align: it must be a JSON object"),
        ("7", "vllm_xargs.align: it must be a JSON object"),
        ('{"particle": 1}', "vllm_xargs.align.particle: unknown; there are constraint, method"),
        ('{"particles": 0}', "vllm_xargs.align.particles: Input should be greater than or equal to 1"),
        ('{"particles": "8"}', "vllm_xargs.align.particles: Input should be a valid integer"),
        ('{"method": "beam"}', "vllm_xargs.align.method"),
        ('{"threshold": 2, "reward_every": -1}', "threshold"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, said: str) -> None:
    assert said in refusal(lambda: settings_of({"align": text}))


def test_all_faults_are_said_at_once() -> None:
    message = refusal(lambda: read(SmcBody, {"max_tokens": 0, "seed": -1, "sampels": 2}))
    assert all(name in message for name in ("max_tokens", "seed", "sampels"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"constraint": REGEX, "particles": 9}, "over this server's limit of 8"),
        ({"constraint": REGEX, "reward_every": 2}, "reward_every: it goes with reward"),
        ({"reward": "none"}, "this server has no 'none'; it has kind, short"),
        ({}, "give a constraint or a reward"),
    ],
)
def test_limits_and_names_are_the_operators(settings: dict[str, Any], said: str) -> None:
    options = Options(rewards={"short": "a:b", "kind": "c:d"}, max_particles=8)
    assert said in refusal(lambda: check_limits(read(Settings, settings), options))


def test_what_is_within_them_passes() -> None:
    options = Options(rewards={"short": "a:b"}, max_particles=8)
    check_limits(read(Settings, {"constraint": REGEX, "particles": 8}), options)
    check_limits(read(Settings, {"reward": "short", "reward_every": 2, "reward_strength": -1.5}), options)


class OpenAI(BaseModel):
    """As vLLM's: what is not known is kept."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    n: int | None = 1
    stop: list[str] | None = []
    presence_penalty: float | None = None
    logprobs: bool | None = False


@pytest.mark.parametrize(
    "given",
    [
        {"n": 2},
        {"stop": ["."]},
        {"presence_penalty": 0.5},
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
        {"something": 1},
    ],
)
def test_settings_of_openai_that_are_not_followed_are_refused(given: dict[str, Any]) -> None:
    (name,) = given
    assert refusal(lambda: check_openai(OpenAI(model="m", **given))).startswith(f"{name}: it does not go with")


def test_values_that_change_nothing_are_taken() -> None:
    check_openai(OpenAI(model="m", n=1, stop=[], presence_penalty=0, logprobs=False, response_format={"type": "text"}))


def test_rows_to_score_bring_columns_of_their_own() -> None:
    body = read(ScoreBody, {"reward": "r", "rows": [{"prompt": "p", "completion": "c", "solution": "7"}]})
    assert body.rows[0].model_extra == {"solution": "7"}
    assert "rows" in refusal(lambda: read(ScoreBody, {"reward": "r", "rows": []}))
    assert "rows.0.completion" in refusal(lambda: read(ScoreBody, {"reward": "r", "rows": [{"prompt": "p"}]}))
