"""``align serve``: vLLM's OpenAI-compatible server, with AWRS and SMC in it, fit to be left running.

- ``models``     which folder to serve.
- ``launch``     settings, log lines, and the start of the server's process; ``server`` is that process.
- ``options``    what the operator decides, from the command line to the routes.
- ``plugin``     what vLLM loads: routes, state, signals.
- ``gate``       before every route: API key, size of the body, draining. ``admission``: how many particles at a time.
- ``wire``       what requests may say; ``replies``: what they get. ``errors``: what is refused, and how it is said.
- ``checker``    constraints are compiled in a process that can be killed before anybody else sees them.
- ``streams``    server-sent events. ``events``: what happens to particles, as such.
- ``work``       one request from its settings to its answer. ``rewards``: scores by name. ``metrics``: Prometheus.

vLLM is imported by ``server``, ``plugin``, ``routes`` and ``work`` alone.
"""
