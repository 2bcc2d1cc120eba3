"""Decoding: samplers that follow a constraint or a reward, on any engine.

The floor between ``align.rewards`` and ``align.evals``. It is the home of constraints, adaptive weighted rejection
sampling, sequential Monte Carlo and Transfer-Q*; none of them has landed yet (see the methods table of the README).
"""
