"""Evals: what a model, a reward or a decoder is worth. Every number comes with its n and its interval.

Suites compare an aligned model (after, the policy) with the model it came from (before, the reference) on
held-out data. Each returns one JSON-able dict: ``suite, schema, n, metrics, rows, settings``, where a metric is
``{value, low, high, n}`` and ``rows`` keep what it was computed from.

- ``preference``    does the implicit reward rank the chosen answer first? accuracy (a tie is half), margin, ties.
- ``thumbs``        does the implicit reward tell thumbs up from thumbs down? AUC, accuracy, mean reward of each.
- ``displacement``  what happened to the log-probs of the held-out pairs: did the chosen answers fall too, and what
                    gained?
- ``generation``    answers before and after, judged by a reward: win rate, length, repetition, KL to the reference.
- ``reward``        does a reward model rank or rate held-out answers as people did? ``pal``: as each of them did?
- ``calibration``   are stated probabilities of pairs right?
- ``judges``        do annotators say what people say, and what else than the answers moves them?
- ``pluralism``     whom does a reward serve? ``rewardbench``: scores with that benchmark's weights.
- ``cycles``        preferences that run in a circle, where no reward passes (K - 1)/K.
- ``goals``         several rewards at once: each before and after, and the share of answers that are good in all.
- ``answers``       answers of several models against a baseline's, whoever judged them.
- ``frontier``      reward against KL to the reference, of models and of what decoders make of them.

What they stand on:

- ``statistics``    percentile bootstrap, by row or by prompt, exact where all say the same of a share; exactly
                    invariant to the order of the rows.
- ``row_values``    what each metric is the mean of, row by row; ``difference``: two results against each other by it.
- ``sampling``      answers that depend on the prompt and the seed, not on the batch they were drawn in.
- ``kl``            log-ratios of sampled answers, and what they do and do not estimate.
- ``length_control``  win rate at equal length, by a logistic model of the preference.
- ``best_of``       best of n from draws of the reference: reward over subsets, KL bound and estimator.

Before and after with a LoRA, the reference being the same model with its adapters off::

    draw = partial(sample, model, tokenizer, prompt_ids, eos_ids={tokenizer.eos_token_id}, max_new_tokens=96, seed=0)
    after = draw(temperature=0.7)
    with model.disable_adapter():
        before = draw(temperature=0.7)
    ratios = log_ratios(prompt_ids, draw(temperature=1.0), policy_logps, reference_logps, temperature=1.0)
    result = compare(prompts, before, after, load_reward("align.rewards.rules:everyday_answer"), kl=ratios)
"""
