"""Completions from a server: a fake one that fails on demand, and a real one that is killed in mid-collection."""

from __future__ import annotations

import gzip
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.stages.killed import collected_through

from cropi.builtin import POLICY_DIR
from cropi.config import PolicyConfig, ServerConfig
from cropi.errors import PolicyError
from cropi.policy import Policy, load_policy
from cropi.prompts.encoding import encode_prompts
from cropi.rollouts import server
from cropi.rollouts.generation import Sampling
from cropi.rollouts.server import ServerGenerator

PROMPTS = [f"sum mod 7 : {n} 5 6 1 =" for n in range(6)]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(PolicyConfig(path="builtin", cpu_threads=1))


Reply = Callable[[BaseHTTPRequestHandler], None]  # what writes an answer that is more than a status and JSON


class Fake:
    """Answers with what a function of (number of the request, body) gives: (status, answer), or a `Reply`."""

    def __init__(self, answer: Callable[[int, dict[str, Any]], tuple[int, Any] | Reply]) -> None:
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
                reply = answer(number, body)
                with suppress(ConnectionError):  # the client may have given up
                    (reply if callable(reply) else plain(*reply))(self)

            def do_GET(self) -> None:  # a redirected POST
                plain(200, body_of("answer 0"))(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def plain(status: int, value: Any, **headers: str) -> Reply:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, text in ({"Content-Length": str(len(data))} | headers).items():
            handler.send_header(name.replace("_", "-"), text)
        handler.end_headers()
        handler.wfile.write(data)

    return reply


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cropi.rollouts.server.FIRST_WAIT_S", 0.02)


@pytest.fixture
def serving() -> Iterator[Callable[..., Fake]]:
    made: list[Fake] = []

    def start(answer: Callable[[int, dict[str, Any]], tuple[int, Any] | Reply]) -> Fake:
        made.append(Fake(answer))
        return made[-1]

    yield start
    for fake in made:
        fake.close()


def body_of(text: Any, reason: Any = "stop", **more: Any) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": reason, **more}]}


def said(text: Any, reason: Any = "stop", **more: Any) -> tuple[int, Any]:
    return 200, body_of(text, reason, **more)


def ask(policy: Policy, fake: Fake, length: int = 8, **settings: Any) -> list[list[int]]:
    concurrency, patience = settings.pop("concurrency", 64), settings.pop("patience", 5.0)
    given: dict[str, Any] = {"url": fake.url, "model": "m"} | settings
    generate = ServerGenerator(policy, ServerConfig(**given), concurrency)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(server, "PATIENCE_S", patience)
        return generate(encode_prompts(policy.tokenizer, PROMPTS), Sampling(length, 0.7), seed=3)


def test_texts_become_tokens_in_order_and_end_where_the_server_stopped(policy: Policy, serving: Any) -> None:
    fake = serving(lambda _, body: said(f"answer {policy.tokenizer.decode(body['prompt']).split()[4]}"))
    completions = ask(policy, fake, concurrency=3, body={"top_k": -1})
    texts = [policy.tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
    assert texts == [f"answer {n}" for n in range(6)]
    assert all(ids[-1] == policy.tokenizer.eos_token_id for ids in completions)
    body = fake.bodies[0]
    assert (body["max_tokens"], body["temperature"], body["top_p"], body["top_k"]) == (8, 0.7, 1.0, -1)
    assert len({body["seed"] for body in fake.bodies}) == 6


def test_a_completion_that_was_cut_has_no_end_and_token_ids_are_taken_as_they_are(policy: Policy, serving: Any) -> None:
    cut = ask(policy, serving(lambda *_: said("answer 3", "length")), length=2)
    assert all(policy.tokenizer.eos_token_id not in ids and len(ids) == 2 for ids in cut)
    eos = policy.tokenizer.eos_token_id
    text = policy.tokenizer.decode([7, 8])
    given = ask(policy, serving(lambda *_: said(text, token_ids=[7, 8, eos, 9])))
    assert given == [[7, 8, eos]] * 6


def test_what_fails_for_a_while_is_tried_again_and_nothing_comes_twice(policy: Policy, serving: Any) -> None:
    failures = [(503, {"error": "busy"}), (429, {"error": "slow down"}), (200, b'{"choices": [{"te')]
    fake = serving(lambda number, _: failures[number] if number < 3 else said("answer 1"))
    assert len(ask(policy, fake, concurrency=2)) == 6
    assert len(fake.bodies) == 9


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {"error": "no such model"}), "status 404: .*no such model"),
        ((204, b""), "status 204"),
        (plain(302, b"", Location="http://localhost:1/v2"), "status 302, a redirect to http://localhost:1/v2"),
        (plain(308, b"", Location="/v2"), "status 308, a redirect to /v2"),
    ],
)
def test_what_the_server_refuses_ends_at_once(answer: Any, message: str, policy: Policy, serving: Any) -> None:
    fake = serving(lambda *_: answer)
    with pytest.raises(PolicyError, match=message):
        ask(policy, fake, concurrency=1, patience=60)
    assert len(fake.bodies) == 1


