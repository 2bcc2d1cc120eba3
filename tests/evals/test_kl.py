"""The KL estimate against the exact KL of a world small enough to enumerate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from statistics import mean, stdev

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from align.evals.kl import LogRatios, log_ratios
from align.evals.sampling import Sample, sample
from align.losses.types import SequenceLogps

EOS, VOCABULARY = 4, 5
PROMPT = [0, 2, 3]


@pytest.fixture(scope="module")
def policy(make_tiny_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return make_tiny_model(seed=1, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=EOS, pad_token_id=EOS)


@pytest.fixture(scope="module")
def reference(make_tiny_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return make_tiny_model(seed=2, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=EOS, pad_token_id=EOS)


def sequence_logp(model: LlamaForCausalLM, prompt: Sequence[int], answer: Sequence[int], temperature: float = 1.0):
    """``log p(answer | prompt)`` by one plain forward."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0].double() / temperature
    steps = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return steps[range(len(answer)), list(answer)].sum()


def scorer(model: LlamaForCausalLM) -> Callable[..., SequenceLogps]:
    """Log-probs of completions, each different pair scored once."""
    known: dict[tuple[int, ...], torch.Tensor] = {}

    def score(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> SequenceLogps:
        totals = []
        for prompt, answer in zip(prompts, completions, strict=True):
            key = (len(prompt), *prompt, *answer)
            if key not in known:
                known[key] = sequence_logp(model, prompt, answer)
            totals.append(known[key])
        return SequenceLogps(torch.stack(totals), torch.tensor([len(answer) for answer in completions]))

    return score


def enumerated_ratio(policy: LlamaForCausalLM, reference: LlamaForCausalLM, temperature: float) -> float:
    """Exact ``E_{y ~ pi_T}[log pi(y) - log pi_ref(y)]`` over all answers of at most two tokens; the KL at T = 1."""
    answers = [[EOS], *([a, b] for a in range(VOCABULARY) if a != EOS for b in range(VOCABULARY))]
    weights = torch.stack([sequence_logp(policy, PROMPT, answer, temperature) for answer in answers]).exp()
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-5)
    ratios = [sequence_logp(policy, PROMPT, answer) - sequence_logp(reference, PROMPT, answer) for answer in answers]
    return float((weights * torch.stack(ratios)).sum())


@pytest.fixture(scope="module")
def draw(policy: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[int, float], list[Sample]]:
    @cache
    def answers(count: int, temperature: float) -> list[Sample]:
        return sample(
            policy,
            tiny_tokenizer,
            [PROMPT] * count,
            eos_ids={EOS},
            max_new_tokens=2,
            temperature=temperature,
            seed=0,
            batch_size=1000,
        )

    return answers


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_estimate_meets_the_enumeration(policy, reference, draw, temperature: float):
    """4,000 answers: within 4 standard errors of the exact expectation, at T = 1 and at another T."""
    samples = draw(4000, temperature)
    ratios = log_ratios(
        [PROMPT] * 4000, samples, scorer(policy), scorer(reference), temperature=temperature, batch_size=512
    )
    spread = stdev(ratios.nats) / 4000**0.5
    assert mean(ratios.nats) == pytest.approx(enumerated_ratio(policy, reference, temperature), abs=4 * spread)
    assert ratios.tokens == [len(answer.tokens) for answer in samples]
    assert ratios.temperature == temperature


def test_only_temperature_one_gives_the_kl(policy, reference, draw):
    """Answers at T = 0.4 miss the exact KL by far more than their own standard error: the reason for drawing at 1."""
    kl = enumerated_ratio(policy, reference, 1.0)
    assert kl > 0.05
    samples = draw(4000, 0.4)
    ratios = log_ratios([PROMPT] * 4000, samples, scorer(policy), scorer(reference), temperature=0.4)
    assert abs(mean(ratios.nats) - kl) > 10 * stdev(ratios.nats) / 4000**0.5


def test_a_policy_has_no_divergence_from_itself(policy, draw):
    samples = draw(5, 1.0)
    ratios = log_ratios([PROMPT] * 5, samples, scorer(policy), scorer(policy), temperature=1.0, batch_size=2)
    assert ratios == LogRatios([0.0] * 5, [len(answer.tokens) for answer in samples], 1.0)


def test_refuses_truncated_scores(policy):
    def truncating(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> SequenceLogps:
        return scorer(policy)(prompts, [answer[:1] for answer in completions])

    with pytest.raises(ValueError, match="were they truncated"):
        log_ratios([PROMPT], [Sample([1, 2], "", False)], scorer(policy), truncating, temperature=1.0)
