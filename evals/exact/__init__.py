"""The exact lab: finite worlds whose aligned optimum is known, and every loss trained to it.

Samplers are run in every way that they can go.

- ``worlds``     prompts and answers that can be enumerated, a tabular policy, rewards and Bradley-Terry labels.
- ``games``      preferences without a reward behind them: Nash equilibria, and what IPO-MD and Nash-MD reach.
- ``descent``    training on a loss's exact expected value, from several starts.
- ``solvers``    the exact side: roots, Newton's method, SLSQP.
- ``targets``    for each loss what it asks for: closed form, scalar root, solver, or none and why (by kind of loss in
  ``pair_targets`` with ``pair_optima``, ``logic_targets``, ``thumbs_targets``, ``selfplay_targets`` and
  ``reward_targets``).
- ``transform_targets``  the same for log-sigmoid-centred rewards and their logic, as rewards of a policy.
- ``pal_targets``  the same for rewards of annotators who disagree, known and new.
- ``decoding_targets``  the same for samplers under a constraint, on ``chances``: a procedure run once for every branch
  that its randomness can take. ``weighted`` has the published estimators that are not shipped.
- ``verify``     all of them against the truth, on a device and in a dtype: ``align verify``.
- ``laws``       what holds for all inputs, checked on drawn ones; ``law_checks`` has a function for each.
- ``rows``       what is reported of each.
"""
