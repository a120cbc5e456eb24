"""Completions from a server with OpenAI's completions API: vLLM, SGLang, llama.cpp, `transformers serve`."""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from collections.abc import Sequence
from typing import Annotated, Any

import httpx2
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from cropi.asynchronous import awaited
from cropi.config import ServerConfig
from cropi.console import warn, warn_once
from cropi.errors import PolicyError
from cropi.policy import Policy
from cropi.rollouts.generation import SEEDS, Sampling, until_end
from cropi.seeds import derived_seed

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0  # between tries, doubling
TIMEOUT_S = 600.0  # of one request
PATIENCE_S = 600.0  # without a usable response, while requests are tried again
LARGEST = 2**24  # bytes of a response


class _Choice(BaseModel):
    """The fields of one completion that are read."""

    model_config = ConfigDict(strict=True)

    text: str
    finish_reason: str
    stop_reason: int | str | None = Field(None, validation_alias=AliasChoices("stop_reason", "matched_stop"))  # SGLang
    token_ids: Annotated[list[int], Field(min_length=1)] | None = None
    prompt_token_ids: list[int] | None = None


class _Usage(BaseModel):
    model_config = ConfigDict(strict=True)

    completion_tokens: int | None = None


class _Answer(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1, max_length=1)]
    usage: _Usage | None = None


class _UnusableError(Exception):
    """A response without a sample of the policy; the request is retried."""


