"""What a vLLM request may carry for us, engines that are refused, and the second model runner's interface."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState

from align.decoding.law import Law
from align.decoding.vllm.processor import AlignProcessor, AlignWorker
from align.decoding.vllm.settings import DEAD, FAILED, PLAIN, read, validate

REGEX = {"regex": "[ab]+"}
OWN = {"constraint": REGEX, "seed": 1}


def params(own: Any = OWN, **settings: Any) -> SamplingParams:
    return SamplingParams(extra_args=None if own is None else {"align": own}, **settings)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"n": 2, "temperature": 0.5}, "n is 2: align draws one answer a request"),
        ({"min_p": 0.1}, "min_p: it does not go with align"),
        ({"presence_penalty": 0.1}, "presence_penalty: it"),
        ({"frequency_penalty": -0.1}, "frequency_penalty: it"),
        ({"repetition_penalty": 1.1}, "repetition_penalty: it"),
        ({"min_tokens": 2}, "min_tokens: it"),
        ({"logit_bias": {1: 2.0}}, "logit_bias: it"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids: it"),
        ({"bad_words": ["a"]}, "bad_words: it"),
        ({"thinking_token_budget": 3}, "thinking_token_budget: it"),
        ({"trace_decode_token_ids": [1]}, "trace_decode_token_ids: it"),
        ({"structured_outputs": StructuredOutputsParams(regex="a")}, "structured_outputs: they hide the mass"),
        ({"temperature": 0}, r"align: temperature is 0.*top_k=1 takes the likeliest"),
    ],
)
def test_vllms_settings_that_change_the_law_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        validate(params(**settings))


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ({"constraint": REGEX}, "align: give a seed"),
        ({**OWN, "temprature": 1}, "align.temprature: unknown; there are constraint, method, "),
        ({**OWN, "seed": "1"}, "align.seed is '1', which is no int"),
        ({**OWN, "seed": True}, "align.seed is True, which is no int"),
        ({**OWN, "trace": 1}, "align.trace is 1, which is no bool"),
        ({**OWN, "constraint": "regex:a"}, "align.constraint is 'regex:a', which is no dict"),
        ({**OWN, "method": "awrs-smc"}, "align.method is 'awrs-smc': a vLLM request draws by awrs, mask or rejection"),
        ({**OWN, "max_draws": 0}, "align: max_draws is 0"),
        ({**OWN, "max_draws": 3, "method": "mask"}, "align: max_draws: masking asks about all tokens"),
        ({**OWN, "prefix": -1}, "align.prefix is -1"),
        ({**OWN, "max_new_tokens": 0}, "align: max_new_tokens is 0"),
        ({**OWN, "law": {"top_k": 0}}, "align: top_k is 0"),
        ({**OWN, "law": {"heat": 1}}, "align: .*heat"),
        ({**OWN, "law": {"temperature": "1"}}, "align: "),
        ({**OWN, "constraint": {"regex": "a("}}, r"regex 'a\(': unclosed group"),
        ({**OWN, "constraint": {"python": "x:y", "all_of": []}}, "constraint: .* is none; write an object"),
        ({**OWN, "constraint": {"regex": {1, 2}}}, "align: Object of type set is not JSON"),
        (json.dumps(OWN)[:-1], "align: not JSON: "),
        ("[1]", r"align: \[1\] is no object of settings"),
        ("[" * 100_000, "align: not JSON: "),
        (3, "align: 3 is no object of settings"),
    ],
    ids=str,
)
def test_settings_of_ours_that_cannot_be(own: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        validate(params(own))


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs", "logprob_token_ids", "prompt_logprob_token_ids"])
def test_a_plain_request_gets_no_weights_for_log_probabilities(name: str) -> None:
    value: Any = {"logprob_token_ids": [1], "prompt_logprob_token_ids": [[1]]}.get(name, 1)
    with pytest.raises(ValueError, match=f"{name}: this engine reports the logits"):
        validate(params(None, **{name: value}))


def test_plain_requests_may_ask_for_the_rest() -> None:
    validate(params(None, n=3, min_p=0.1, presence_penalty=1, logit_bias={1: 1.0}, bad_words=["a"], min_tokens=1))
    assert all(getattr(SamplingParams(), name) in (plain, None, []) for name, plain in PLAIN.items())


def test_what_is_left_out_is_the_requests_own() -> None:
    given = params(json.dumps({"constraint": REGEX}), temperature=0.7, top_k=3, top_p=0.9, seed=5, max_tokens=12)
    validate(given)
    found = read(given)
    assert found is not None
    assert found.request.law == Law(0.7, 3, 0.9)
    assert (found.request.seed, found.request.max_new_tokens, found.scale) == (5, 12, 0.7)
    assert json.loads(found.constraint or "") == REGEX
    law = {"temperature": 1.5, "target": "model"}
    found = read(params({**OWN, "law": law, "prefix": 3, "particle": 7, "name": "x"}, temperature=0, max_tokens=4))
    assert found is not None
    assert found.request.law == Law(1.5, target="model")
    assert (found.request.max_new_tokens, found.prefix, found.particle, found.name, found.scale) == (7, 3, 7, "x", 1.0)
    unlimited = read(params(max_tokens=None))  # vLLM fills it in after it has asked us
    assert unlimited is not None
    assert unlimited.request.max_new_tokens > 1 << 20
    assert read(params(None)) is None


def config(folder: Any, **changes: Any) -> Any:
    """As much of vLLM's configuration as the processor looks at."""
    model = SimpleNamespace(
        tokenizer=str(folder),
        tokenizer_revision=None,
        trust_remote_code=False,
        logprobs_mode="processed_logits",
        get_vocab_size=lambda: 5,
        try_get_generation_config=lambda: {"eos_token_id": 4},
    )
    vars(model).update({name: changes.pop(name) for name in list(changes) if name in vars(model)})
    own = {"align": {"predicates": []}}
    return SimpleNamespace(**{"model_config": model, "speculative_config": None, "additional_config": own, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"speculative_config": object()}, "speculative decoding draws tokens before they are weighed"),
        ({"logprobs_mode": "raw_logprobs"}, "logprobs_mode is 'raw_logprobs'.*'processed_logits'"),
        ({"logprobs_mode": SimpleNamespace(value="processed_logprobs")}, "logprobs_mode is 'processed_logprobs'"),
    ],
)
def test_engines_whose_weights_would_be_wrong_are_refused(changes: dict[str, Any], reason: str) -> None:
    for place in ((torch.device("cpu"), False), (SimpleNamespace(),)):
        with pytest.raises(ValueError, match=reason):
            AlignProcessor(config("nowhere", **changes), *place)


