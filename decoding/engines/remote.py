"""Rollouts of a model behind a server: ``align serve``, vLLM's own, or another with its ``/v1/completions``."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from align.decoding.law import Law

from .protocol import Rollout
from .rollouts import checked

TOGETHER = 16
"""Requests under way at a time."""
TRIES = 8
"""How often a request is sent to a server that is busy or cannot be reached: half a minute."""
LONGEST_WAIT = 10.0
"""Most seconds between two tries."""
SECONDS = 300.0
"""How long a rollout may take."""
BUSY = (429, 502, 503)
NEUTRAL = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""What has a say in the law, said in every request: else the server takes the served model's own defaults."""
PROBES = 300
"""Tokens of the text by which the two tokenizers are compared."""


class RemoteRollouts:
    """A model behind a server, as ``Rollouts``: one request a rollout, with token ids both ways.

    The server draws by its own means: from the same law and by the seed, but not the tokens that an engine here draws.
    ``Rollout.cached_tokens`` is what it tells of its cache, and 0 where it tells nothing; ``align serve`` tells, and
    vLLM's own server with ``--enable-prompt-tokens-details``.

    Args:
        url: ``http://host:port``; where several models are served, with ``#name`` of one.
        tokenizer: of the policy.
        key: that the server asks for, if any.

    Raises:
        ValueError: no such model, it has other tokens than the policy, or the server does not tell them.
        ConnectionError: the server cannot be reached, or refuses.
    """

    def __init__(self, url: str, tokenizer: Any, *, key: str | None = None) -> None:
        base, _, model = url.partition("#")
        self._base = base.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        served = {str(one["id"]): one for one in self._ask("/v1/models", tries=1)["data"]}
        if not model and len(served) == 1:
            (model,) = served
        if model not in served:
            raise ValueError(f"{url}: the server has {', '.join(served)}; name one, as in {self._base}#{min(served)}")
        self._model = model
        self._context: int | None = served[model].get("max_model_len")
        self._check(tokenizer)

    def rollouts(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        law: Law,
        seeds: Sequence[int],
        ends: Collection[int],
    ) -> list[Rollout]:
        """Go on with every prompt until an end token, the length or the context; see ``Rollouts``.

        Raises:
            ConnectionError: as above, after some tries.
        """
        settings: dict[str, Any] = {**NEUTRAL, "stop_token_ids": sorted(ends), "ignore_eos": True}
        if law.top_k == 1:
            settings["temperature"] = 0.0
        else:
            settings |= {"temperature": law.temperature, "top_k": law.top_k or 0, "top_p": law.top_p or 1.0}

        def one(prompt: Sequence[int], seed: int) -> Rollout:
            length = max_new_tokens if self._context is None else min(max_new_tokens, self._context - len(prompt))
            if length < 1:
                return Rollout((), False)
            reply = self._complete({"prompt": list(prompt), "max_tokens": length, "seed": seed, **settings})
            tokens = tuple(reply["choices"][0]["token_ids"])
            cached = (reply["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            return Rollout(tokens, bool(tokens) and tokens[-1] in ends, cached)

        pairs = list(zip(checked(prompts, seeds, max_new_tokens), seeds, strict=True))
        with ThreadPoolExecutor(TOGETHER) as threads:
            futures = [threads.submit(one, prompt, seed) for prompt, seed in pairs]
            try:
                return [future.result() for future in futures]
            finally:
                threads.shutdown(wait=False, cancel_futures=True)

    def _check(self, tokenizer: Any) -> None:
        """A text of many tokens, special ones among them, is the same ids on both sides."""
        known = sorted(tokenizer.get_vocab().values())
        few = min(PROBES, (self._context or 8 * PROBES) // 8)
        sample = [*tokenizer.all_special_ids, *known[:: len(known) // few + 1]]
        text = tokenizer.decode(sample[:few])
        own = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        reply = self._complete({"prompt": text, "max_tokens": 1, "add_special_tokens": False})
        theirs = reply["choices"][0].get("prompt_token_ids")
        if theirs is None:
            raise ValueError(
                f"{self._base}: the server gives no token ids, so its rollouts cannot be gone on with; vLLM and "
                "align serve do"
            )
        if theirs != own:
            raise ValueError(
                f"{self._base}: {self._model} has other tokens than the policy; a baseline goes on from the policy's "
                "own tokens, so serve one that was trained from it, or that has the same tokenizer"
            )

    def _complete(self, body: Mapping[str, Any]) -> Any:
        return self._ask("/v1/completions", {"model": self._model, "return_token_ids": True, **body})

    def _ask(self, path: str, body: Mapping[str, Any] | None = None, *, tries: int = TRIES) -> Any:
        """The reply; a server that is busy or away is asked again."""
        data, wait = None if body is None else json.dumps(body).encode(), 0.25
        while True:
            tries -= 1
            try:
                with urlopen(Request(self._base + path, data, self._headers), timeout=SECONDS) as reply:
                    return json.load(reply)
            except HTTPError as error:
                said = error.read().decode(errors="replace").strip()
                if error.code not in BUSY or not tries:
                    raise ConnectionError(f"{self._base}{path}: {error.code} {error.reason}: {said}") from None
                asked = error.headers.get("Retry-After", "")
                wait = float(asked) if asked.isdigit() else wait
            except TimeoutError:
                raise ConnectionError(f"{self._base}{path}: no reply within {SECONDS:g} seconds") from None
            except (OSError, HTTPException, json.JSONDecodeError) as error:
                if not tries:
                    reason = getattr(error, "reason", error)
                    raise ConnectionError(f"{self._base}{path}: {reason or type(error).__name__}") from None
            time.sleep(min(wait, LONGEST_WAIT))
            wait *= 2