class ServerGenerator:
    """Draws completions from a server with the policy's weights.

    Requests are retried at growing intervals if the server is unreachable, busy or broken (no connection, status 408,
    429 or 5xx), or if its response holds no completion (`finish_reason` other than stop and length). The run ends
    after `PATIENCE_S` without a usable response. Token ids in a response (vLLM) are the completion. Otherwise its
    text is tokenised, which may not reproduce the sampled tokens; an end-of-sequence token is added if the server
    stopped at one. `retokenized` counts completions with another number of tokens than the server's.

    Raises PolicyError if the server refuses a request, if a prompt changes when it is sent as text, and if there is no
    usable response. Finished shards are kept.
    """

    def __init__(self, policy: Policy, config: ServerConfig, concurrency: int) -> None:
        """`concurrency`: requests at once, each for one completion."""
        self._policy, self._config, self._concurrency = policy, config, concurrency
        self._url = f"{config.url.rstrip('/')}/completions"
        self._vocabulary = policy.model.config.get_text_config().vocab_size
        self._answered, self._warned = 0.0, False
        self.retokenized = 0

    def __call__(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[list[int]]:
        listed = [list(prompt) for prompt in prompts]
        bodies = [
            {
                "model": self._config.model,
                "prompt": self._written(prompt),
                "max_tokens": sampling.max_completion_length,
                "temperature": 0.0 if sampling.temperature is None else sampling.temperature,
                "top_p": 1.0,
                "seed": derived_seed(seed, number) % SEEDS,
                **self._config.body,
            }
            for number, prompt in enumerate(listed)
        ]
        self._answered, self._warned = time.monotonic(), False
        found: list[list[int]] = awaited(self._complete_all(bodies, listed))
        if self.retokenized:
            warn_once(
                "some of the server's texts do not tokenise back into the sampled tokens; the tokens of the text are "
                "stored (collect.server)"
            )
        return [completion[: sampling.max_completion_length] for completion in found]

    def _written(self, prompt: list[int]) -> list[int] | str:
        if self._config.prompts == "tokens":
            return prompt
        text = str(self._policy.tokenizer.decode(prompt))
        if self._policy.tokenizer(text=text)["input_ids"] != prompt:
            raise PolicyError(
                "a prompt sent as text tokenises into other tokens (for example if the template begins with the token "
                "that the tokenizer puts first)",
                where="collect.server.prompts",
                fix="use a server that accepts token ids, and set it to tokens.",
            )
        return text

    async def _complete_all(self, bodies: Sequence[dict[str, Any]], prompts: Sequence[list[int]]) -> list[list[int]]:
        """Send all requests; an error or an interrupt cancels the open ones."""
        most, slots = self._concurrency, asyncio.Semaphore(self._concurrency)
        key = os.environ.get(self._config.api_key_env or "", "").strip()

        async def one(client: httpx2.AsyncClient, body: dict[str, Any], prompt: list[int]) -> list[int]:
            async with slots:
                return await self._complete(client, body, prompt)

        try:
            async with (
                httpx2.AsyncClient(
                    headers={b"Authorization": f"Bearer {key}".encode(errors="surrogateescape")} if key else {},
                    timeout=None,  # each request has its own
                    limits=httpx2.Limits(max_connections=most, max_keepalive_connections=most),
                ) as client,
                asyncio.TaskGroup() as group,
            ):
                jobs = [group.create_task(one(client, *pair)) for pair in zip(bodies, prompts, strict=True)]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        except (ImportError, ValueError) as error:
            raise PolicyError(
                f"the environment names a proxy that cannot be used: {error}",
                where="HTTP_PROXY, HTTPS_PROXY or ALL_PROXY",
                fix="correct or unset it.",
            ) from None
        return [job.result() for job in jobs]

    async def _complete(self, client: httpx2.AsyncClient, body: dict[str, Any], prompt: list[int]) -> list[int]:
        """Request a completion until it succeeds; `PATIENCE_S` counts from the first failure at the earliest."""
        wait, failing_since = FIRST_WAIT_S, None
        while True:
            began = time.monotonic()
            try:
                completion = self._tokens(_parsed(await self._post(client, body)), prompt)
                self._answered = time.monotonic()
                return completion
            except (_UnusableError, httpx2.HTTPError, httpx2.InvalidURL, TimeoutError) as error:
                named = "" if isinstance(error, _UnusableError) else f"{type(error).__name__}: "
                trouble = f"{named}{error}"[:400]
                if failing_since is None:
                    failing_since = began if isinstance(error, TimeoutError) else time.monotonic()
            left = max(self._answered, failing_since) + PATIENCE_S - time.monotonic()
            if left <= 0:
                raise PolicyError(
                    f"the server has not answered for {PATIENCE_S:g} s with a usable completion ({trouble})",
                    where=f"collect.server.url {self._config.url}",
                    fix="check that it runs, the URL (it ends in /v1), the model's name there and "
                    "collect.server.body. Then run the same command again: finished shards are kept.",
                )
            if not self._warned:
                warn(f"{self._config.url}: {trouble}; trying again")
                self._warned = True
            await asyncio.sleep(min(left, wait * random.uniform(0.5, 1.0)))
            wait = min(2 * wait, LONGEST_WAIT_S)

    async def _post(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> bytes:
        """Return the body of a response with status 200."""
        data = bytearray()
        async with asyncio.timeout(TIMEOUT_S), client.stream("POST", self._url, json=body) as response:
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > LARGEST:
                    break
        status, to = response.status_code, response.headers.get("location")
        what = f"status {status}" + (f", a redirect to {to[:200]}" if to else f": {_excerpt(data)}")
        if status in (408, 429) or status >= 500:
            raise _UnusableError(what)
        if status != 200:
            raise PolicyError(
                f"the server refuses a request: {what}",
                where=f"collect.server.url {self._config.url}",
                fix="check the URL (it ends in /v1), the model's name there, and collect.server.body.",
            )
        if len(data) > LARGEST:
            raise _UnusableError(f"its response is longer than {LARGEST} bytes: {_excerpt(data)}")
        return bytes(data)

    def _tokens(self, answer: _Answer, prompt: list[int]) -> list[int]:
        """Return the completion up to and including its first end-of-sequence token."""
        [choice] = answer.choices
        count = answer.usage.completion_tokens if answer.usage else None
        if choice.finish_reason not in ("stop", "length"):
            raise _UnusableError(f"it broke a completion off (finish_reason {choice.finish_reason[:100]!r})")
        if choice.prompt_token_ids not in (None, prompt):
            raise _UnusableError("it completed other tokens than those of the prompt (prompt_token_ids)")
        if choice.token_ids is None:
            found = self._retokenized(choice, count)
        else:
            found = choice.token_ids
            self._check_ids(found, choice.text, count)
        return until_end(found, self._policy.eos_ids)

    def _check_ids(self, ids: list[int], text: str, count: int | None) -> None:
        """Check ids against the text, which may be shorter if the server cut it at a stop string."""
        if not all(0 <= token < self._vocabulary for token in ids):
            raise _UnusableError(f"its token_ids are not all among the policy's {self._vocabulary} tokens")
        if count not in (None, len(ids), len(ids) - 1):
            raise _UnusableError(f"it counts {count} tokens, but returned {len(ids)} token_ids")
        spelled = (self._policy.tokenizer.decode(ids, skip_special_tokens=skip) for skip in (True, False))
        if not any(_compact(one).startswith(_compact(text)) for one in spelled):
            raise _UnusableError(f"its token_ids are not those of its text in the policy's tokenizer: {text[:200]!r}")

    def _retokenized(self, choice: _Choice, count: int | None) -> list[int]:
        if "stop" in self._config.body and "stop_reason" not in choice.model_fields_set:
            raise PolicyError(
                "the server returns no stop_reason, so a finished completion looks like one that was cut at a stop "
                "string",
                where="collect.server.body.stop",
                fix="leave it out, or make the server return token ids.",
            )
        eos, reason = self._policy.eos_ids, choice.stop_reason
        found = list(self._policy.tokenizer(text=choice.text, add_special_tokens=False)["input_ids"])
        ended = choice.finish_reason == "stop" and (reason is None or reason in eos)
        if ended and not (found and found[-1] in eos):
            found.append(self._policy.tokenizer.eos_token_id if reason is None else reason)
        # servers differ in whether they count the token that ends a completion
        if count not in (None, len(found), len(found) - 1):
            self.retokenized += 1
        return found


def _parsed(data: bytes) -> _Answer:
    try:
        return _Answer.model_validate(from_json(data, allow_inf_nan=False))
    except ValidationError as error:
        problem = error.errors(include_input=False)[0]
        what = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    except ValueError as error:
        what = str(error)
    raise _UnusableError(f"its response is no completion ({what[:100]}): {_excerpt(data)}")


def _excerpt(data: bytes | bytearray) -> str:
    return " ".join(data[:1000].decode(errors="replace").split())[:200]


def _compact(text: str) -> str:
    """Remove white space and partial characters, which differ if tokens are decoded one by one."""
    return re.sub("[\\s\ufffd]", "", text)