class Second:
    """The second runner's side: slots with their tokens, and batches of them in any order."""

    def __init__(self, folder: Any, slots: int = 4) -> None:
        self.tokens = torch.zeros((slots, 32), dtype=torch.int32)
        self.lengths = np.zeros(slots, dtype=np.int32)
        state = LogitsProcRequestState(
            device=torch.device("cpu"),
            max_num_reqs=slots,
            vocab_size=5,
            all_token_ids=SimpleNamespace(gpu=self.tokens),  # type: ignore[arg-type]
            prompt_len=SimpleNamespace(np=self.lengths),  # type: ignore[arg-type]
            prefill_len=None,  # type: ignore[arg-type]
            total_len=None,  # type: ignore[arg-type]
        )
        self.processor = AlignProcessor(config(folder), state)

    def add(self, slot: int, given: SamplingParams, prompt: Sequence[int]) -> bool:
        self.tokens[slot, : len(prompt)] = torch.tensor(prompt)
        self.lengths[slot] = len(prompt)
        return self.processor.add_request(slot, given)

    def draw(self, rows: Sequence[tuple[int, int]], logits: torch.Tensor) -> torch.Tensor:
        """Rows are (slot, tokens that count for the next); what is drawn is appended."""
        slots = [slot for slot, _ in rows]
        index, lengths = torch.tensor(slots), np.array([length for _, length in rows])
        context = LogitsContext(
            expanded_idx_mapping=index,
            idx_mapping=index,
            idx_mapping_np=np.array(slots),
            expanded_local_pos=torch.zeros_like(index),
            input_ids=index,
            pos=torch.tensor(lengths) - 1,
            seq_lens_upper_bound_np=lengths,
        )
        found = self.processor.apply(logits.clone(), context)
        for row, (slot, length) in enumerate(rows):
            if length >= self.lengths[slot]:
                self.tokens[slot, length] = int(found[row].argmax())
        return found


