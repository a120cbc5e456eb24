"""Completions from a server with OpenAI's completions API: vLLM, SGLang, llama.cpp, `transformers serve`."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

from cropi.config import ServerConfig
from cropi.console import warn, warn_once
from cropi.errors import PolicyError
from cropi.policy import Policy
from cropi.rollouts.generation import Sampling
from cropi.seeds import derived_seed

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0  # between tries, doubling
SEEDS = 2**31


class ServerGenerator:
    """Draws completions from a server that has the same weights as the policy; the policy's tokenizer counts tokens.

    Requests that fail because the server is away, busy or broken (no connection, status 408, 429 or 5xx) are tried
    again, at growing intervals, until the server has answered nothing for `patience` seconds. Where a server returns
    token ids (vLLM), these are the completion; else its text is tokenised, which need not give the sampled tokens
    back, and an end-of-sequence token follows where it says that it stopped by itself. `retokenized` counts
    completions whose number of tokens is then not the server's own.

    Errors: PolicyError for what a server refuses, for prompts that do not survive as text, and where it stays away;
    what was collected before is kept.
    """

    def __init__(self, policy: Policy, config: ServerConfig) -> None:
        self._policy, self._config = policy, config
        self._session, self._stop = threading.local(), threading.Event()
        self._answered = time.monotonic()
        self.retokenized = 0

    def __call__(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[list[int]]:
        """One completion per prompt, in the order given: token ids up to and with the first end-of-sequence token."""
        written = [self._written(list(prompt)) for prompt in prompts]
        self._answered = time.monotonic()
        self._stop.clear()
        threads = ThreadPoolExecutor(self._config.concurrency)
        jobs = [
            threads.submit(self._complete, prompt, sampling, derived_seed(seed, number) % SEEDS)
            for number, prompt in enumerate(written)
        ]
        try:
            completions = [job.result() for job in jobs]
        finally:  # after an error or an interrupt, requests that are under way are left to themselves
            self._stop.set()
            threads.shutdown(wait=False, cancel_futures=True)
        if self.retokenized:
            warn_once(
                "the server's texts do not tokenise back into the tokens that it sampled for some completions; the "
                "stored ones are those of the text (collect.server)"
            )
        return completions

    def _written(self, prompt: list[int]) -> list[int] | str:
        if self._config.prompts == "tokens":
            return prompt
        text = str(self._policy.tokenizer.decode(prompt))
        if self._policy.tokenizer(text=text)["input_ids"] != prompt:
            raise PolicyError(
                "a prompt is other tokens when it is sent as text and tokenised again (a template that begins with the "
                "token that the tokenizer puts first, say)",
                where="collect.server.prompts",
                fix="use a server that takes token ids, and set it to tokens.",
            )
        return text

    def _complete(self, prompt: list[int] | str, sampling: Sampling, seed: int) -> list[int]:
        body = {
            "model": self._config.model,
            "prompt": prompt,
            "max_tokens": sampling.max_completion_length,
            "temperature": 0.0 if sampling.temperature is None else sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
            **self._config.body,
        }
        answer = self._post(body)
        try:
            choice = answer["choices"][0]
            text, reason, ids = choice["text"], choice.get("finish_reason"), choice.get("token_ids")
            count = (answer.get("usage") or {}).get("completion_tokens")
        except (KeyError, IndexError, TypeError):
            raise self._refused(f"its answer is no completion: {str(answer)[:200]}") from None
        return self._tokens(str(text), reason, ids, count)[: sampling.max_completion_length]

    def _tokens(self, text: str, reason: str | None, ids: list[int] | None, count: int | None) -> list[int]:
        eos = set(self._policy.eos_ids)
        if ids is None:
            found = list(self._policy.tokenizer(text=text, add_special_tokens=False)["input_ids"])
            if reason == "stop" and not (found and found[-1] in eos):
                found.append(self._policy.tokenizer.eos_token_id)
            # servers differ in whether they count the token that ends a completion
            if count is not None and count not in (len(found), len(found) - 1):
                self.retokenized += 1
        else:
            found = [int(token) for token in ids]
        first = next((place for place, token in enumerate(found) if token in eos), len(found))
        return found[: first + 1]

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        """The server's answer, however often it takes."""
        wait, said = FIRST_WAIT_S, False
        while True:
            try:
                response = self._connection().post(
                    f"{self._config.url.rstrip('/')}/completions", json=body, timeout=self._config.timeout
                )
                if response.status_code == 200:
                    self._answered = time.monotonic()
                    return dict(response.json())
                trouble = f"status {response.status_code}: {response.text[:200]}"
                if response.status_code not in (408, 429) and response.status_code < 500:
                    raise self._refused(trouble)
            except (requests.RequestException, ValueError) as error:  # ValueError: an answer cut short
                trouble = f"{type(error).__name__}: {error}"[:200]
            if time.monotonic() - self._answered > self._config.patience:
                raise PolicyError(
                    f"the server has not answered for {self._config.patience:g} s ({trouble})",
                    where=f"collect.server.url {self._config.url}",
                    fix="start it again and run the same command: what was collected is kept.",
                )
            if not said:
                warn(f"{self._config.url}: {trouble}; trying again")
                said = True
            if self._stop.wait(wait * random.uniform(0.5, 1.0)):
                raise PolicyError("collection has ended", where=f"collect.server.url {self._config.url}")
            wait = min(2 * wait, LONGEST_WAIT_S)

    def _connection(self) -> requests.Session:
        """One per thread: a session is not made for several."""
        if not hasattr(self._session, "it"):
            session = requests.Session()
            key = os.environ.get(self._config.api_key_env) if self._config.api_key_env else None
            if key:
                session.headers["Authorization"] = f"Bearer {key}"
            self._session.it = session
        return self._session.it

    def _refused(self, what: str) -> PolicyError:
        return PolicyError(
            f"the server refuses a request: {what}",
            where=f"collect.server.url {self._config.url}",
            fix="check the URL (it ends in /v1), the model's name there, and collect.server.body.",
        )
