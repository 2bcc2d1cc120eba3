"""Points of the frontier that a decoder makes of the reference: best of n, Transfer-Q*, AWRS-SMC with a reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from align.controlled import reward_potential
from align.decoding.constraints import Vocabulary
from align.decoding.engines import TransformersEngine
from align.decoding.generate import generate
from align.decoding.guided import Guided, Query, TransferQ
from align.decoding.request import Answer, Request
from align.decoding.transfer_q import transfer_q
from align.errors import AlignError
from align.evals.best_of import best_of_judged, best_of_kl, best_of_kl_bound, best_of_reward
from align.evals.frontier import (
    BEST_OF_BOUND,
    BEST_OF_KL,
    DECODER_KL,
    WEIGHTED_KL,
    decoder_log_ratio,
    point,
    weighted_mean,
    weighted_point,
)
from align.evals.sampling import Sample
from align.evals.statistics import Estimate
from align.models.ends import end_tokens
from align.models.load import LoadedModel
from align.tracking.progress import progress

from .drawn import Reader
from .models import computing_in
from .prompts import Prompts, Rewards


def best_of_points(
    prompts: Prompts,
    answers: Sequence[Sample],
    rewards: Sequence[float],
    counts: Sequence[int],
    judged: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """A point for each n.

    Args:
        answers, rewards: max(n) draws of the reference to each prompt, in a row.
        counts: the n.
        judged: what another reward says of them.
    """
    copies = len(answers) // len(prompts.rows)
    parts = [slice(start, start + copies) for start in range(0, len(answers), copies)]
    lengths = [sum(len(answer.tokens) for answer in answers[part]) / copies for part in parts]
    return [
        point(
            "best-of-n",
            f"best of {n}",
            [
                {
                    "row_id": row_id,
                    "prompt": prompt,
                    "reward": best_of_reward(rewards[part], n),
                    "kl": best_of_kl(rewards[part], n),
                    "tokens": n * length,
                }
                | ({} if judged is None else {"judge": best_of_judged(rewards[part], judged[part], n)})
                for row_id, prompt, part, length in zip(prompts.ids, prompts.texts, parts, lengths, strict=True)
            ],
            BEST_OF_KL,
            settings={"n": n, "draws": copies},
            kl_bound={**Estimate(best_of_kl_bound(n), None, None, len(parts)).as_dict(), "how": BEST_OF_BOUND},
        )
        for n in counts
    ]


def weighted_points(
    reference: Reader,
    prompts: Prompts,
    rewards: Rewards,
    strengths: Sequence[float],
    particles: int,
    judge: Rewards | None = None,
) -> list[dict[str, Any]]:
    """A point of AWRS-SMC for each strength of the reward; answers that max_new_tokens cuts are judged as they are.

    Raises:
        AlignError: the model's cache cannot be forked, or the reward fails.
    """
    engine, vocabulary = engine_of(reference.name, reference.loaded)
    found = []
    for strength in strengths:
        key = reference.key(smc=strength, particles=particles, reward=rewards.name, rule=rewards.digest)
        kept = reference.kept
        missing = kept.missing(key, len(prompts.rows))
        requests = [
            Request(
                reference.ids[row],
                None,
                particles=particles,
                seed=reference.seed * 1_000_003 + row,
                max_new_tokens=prompts.max_new_tokens,
                potential=reward_potential(
                    rewards.scorer,
                    f"reward {rewards.name}",
                    strength,
                    prompts.rows[row].prompt,
                    {name: values[row] for name, values in prompts.columns.items()},
                    vocabulary,
                ),
            )
            for row in missing
        ]
        with (
            progress(f"AWRS-SMC at strength {strength:g}", len(missing)) as advance,
            computing_in(reference.compute, reference.loaded.model),
        ):

            def keep(place: int, answer: Answer) -> None:
                kept.add(key, {missing[place]: _particles(answer, vocabulary)})  # noqa: B023
                advance(1)

            generate(engine, requests, vocabulary, on_answer=keep)
        rows = []
        for number, entry in enumerate(kept.of(key, len(prompts.rows))):
            if entry["reason"]:
                raise AlignError(f"AWRS-SMC, prompt {number + 1}: {entry['reason']}")
            scores = rewards.of(prompts, [number] * len(entry["texts"]), entry["texts"])
            reward, kl = weighted_point(entry["log_weights"], scores, entry["log_normaliser"], strength)
            others = judge and judge.of(prompts, [number] * len(entry["texts"]), entry["texts"])
            rows.append(
                {"row_id": prompts.ids[number], "prompt": prompts.texts[number]}
                | {"reward": reward, "kl": kl, "tokens": entry["tokens"]}
                | {"ess": entry["ess"], "text": entry["drawn"]}
                | ({"judge": weighted_mean(entry["log_weights"], others)} if others else {})
            )
        settings = {"strength": strength, "particles": particles}
        found.append(point("smc", f"AWRS-SMC, strength {strength:g}", rows, WEIGHTED_KL, settings=settings))
    return found


def _particles(answer: Answer, vocabulary: Vocabulary) -> dict[str, Any]:
    result = answer.result
    if result is None or result.drawn is None:
        return {"reason": answer.reason or "nothing survived"}
    alive = [sample for sample in result.samples if sample.log_weight > -math.inf]
    return {
        "reason": "",
        "texts": [vocabulary.text(sample.tokens) for sample in alive],
        "log_weights": [sample.log_weight for sample in alive],
        "log_normaliser": result.log_normaliser,
        "ess": result.ess,
        "drawn": vocabulary.text(result.drawn.tokens),
        "tokens": sum(len(sample.tokens) for sample in result.samples),
    }


def transfer_points(
    reference: Reader,
    baseline: Reader,
    prompts: Prompts,
    rewards: Rewards,
    alphas: Sequence[float],
    candidates: int,
    length: int,
    judge: Rewards | None = None,
) -> list[dict[str, Any]]:
    """A point of Transfer-Q* for each alpha: the reference's tokens, drawn by where the aligned model goes from them.

    There is one greedy rollout a candidate, so that a candidate's value, and with it the law of every token, is a
    function of the text so far.

    Raises:
        AlignError: the two read other tokens, a model's cache cannot be forked, or the reward fails.
    """
    if reference.tokens != baseline.tokens:
        raise AlignError(
            f"transfer-q: {baseline.name} and {reference.name} read other tokens; leave transfer-q out of points"
        )
    policy, vocabulary = engine_of(reference.name, reference.loaded)
    aligned, _ = engine_of(baseline.name, baseline.loaded)
    found = []
    for alpha in alphas:
        settings = {"alpha": alpha, "candidates": candidates, "rollout_length": length}
        key = reference.key(transfer_q=baseline.weights, **settings, reward=rewards.name, rule=rewards.digest)
        kept = reference.kept
        missing = kept.missing(key, len(prompts.rows))

        def rewarded(places: Sequence[int], answers: Sequence[tuple[int, ...]]) -> list[float]:
            texts = [vocabulary.text(tokens) for tokens in answers]
            return rewards.of(prompts, [missing[place] for place in places], texts)  # noqa: B023

        with (
            progress(f"Transfer-Q* with {baseline.name} at alpha {alpha:g}", len(missing)) as advance,
            computing_in(reference.compute, reference.loaded.model),
        ):

            def keep(place: int, answer: Guided) -> None:
                kept.add(key, {missing[place]: _guided(answer, vocabulary, alpha)})  # noqa: B023
                advance(1)

            transfer_q(
                policy,
                aligned,
                rewarded,
                [
                    Query(reference.ids[row], reference.seed * 1_000_003 + row, prompts.max_new_tokens)
                    for row in missing
                ],
                vocabulary,
                TransferQ(candidates=candidates, length=length, alpha=alpha, choice="drawn"),
                on_answer=keep,
            )
        rows = []
        for number, entry in enumerate(kept.of(key, len(prompts.rows))):
            if entry["reason"]:
                raise AlignError(f"Transfer-Q*, prompt {number + 1}: {entry['reason']}")
            names = ("reward", "kl", "tokens", "text", "finished")
            rows.append(
                {"row_id": prompts.ids[number], "prompt": prompts.texts[number]}
                | {name: entry[name] for name in names}
                | ({"judge": judge.of(prompts, [number], [entry["text"]])[0]} if judge else {})
            )
        label = f"Transfer-Q* with {baseline.name}, alpha {alpha:g}"
        found.append(point("transfer-q", label, rows, DECODER_KL, settings=settings))
    return found


def _guided(answer: Guided, vocabulary: Vocabulary, alpha: float) -> dict[str, Any]:
    if answer.reason:
        return {"reason": answer.reason}
    ratios = [decoder_log_ratio(step.log_probs, step.values, alpha, step.chosen) for step in answer.steps]
    return {
        "reason": "",
        "reward": answer.reward,
        "kl": math.fsum(ratios),
        "tokens": answer.costs.policy_tokens + answer.costs.rollout_tokens,
        "text": vocabulary.text(answer.tokens),
        "finished": answer.finished,
    }


def engine_of(name: str, loaded: LoadedModel) -> tuple[TransformersEngine, Vocabulary]:
    """A decoder's engine, and the vocabulary.

    Raises:
        AlignError: the model's cache cannot be forked, or its tokens cannot be read.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    columns = int(model.get_output_embeddings().weight.shape[0])
    try:
        vocabulary = Vocabulary.of(tokenizer, size=columns, ends=end_tokens(model, tokenizer))
        return TransformersEngine(model), vocabulary
    except ValueError as error:
        raise AlignError(f"{name}: {error}") from error
