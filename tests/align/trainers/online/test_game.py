"""A game without a best answer through the whole trainer: sampling, annotator, loss, optimiser, a tiny transformer.

Six tokens; ``a`` beats ``b``, ``b`` beats ``c`` and ``c`` beats ``a``, and all three beat whatever else the model may
say. Answers have one token. The equilibria are those of ``align.evals.exact.games``, for the model's own next-token
law before training as reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from align.data.prompts import ROW_ID
from align.evals.exact.games import against, nash
from align.losses import Loss
from align.losses.rows import Rows
from align.losses.selfplay import mixture_logps
from align.models.scoring import score
from align.rewards.annotators import Verdicts
from align.trainers.grouped import Group
from align.trainers.online import OnlineTrainer

WORDS = ["a", "b", "c", "x", "<pad>", "<end>"]
WINS = {("a", "b"): 0.9, ("b", "c"): 0.7, ("c", "a"): 0.8}
TAU = 0.25
CLOSE = 0.05


def wins(first: str, second: str) -> float:
    if (first, second) in WINS:
        return WINS[first, second]
    if (second, first) in WINS:
        return 1 - WINS[second, first]
    return 0.5 + 0.3 * ((first in "abc" and bool(first)) - (second in "abc" and bool(second)))


class Game:
    """Says what ``wins`` says."""

    name = "game"

    def __call__(
        self, prompts: Sequence[Any], answers: Sequence[Sequence[Any]], columns: Mapping[str, Any] | None = None
    ) -> Verdicts:
        table = [[[wins(one, other) for other in own] for one in own] for own in answers]
        preference = torch.tensor(table, dtype=torch.float64)
        return Verdicts(preference, preference.logit(), [])


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="x"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", unk_token="x")


def law(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([[WORDS.index("x")]])).logits[0, -1].double().softmax(-1)


@pytest.fixture
def play(
    trainer_of: Callable[..., OnlineTrainer],
    letters: PreTrainedTokenizerFast,
    make_tiny_model: Callable[..., LlamaForCausalLM],
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The game's table by tokens, the law before training and the law after it."""

    def run(loss: Any, rate: float = 2.5e-2, inner: int = 1, penalty: float = 0.0, **drawing: Any) -> Any:
        own = {"vocab_size": 6, "eos_token_id": 5, "pad_token_id": 4, "bos_token_id": None, "initializer_range": 0.3}
        model = make_tiny_model(seed=1, num_hidden_layers=1, **own)
        before = law(model)
        texts = [letters.decode([token], skip_special_tokens=True) for token in range(6)]
        table = torch.tensor([[wins(one, other) for other in texts] for one in texts], dtype=torch.float64)
        trainer = trainer_of(
            model=model,
            tokenizer=letters,
            annotator=Game(),
            loss=loss if isinstance(loss, Loss) else Loss.of(loss, beta=TAU),
            inner_steps=inner,
            kl_penalty=penalty,
            train_dataset=Dataset.from_dict({"prompt": ["x"] * 16, ROW_ID: [str(n) for n in range(16)]}),
            drawing={"answers": 8, "max_new_tokens": 1, "batch_size": 128, **drawing},
            arguments={
                "per_device_train_batch_size": 16,
                "max_steps": 36,
                "learning_rate": rate,
                "lr_scheduler_type": "linear",
                "adam_beta1": 0.0,  # momentum orbits where preferences run in a circle
                "weight_decay": 0.0,
                "logging_steps": 18,
            },
        )
        trainer.train()
        return table, before, law(trainer.model)

    return run


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().sum() / 2)


def test_online_ipo_finds_the_equilibrium(play: Any) -> None:
    table, mu, found = play("ipo")
    exact = nash(table[None], mu[None], TAU)[0]
    assert distance(mu, exact) > 4 * CLOSE
    assert distance(found, exact) < CLOSE


def test_the_mixture_of_ipo_md_is_the_equilibrium_of_a_stronger_pull(play: Any) -> None:
    """With half of the reference, of tau / (1 - 1/2); the policy itself is beyond it."""
    table, mu, found = play("ipo", mixture=0.5)
    exact = nash(table[None], mu[None], 2 * TAU)[0]
    mixed = mixture_logps(found.log(), mu.log(), coefficient=0.5).exp()
    assert distance(mixed, exact) < CLOSE
    assert distance(found, exact) > CLOSE


