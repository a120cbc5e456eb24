"""Completions from a server: a fake one that fails on demand, and a real one that is killed in mid-collection."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.rollouts.killed import collected_through

from cropi.builtin import POLICY_DIR
from cropi.config import PolicyConfig, ServerConfig
from cropi.errors import PolicyError
from cropi.policy import Policy, encode_prompts, load_policy
from cropi.rollouts.generation import Sampling
from cropi.rollouts.server import ServerGenerator

PROMPTS = [f"sum mod 7 : {n} 5 6 1 =" for n in range(6)]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(PolicyConfig(path="builtin", cpu_threads=1))


class Fake:
    """Answers with what a function of (number of the request, body) gives: (status, answer)."""

    def __init__(self, answer: Callable[[int, dict[str, Any]], tuple[int, Any]]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        lock, fake = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(fake.bodies)
                    fake.bodies.append(body)
                    fake.headers.append(self.headers)
                status, value = answer(number, body)
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serving() -> Iterator[Callable[..., Fake]]:
    made: list[Fake] = []

    def start(answer: Callable[[int, dict[str, Any]], tuple[int, Any]]) -> Fake:
        made.append(Fake(answer))
        return made[-1]

    yield start
    for fake in made:
        fake.close()


def said(text: str, reason: str = "stop", **more: Any) -> tuple[int, Any]:
    return 200, {"choices": [{"text": text, "finish_reason": reason, **more}]}


def ask(policy: Policy, fake: Fake, length: int = 8, **settings: Any) -> list[list[int]]:
    config = ServerConfig(**({"url": fake.url, "model": "m", "patience": 5.0} | settings))
    generate = ServerGenerator(policy, config)
    return generate(encode_prompts(policy.tokenizer, PROMPTS), Sampling(length, 0.7, 0.9), seed=3)


def test_texts_become_tokens_in_order_and_end_where_the_server_stopped(policy: Policy, serving: Any) -> None:
    fake = serving(lambda _, body: said(f"answer {policy.tokenizer.decode(body['prompt']).split()[4]}"))
    completions = ask(policy, fake, concurrency=3, body={"top_k": -1})
    texts = [policy.tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
    assert texts == [f"answer {n}" for n in range(6)]
    assert all(ids[-1] == policy.tokenizer.eos_token_id for ids in completions)
    body = fake.bodies[0]
    assert (body["max_tokens"], body["temperature"], body["top_p"], body["top_k"]) == (8, 0.7, 0.9, -1)
    assert len({body["seed"] for body in fake.bodies}) == 6


def test_a_completion_that_was_cut_has_no_end_and_token_ids_are_taken_as_they_are(policy: Policy, serving: Any) -> None:
    cut = ask(policy, serving(lambda *_: said("answer 3", "length")), length=2)
    assert all(policy.tokenizer.eos_token_id not in ids and len(ids) == 2 for ids in cut)
    eos = policy.tokenizer.eos_token_id
    given = ask(policy, serving(lambda *_: said("whatever", token_ids=[7, 8, eos, 9])))
    assert given == [[7, 8, eos]] * 6


def test_what_fails_for_a_while_is_tried_again_and_nothing_comes_twice(policy: Policy, serving: Any) -> None:
    failures = [(503, {"error": "busy"}), (429, {"error": "slow down"}), (200, b'{"choices": [{"te')]
    fake = serving(lambda number, _: failures[number] if number < 3 else said("answer 1"))
    assert len(ask(policy, fake, concurrency=2)) == 6
    assert len(fake.bodies) == 9


@pytest.mark.parametrize(
    ("answer", "message"),
    [((404, {"error": "no such model"}), "status 404"), ((200, {"nothing": 1}), "no completion")],
)
def test_what_the_server_refuses_ends_at_once(answer: Any, message: str, policy: Policy, serving: Any) -> None:
    with pytest.raises(PolicyError, match=message):
        ask(policy, serving(lambda *_: answer))


def test_a_server_that_stays_away_is_given_up(policy: Policy) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    generate = ServerGenerator(policy, ServerConfig(url=f"http://127.0.0.1:{port}/v1", model="m", patience=1.0))
    with pytest.raises(PolicyError, match="has not answered for 1 s"):
        generate([[5, 6]], Sampling(4, 1.0), seed=0)


def test_the_key_and_prompts_as_text(policy: Policy, serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    fake = serving(lambda *_: said("answer 1"))
    ask(policy, fake, prompts="text", api_key_env="MY_KEY")
    assert sorted(body["prompt"] for body in fake.bodies) == PROMPTS
    assert fake.headers[0]["Authorization"] == "Bearer secret"


def test_a_prompt_that_does_not_survive_as_text_is_refused(policy: Policy) -> None:
    """A tokenizer that puts a token first, and a prompt that begins with it already."""

    class Begins:
        def decode(self, ids: list[int]) -> str:
            return "<s> sum" if ids[0] == 1 else "sum"

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1, *([1] if text.startswith("<s>") else []), 5]}

    odd = Policy(policy.model, Begins())  # type: ignore[arg-type]
    generate = ServerGenerator(odd, ServerConfig(url="http://localhost:1/v1", model="m", prompts="text"))
    with pytest.raises(PolicyError, match="other tokens when it is sent as text"):
        generate([[1, 5]], Sampling(4, 1.0), seed=0)


def test_a_text_that_tokenises_otherwise_is_counted(policy: Policy, serving: Any) -> None:
    _, answer = said("answer 1")
    fake = serving(lambda *_: (200, answer | {"usage": {"completion_tokens": 7}}))
    generate = ServerGenerator(policy, ServerConfig(url=fake.url, model="m"))
    generate(encode_prompts(policy.tokenizer, PROMPTS), Sampling(8, 1.0), seed=0)
    assert generate.retokenized == 6


# -- a real one ------------------------------------------------------------------------------------------------------


def transformers_serve(port: int) -> list[str]:
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
    return [*command, "serve", str(POLICY_DIR), "--port", str(port), "--device", "cpu"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_server_killed_in_mid_collection_and_started_again_loses_and_doubles_nothing(tmp_path: Path) -> None:
    collected_through(transformers_serve, {}, {"model": str(POLICY_DIR), "prompts": "text"}, tmp_path)