# -- answers that are not a completion -------------------------------------------------------------------------------


def silence(handler: BaseHTTPRequestHandler) -> None:
    """Accepts a request and says nothing."""
    time.sleep(2)


def drip(handler: BaseHTTPRequestHandler) -> None:
    """A byte now and then, for ever."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.05)


def drip_of_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    for number in range(10_000):
        handler.send_header(f"X-{number}", "x")
        handler.flush_headers()
        time.sleep(0.05)


def cut_chunk(handler: BaseHTTPRequestHandler) -> None:
    """A chunk of 255 bytes, of which 12 come."""
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b'ff\r\n{"choices": [')


def hangs_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


GOOD = body_of("answer 3")
[CHOICE] = GOOD["choices"]
IDS = {"token_ids": "of the text"}  # replaced by the token ids of `answer 3`

NOT_SAMPLED: dict[str, Any] = {
    reason: said("answer 3", reason) for reason in ("abort", "error", "content_filter", "tool_calls", "", "Stop")
} | {"abort with ids": said("answer 3", "abort", **IDS), "abort without text": said("", "abort", token_ids=[])}
MALFORMED: dict[str, Any] = {
    "text null": said(None),
    "finish_reason null": said("answer 3", None),
    "text missing": (200, {"choices": [{"finish_reason": "stop"}]}),
    "HTML": (200, b"<html><body>502 Bad Gateway</body></html>"),
    "event stream": plain(200, b'data: {"choices": []}\n\ndata: [DONE]\n', Content_Type="text/event-stream"),
    "nothing": (200, b""),
    "error object": (200, {"error": {"message": "engine is dead", "code": 500}}),
    "a chat completion": (200, {"choices": [{"message": {"content": "answer 3"}, "finish_reason": "stop"}]}),
    "two choices": (200, {"choices": [CHOICE, CHOICE]}),
    "usage that counts nonsense": (200, GOOD | {"usage": {"completion_tokens": "many"}}),
    "usage that contradicts the ids": (200, body_of("answer 3", **IDS) | {"usage": {"completion_tokens": 7}}),
    "negative id": said("answer 3", token_ids=[-1]),
    "id beyond the vocabulary": said("answer 3", token_ids=[81]),
    "id a round float": said("answer 3", token_ids=[7.0]),
    "no id": said("answer 3", token_ids=[]),
    "ids of another text": said("even 3", **IDS),
    "another prompt": said("answer 3", prompt_token_ids=[5, 6, 7]),
    "NaN among the log-probs": said("answer 3", logprobs={"token_logprobs": [float("nan")]}),
    "stop_reason a fraction": said("answer 3", stop_reason=2.5),
    "half a surrogate": (200, json.dumps(body_of("answer X")).replace("X", "\\ud800").encode()),
    "not UTF-8": (200, json.dumps(GOOD).encode("utf-16")),
    "nested deeply": (200, b'{"choices": ' + b"[" * 100_000),
    "shorter than it says": plain(200, json.dumps(GOOD).encode(), Content_Length="5000"),
    "a chunk cut short": cut_chunk,
    "hung up": hangs_up,
    "gzip that is none": plain(200, json.dumps(GOOD).encode(), Content_Encoding="gzip"),
    "endless": plain(200, b" " * (2**24 + 1)),
    "gzip of something endless": plain(200, gzip.compress(b" " * (2**24 + 1)), Content_Encoding="gzip"),
    "silence": silence,
    "drip": drip,
    "drip of headers": drip_of_headers,
    "busy": plain(429, b"", Retry_After="3600"),
    "a huge error": plain(500, b"x" * (2**24 + 1)),
    "500": (500, {"error": "out of memory"}),
}
BAD = NOT_SAMPLED | MALFORMED
# An answer for each way to fail: not sampled, malformed in body, ids or encoding, cut off, without end, too slow.
GIVEN_UP = ["abort", "Stop", "text null", "HTML", "error object", "negative id", "nested deeply", "a chunk cut short"]
GIVEN_UP += ["gzip of something endless", "silence", "drip", "drip of headers", "busy", "a huge error", "500"]


def filled(reply: Any, policy: Policy) -> Any:
    """A reply of the table with the token ids of its text in place."""
    if callable(reply) or "of the text" not in str(reply[1]):
        return reply
    ids = policy.tokenizer(text="answer 3", add_special_tokens=False)["input_ids"]
    return reply[0], json.loads(json.dumps(reply[1]).replace('"of the text"', json.dumps(ids)))


def by_seed(policy: Policy, body: Mapping[str, Any]) -> tuple[int, Any]:
    """A good answer that is a function of the request: right at times."""
    text = f"answer {body['seed'] % 7}"
    tokens = [*policy.tokenizer(text=text, add_special_tokens=False)["input_ids"], policy.tokenizer.eos_token_id]
    more = {"token_ids": tokens, "prompt_token_ids": body["prompt"], "stop_reason": None}
    return 200, body_of(text, **more) | {"usage": {"completion_tokens": len(tokens)}}


@pytest.fixture(scope="module")
def undisturbed(policy: Policy) -> Iterator[list[list[int]]]:
    fake = Fake(lambda _, body: by_seed(policy, body))
    yield ask(policy, fake, concurrency=2)
    fake.close()


@pytest.mark.parametrize("name", BAD)
def test_one_bad_answer_among_good_ones_changes_nothing(name, undisturbed, policy, serving, monkeypatch):
    monkeypatch.setattr("cropi.rollouts.server.TIMEOUT_S", 0.5)
    bad = filled(BAD[name], policy)
    fake = serving(lambda number, body: bad if number == 2 else by_seed(policy, body))
    assert ask(policy, fake, concurrency=2) == undisturbed
    assert len(fake.bodies) == len(PROMPTS) + 1


@pytest.mark.parametrize("name", GIVEN_UP)
def test_a_server_that_answers_badly_is_given_up_within_patience(name, policy, serving, monkeypatch):
    monkeypatch.setattr("cropi.rollouts.server.TIMEOUT_S", 0.3)
    bad = filled(BAD[name], policy)
    began = time.monotonic()
    with pytest.raises(PolicyError, match=r"collect.server.url .*: the server has not answered for 0.1 s") as caught:
        ask(policy, serving(lambda *_: bad), patience=0.1, concurrency=2)
    assert time.monotonic() - began < 3
    assert len(str(caught.value)) < 1000
    told = {
        "HTML": "502 Bad Gateway",
        "text null": "choices.0.text",
        "error object": "engine is dead",
        "silence": "TimeoutError",
    }
    assert told.get(name, "finish_reason" if name in NOT_SAMPLED else "") in str(caught.value)


def test_patience_begins_with_the_first_failure(policy: Policy, serving: Any) -> None:
    """A completion may take longer than that."""

    def answer(number: int, _: Any) -> Any:
        time.sleep(0.4)
        return (500, "no") if number == 0 else said("answer 1")

    assert len(ask(policy, serving(answer), patience=0.3, concurrency=1)) == len(PROMPTS)


@pytest.mark.parametrize(
    ("more", "reason", "ends"),
    [
        ({}, "stop", "eos"), ({"stop_reason": None}, "stop", "eos"),
        ({"stop_reason": "eos"}, "stop", "eos"),  # replaced by the id
        ({"matched_stop": "eos"}, "stop", "eos"),  # as SGLang has it
        ({"stop_reason": "\n"}, "stop", None), ({"stop_reason": ""}, "stop", None),
        ({"matched_stop": "\n"}, "stop", None), ({"stop_reason": 7}, "stop", None), ({}, "length", None),
    ],
)  # fmt: skip
def test_an_end_is_appended_only_where_it_was_sampled(more, reason, ends, policy, serving):
    eos = policy.tokenizer.eos_token_id
    more = {key: eos if value == "eos" else value for key, value in more.items()}
    found = ask(policy, serving(lambda *_: said("answer 3", reason, **more)), prompts="text")
    text = policy.tokenizer(text="answer 3", add_special_tokens=False)["input_ids"]
    assert found == [text + ([eos] if ends else [])] * len(PROMPTS)


def test_where_a_text_may_have_been_cut_at_a_stop_string_the_server_must_tell(policy: Policy, serving: Any) -> None:
    with pytest.raises(PolicyError, match=r"collect.server.body.stop"):
        ask(policy, serving(lambda *_: said("answer 3")), body={"stop": ["\n"]})
    told = ask(policy, serving(lambda *_: said("answer 3", stop_reason=None)), body={"stop": ["\n"]})
    assert all(ids[-1] == policy.tokenizer.eos_token_id for ids in told)


def test_ids_may_hold_more_than_a_text_that_was_cut_at_a_stop_string(policy: Policy, serving: Any) -> None:
    ids = policy.tokenizer(text="answer 3 4", add_special_tokens=False)["input_ids"]
    assert ask(policy, serving(lambda *_: said("answer 3", stop_reason="4", token_ids=ids))) == [ids] * len(PROMPTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "http://"}, "url"), ({"url": "http://:8000/v1"}, "url"), ({"url": "http://localhost:99999/v1"}, "url"),
        ({"url": "http://exa mple/v1"}, "url"), ({"url": "http://localhost:8000/v1?key=1"}, "url"),
        ({"body": {"stream": True}}, "stream cannot be set by body"),
        ({"body": {"echo": True, "n": 2}}, "echo, n cannot be set by body"),
        ({"body": {"top_k": float("nan")}}, "body"), ({"body": {"since": date(2026, 1, 1)}}, "body"),
    ],
)  # fmt: skip
def test_settings_that_no_request_can_be_made_of(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerConfig.model_validate({"url": "http://localhost:8000/v1", "model": "m"} | changes)


def test_a_server_that_stays_away_is_given_up(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(server, "PATIENCE_S", 1.0)
    generate = ServerGenerator(policy, ServerConfig(url=f"http://127.0.0.1:{port}/v1", model="m"), 4)
    with pytest.raises(PolicyError, match="has not answered for 1 s"):
        generate([[5, 6]], Sampling(4, 1.0), seed=0)


def test_the_key_and_prompts_as_text(policy: Policy, serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    fake = serving(lambda *_: said("answer 1"))
    ask(policy, fake, prompts="text", api_key_env="MY_KEY")
    assert sorted(body["prompt"] for body in fake.bodies) == PROMPTS
    assert fake.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("HTTP_PROXY", "foo://x", "HTTP_PROXY.*a proxy that cannot be used"),
        ("MY_KEY", "a\nb", "LocalProtocolError: Illegal header"),
        ("MY_KEY", "\udcff\n", "status 401"),
    ],
)
def test_what_the_environment_says_that_no_request_can_be_made_of(
    variable: str, value: str, message: str, policy: Policy, serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = serving(lambda *_: (401, "no such key"))
    monkeypatch.setenv(variable, value)
    with pytest.raises(PolicyError, match=message):
        ask(policy, fake, api_key_env="MY_KEY", patience=0.1)


def test_an_interrupt_does_not_wait_for_the_server(policy: Policy, serving: Any) -> None:
    asked, ended = threading.Event(), threading.Event()

    def answer(*_: Any) -> Any:
        asked.set()
        return ended.wait(60) and said("answer 1")

    def interrupt() -> None:
        asked.wait(60)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    fake, began = serving(answer), time.monotonic()
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        ask(policy, fake)
    ended.set()
    assert time.monotonic() - began < 30


def test_a_prompt_that_does_not_survive_as_text_is_refused(policy: Policy) -> None:
    """A tokenizer that puts a token first, and a prompt that begins with it already."""

    class Begins:
        def decode(self, ids: list[int]) -> str:
            return "<s> sum" if ids[0] == 1 else "sum"

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1, *([1] if text.startswith("<s>") else []), 5]}

    odd = Policy(policy.model, Begins())  # type: ignore[arg-type]
    generate = ServerGenerator(odd, ServerConfig(url="http://localhost:1/v1", model="m", prompts="text"), 4)
    with pytest.raises(PolicyError, match="sent as text tokenises into other tokens"):
        generate([[1, 5]], Sampling(4, 1.0), seed=0)


def test_a_text_that_tokenises_otherwise_is_counted(policy: Policy, serving: Any) -> None:
    _, answer = said("answer 1")
    fake = serving(lambda *_: (200, answer | {"usage": {"completion_tokens": 7}}))
    generate = ServerGenerator(policy, ServerConfig(url=fake.url, model="m"), 4)
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