class First:
    """The first runner's side."""

    def __init__(self, folder: Any) -> None:
        self.processor = AlignProcessor(config(folder), torch.device("cpu"), False)
        self.said: dict[int, list[int]] = {}

    def add(self, row: int, given: SamplingParams, prompt: Sequence[int]) -> None:
        self.said[row] = []
        update = BatchUpdate(len(self.said), removed=[], added=[(row, given, list(prompt), self.said[row])], moved=[])
        self.processor.update_state(update)

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        found = self.processor.apply(logits.clone())
        for row, said in self.said.items():
            said.append(int(found[row].argmax()))
        return found


def laws(seed: int, rows: int) -> torch.Tensor:
    return torch.randn((rows, 5), generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("method", ["awrs", "mask", "rejection"])
def test_the_second_runner_draws_as_the_first(folder: Any, method: str) -> None:
    """Three of ours and a plain one, in slots 3, 0, 2 and 1, whose rows stand in another order at every step."""
    first, second = First(folder), Second(folder)
    own = {"constraint": {"regex": "[ab]{6,}"}, "method": method, "max_new_tokens": 9, "seed": 4}
    slots = {0: 3, 1: 0, 2: 2, 3: 1}  # row of the first to slot of the second
    for row, slot in slots.items():
        begun = [0, 1] if row == 2 else []  # a copy, with two tokens of the answer in its prompt
        given = params({**own, "particle": row, "prefix": len(begun)} if row < 3 else None, temperature=0.7)
        first.add(row, given, [2, 2, *begun])
        assert second.add(slot, given, [2, 2, *begun]) is (row < 3)
    for position in range(5):
        logits = laws(position, 4)
        expected = first.draw(logits)
        order = [(row + position) % 4 for row in range(4)]
        rows = [(slots[row], int(second.lengths[slots[row]]) + position) for row in order]
        found = second.draw(rows, logits[order])
        assert torch.equal(found, expected[order])
        for place, row in enumerate(order):
            assert (found[place] > -math.inf).sum() == (1 if row < 3 else 5)
            assert row < 3 or torch.equal(found[place], logits[row])


def test_the_second_runner_skips_prompts_and_takes_slots_anew(folder: Any) -> None:
    """In the middle of its prompt a row is left as it is; what enters a slot, ours or not, has nothing of the last."""
    second = Second(folder)
    own = {"constraint": {"regex": "a{2,4}"}, "max_new_tokens": 5, "seed": 0, "name": "one"}
    second.add(1, params(own), [0] * 10)
    logits = laws(7, 1)
    assert torch.equal(second.draw([(1, 4)], logits), logits)
    assert torch.equal(second.draw([(1, 9)], logits), logits)
    assert int(second.draw([(1, 10)], logits)[0].argmax()) == 0
    assert int(second.draw([(1, 11)], logits)[0].argmax()) == 0
    again = second.draw([(1, 10)], logits)  # preempted, and at an earlier place again
    assert int(again[0].argmax()) == 0

    assert second.add(1, params(None), [1]) is False
    assert torch.equal(second.draw([(1, 1)], logits), logits)
    assert second.add(1, params({**own, "constraint": {"regex": "b+"}, "name": "two"}), [1]) is True
    assert int(second.draw([(1, 1)], logits)[0].argmax()) == 1
    assert second.add(1, params({**own, "constraint": {"python": "os:getcwd"}, "name": "three"}), [1]) is True
    failed = second.draw([(1, 1)], logits)[0]
    assert (int(failed.argmax()), float(failed.max())) == (4, FAILED)
    assert second.add(1, params({**own, "constraint": {"regex": "c"}, "name": "four"}), [1]) is True
    dead = second.draw([(1, 1)], logits)[0]
    assert (int(dead.argmax()), float(dead.max())) == (4, DEAD)
    one, three, four, five = AlignWorker().align_pop(["one", "three", "four", "five"])
    assert one is not None
    assert three is not None
    assert four is not None
    assert len(one["evaluations"]) == 2  # the step that was repeated counts once
    assert three["error"] == "constraint: python 'os:getcwd' is not among the functions that may be called: none"
    assert "no token may follow" in four["why"]
    assert five is None
    AlignWorker().align_pop(["two"])
    assert AlignWorker().align_waiting() == 0


def test_the_tokenizers_end_and_the_models_end_answers(folder: Any) -> None:
    from align.decoding.vllm.processor import vocabulary_of

    model = config(folder, try_get_generation_config=lambda: {"eos_token_id": [3]}).model_config
    assert vocabulary_of(model).ends == {3, AutoTokenizer.from_pretrained(folder).eos_token_id}
    assert vocabulary_of(model, [3]).ends == {3}