def test_offline_answers_are_held_against_the_reference(play: Any) -> None:
    """A mixture of 1: pairs of the reference, and no game."""
    table, mu, found = play("ipo", mixture=1.0)
    borda = torch.softmax(mu.log() + against(table[None], mu[None])[0] / TAU, -1)
    assert distance(found, borda) < CLOSE
    assert distance(found, nash(table[None], mu[None], TAU)[0]) > CLOSE


def test_online_dpo_goes_elsewhere(play: Any) -> None:
    table, mu, found = play("dpo")
    assert distance(found, nash(table[None], mu[None], TAU)[0]) > 2 * CLOSE


def test_sppo_finds_it_too(play: Any) -> None:
    """The gradient of IPO; means over the seven other answers would find that of 7/8 of tau."""
    table, mu, found = play("sppo")
    exact, weaker = (nash(table[None], mu[None], tau)[0] for tau in (TAU, 7 / 8 * TAU))
    assert distance(found, exact) < CLOSE
    assert distance(found, exact) < distance(found, weaker)


def test_mdpo_with_a_penalty_finds_it_too(play: Any) -> None:
    """Win rates less tau times the log-ratio, several steps on the same answers within a trust region."""
    table, mu, found = play(Loss.of("mdpo", step_size=2.0), rate=2e-3, inner=3, penalty=TAU)
    exact, weaker = (nash(table[None], mu[None], tau)[0] for tau in (TAU, 7 / 8 * TAU))
    assert distance(found, exact) < CLOSE
    assert distance(found, exact) < distance(found, weaker)  # 7/8: the answer itself in the mean of eight penalties


@pytest.mark.parametrize(
    ("name", "times"), [("ipo", 4 / TAU), ("sppo", 4 / TAU), ("gpo", 4 / TAU), ("nash_md_pg", 1), ("mdpo", 1)]
)
def test_two_answers_are_enough_for_the_gradient_of_the_game(
    trainer_of: Callable[..., OnlineTrainer],
    letters: PreTrainedTokenizerFast,
    make_tiny_model: Callable[..., LlamaForCausalLM],
    name: str,
    times: float,
) -> None:
    """Over all pairs by their probabilities it is that of P(pi > pi') - tau KL(pi | mu), pi' held, up to a factor."""
    own = {"vocab_size": 6, "eos_token_id": 5, "pad_token_id": 4, "bos_token_id": None, "initializer_range": 0.3}
    trainer = trainer_of(
        model=make_tiny_model(seed=1, num_hidden_layers=1, **own),
        tokenizer=letters,
        loss=Loss.of("mdpo", step_size=2.0) if name == "mdpo" else Loss.of(name, beta=TAU),
        inner_steps=2 if name == "mdpo" else 1,
        kl_penalty=TAU if name == "mdpo" else 0.0,
    )
    trainer.model.load_state_dict(make_tiny_model(seed=2, num_hidden_layers=1, **own).state_dict())
    prompt, pairs = [WORDS.index("x")], [(i, j) for i in range(6) for j in range(6)]
    texts = [letters.decode([token], skip_special_tokens=True) for token in range(6)]
    table = torch.tensor([[wins(one, other) for other in texts] for one in texts])
    logps, mu = (
        model.eval()(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        for model in (trainer.model, trainer.ref_model)
    )
    known, policy = logps.tolist(), logps.detach().exp()
    worth = (table.logit() if name == "gpo" else table) @ policy
    wanted = times * (logps.exp() @ worth - TAU * (logps.exp() * (logps - mu.detach())).sum())
    wanted.backward()  # type: ignore[no-untyped-call]
    gradient = {name: value.grad.clone() for name, value in trainer.model.named_parameters()}
    trainer.model.zero_grad()

    groups = []
    for i, j in pairs:
        preference = torch.tensor([[0.5, table[i, j]], [table[j, i], 0.5]])
        group = Group.of(prompt, [[i], [j]], preference, preference.logit())
        groups.append(replace(group, behaviour=[[known[i]], [known[j]]]))
    batch = trainer.lay_out(groups)
    rows = Rows.of(batch, batch["win_rates"].numel())
    with torch.no_grad():
        reference = score(trainer.ref_model, rows)
    found = trainer._output(rows, score(trainer.model, rows), reference, batch)
    assert found is not None
    chances = torch.stack([policy[i] * policy[j] for i, j in pairs])
    if name == "mdpo":  # the tokens of both answers
        chances = chances[rows.answer % len(pairs)] / 2
    (-found.loss * chances).sum().backward()
    for place, value in trainer.model.named_parameters():
        torch.testing.assert_close(value.grad, gradient[place], rtol=1e-3, atol=1e-5, msg=place)
