"""What nobody should send: never a 5xx, never a hang, and the next request is answered."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from typing import Any

import pytest
from serving import Server, serving
from test_dialects import binary, v2

JSON = {"Content-Type": "application/json"}
ROUTES = {
    "/v1/classify": lambda text: {"texts": [text]},
    "/": lambda text: {"inputs": text},
    "/predict": lambda text: {"inputs": text},
    "/classify": lambda text: {"input": text},
    "/v2/models/emotion/infer": lambda text: v2([text], [1]),
}


def check(answer: Any, *statuses: int) -> str:
    """The error's sentence; its body has the one shape."""
    assert answer.status_code in statuses, (answer.status_code, answer.text[:200])
    body = answer.json()
    assert set(body) == {"error", "error_type"} and all(isinstance(value, str) and value for value in body.values())
    assert "Traceback" not in body["error"]
    return body["error"]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"not json", 400),
        (b'{"texts": ["a"', 400),
        (b"\xff\xfe\x00", 400),
        (b'{"inputs": "\xff"}', 400),
        (b'{"inputs": "a", "x": NaN, "y": "\\ud800"}', 400),
        (b"[" * 9000, 400),
        (b'{"texts":' * 2000, 400),
        (b"1" * 9000, 400),
        (b"null", 422),
        (b"[]", 422),
        (b"{}", 422),
        (b'"a"', 422),
    ],
    ids=repr,
)
def test_bodies_that_are_no_request(endpoint: Server, path: str, body: bytes, status: int) -> None:
    check(endpoint.post(path, data=body, headers=JSON), status)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("text", ["", "  \n\t", 3, None, True, {"a": 1}, [["a", "b"]], 1e400, [1]], ids=repr)
def test_texts_that_are_none(endpoint: Server, path: str, text: Any) -> None:
    body = json.dumps(ROUTES[path](text)).replace("Infinity", "NaN")
    check(endpoint.post(path, data=body.encode(), headers=JSON), 422, 400)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "text",
    [
        r"half an emoji \ud83d",
        r"\udc00\ud800",
        r"\u0000",
        r"​‍﻿",
        r"שלום مرحبا ‮ reversed",
        r"e\u0301" * 500,
        r"👩‍👩‍👧‍👦 🏳️‍🌈",
        r"\uffff\ufffe",
        "word " * 3000,
        "x" * 15_000,
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_any_unicode_is_answered(endpoint: Server, path: str, text: str) -> None:
    body = json.dumps(ROUTES[path]("TEXT")).replace("TEXT", text)
    answer = endpoint.post(path, data=body.encode(), headers=JSON)
    assert answer.status_code == 200, answer.text[:200]


@pytest.mark.parametrize("top_k", [0, -1, 1.5, "2", True, [], 1e30])
def test_top_k_that_is_none(endpoint: Server, top_k: Any) -> None:
    assert "top_k" in check(endpoint.post("/v1/classify", {"texts": ["a"], "top_k": top_k}), 422)
    assert "parameters.top_k" in check(endpoint.post("/", {"inputs": "a", "parameters": {"top_k": top_k}}), 422)


def test_what_is_wrong_is_named_and_not_repeated(endpoint: Server) -> None:
    answer = endpoint.post("/v1/classify", {"texts": ["fine", 12345, "", None, 7, 8], "topk": 1})
    sentence = check(answer, 422)
    assert "texts[1]: must be a string" in sentence and "topk: no such field" in sentence
    assert "texts[2]" not in sentence and "12345" not in sentence
    unknown = {f"a{i}": 0 for i in range(1000)}
    assert "and 997 more like these" in check(endpoint.post("/v1/classify", {"texts": ["a"], **unknown}), 422)
    assert "did you mean 'top_k'?" in check(endpoint.post("/v1/classify", {"texts": ["a"], "topk": 1}), 422)
    options = {"inputs": "a", "parameters": {"function_to_apply": "relu"}}
    assert "'softmax', 'sigmoid' or 'none'" in check(endpoint.post("/", options), 422)


def test_limits_say_the_limit(endpoint: Server) -> None:
    assert "50" in check(endpoint.post("/v1/classify", {"texts": ["a"] * 51}), 413)
    assert "50" in check(endpoint.post("/predict", {"inputs": [["a"]] * 51}), 413)
    assert "20000" in check(endpoint.post("/", {"inputs": "a" * 20_000}), 413)


def test_ten_megabytes_and_100_000_texts(endpoint: Server) -> None:
    check(endpoint.post("/v1/classify", {"texts": ["a" * 10_000_000]}), 413)
    check(endpoint.post("/v1/classify", {"texts": ["a"] * 100_000}), 413)
    chunks = (b"x" * 100_000 for _ in range(100))  # no length announced
    check(endpoint.post("/v1/classify", data=chunks, headers=JSON), 413)


def test_announced_lengths_that_are_absurd(endpoint: Server) -> None:
    connection = http.client.HTTPConnection(*endpoint.address, timeout=10)
    connection.putrequest("POST", "/v1/classify")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "9" * 17)
    connection.putheader("Expect", "100-continue")
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize(
    ("headers", "word"),
    [
        ({"Content-Type": "text/plain"}, "application/json"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "application/json"),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, "compressed"),
        ({"Content-Type": "\x80"}, "application/json"),
    ],
)
def test_content_types_that_are_not_read(endpoint: Server, headers: dict[str, str], word: str) -> None:
    assert word in check(endpoint.post("/v1/classify", data=b'{"texts": ["a"]}', headers=headers), 415)


def test_content_types_that_are_read(endpoint: Server) -> None:
    for content_type in ("application/json; charset=utf-8", "Application/JSON", None):
        headers = {"Content-Type": content_type} if content_type else {}
        assert endpoint.post("/v1/classify", data=b'{"texts": ["a"]}', headers=headers).status_code == 200


def test_routes_and_methods_that_are_none(endpoint: Server) -> None:
    for path in ("/nowhere", "/v1/classify/", "//", "/v2/models//infer", "/v2/models/a/b/c/d/e", "/%00", "/../etc"):
        check(endpoint.get(path), 404)
    for method, path, allowed in (("GET", "/predict", "POST"), ("DELETE", "/", "GET, POST"), ("PUT", "/info", "GET")):
        answer = endpoint.session.request(method, endpoint.url + path, timeout=5)
        check(answer, 405)
        assert answer.headers["allow"] == allowed


@pytest.mark.parametrize(
    ("body", "headers", "statuses"),
    [
        (binary([b"ab"])[0][:-1], binary([b"ab"])[1], (400,)),
        (binary([b"ab"])[0] + b"x", binary([b"ab"])[1], (400,)),
        (*binary([b"ab"], shape=[2]), (422,)),
        (*binary([b"ab", b"cd"], shape=[1]), (422,)),
        (*binary([b"\xff"]), (422,)),
        (*binary([b""]), (422,)),
        (binary([b"ab"])[0], {"Inference-Header-Content-Length": "-1"}, (400,)),
        (binary([b"ab"])[0], {"Inference-Header-Content-Length": "99999"}, (400,)),
        (binary([b"ab"])[0], {"Inference-Header-Content-Length": "9" * 300}, (400,)),
        (binary([b"ab"])[0], {"Inference-Header-Content-Length": "5"}, (400,)),
        (binary([b"ab"])[0], {"Inference-Header-Content-Length": "0"}, (400,)),
    ],
)
def test_binary_lengths_that_do_not_fit(
    endpoint: Server, body: bytes, headers: dict[str, str], statuses: tuple[int, ...]
) -> None:
    check(endpoint.post("/v2/models/emotion/infer", data=body, headers=headers), *statuses)


@pytest.mark.parametrize("size", [-1, 10**30, True, "6", 1.0, None, [6]])
def test_binary_sizes_that_are_none(endpoint: Server, size: Any) -> None:
    body, headers = binary([b"ab"])
    length = int(headers["Inference-Header-Content-Length"])
    content = json.loads(body[:length])
    content["inputs"][0]["parameters"]["binary_data_size"] = size
    header = json.dumps(content).encode()
    headers["Inference-Header-Content-Length"] = str(len(header))
    check(endpoint.post("/v2/models/emotion/infer", data=header + body[length:], headers=headers), 400, 422)


def test_a_string_length_beyond_the_tensor(endpoint: Server) -> None:
    body, headers = binary([b"abcdef"])
    body = body[:-10] + b"\xff\xff\xff\xff" + body[-6:]
    assert "4294967295 bytes" in check(endpoint.post("/v2/models/emotion/infer", data=body, headers=headers), 400)


def send(endpoint: Server, *parts: bytes, pause: float = 0.0) -> socket.socket:
    raw = socket.create_connection(endpoint.address, timeout=10)
    for part in parts:
        raw.sendall(part)
        time.sleep(pause)
    return raw


HEAD = b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def test_half_sent_bodies_end_in_time(endpoint: Server) -> None:
    with send(endpoint, HEAD % 100, b'{"texts"') as raw:
        start = time.monotonic()
        answer = b""
        while b'"slow_body"' not in answer and (part := raw.recv(4096)):  # a proxy may keep the connection open
            answer += part
    assert answer.startswith(b"HTTP/1.1 408") and b'"slow_body"' in answer
    assert time.monotonic() - start < 6
    send(endpoint, HEAD % 100, b'{"texts"').close()
    assert endpoint.post("/v1/classify", {"texts": ["a"]}).status_code == 200


def test_slow_clients_hold_up_nobody(endpoint: Server) -> None:
    body = b'{"texts": ["a"]}'
    slow: list[bytes] = []

    def dribble() -> None:
        with send(endpoint, HEAD % len(body), *[body[i : i + 1] for i in range(len(body))], pause=0.05) as raw:
            slow.append(raw.recv(4096))

    threads = [threading.Thread(target=dribble) for _ in range(20)]
    for thread in threads:
        thread.start()
    start = time.monotonic()
    for _ in range(10):
        assert endpoint.post("/v1/classify", {"texts": ["a"]}).status_code == 200
    assert time.monotonic() - start < 2
    for thread in threads:
        thread.join()
    assert len(slow) == 20 and all(answer.startswith(b"HTTP/1.1 200") for answer in slow)


def test_garbage_instead_of_http(endpoint: Server) -> None:
    for junk in (b"\x16\x03\x01\x02\x00\x01" * 20, b"GET\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n"):
        with send(endpoint, junk) as raw:
            assert not raw.recv(4096).startswith(b"HTTP/1.1 5")
    assert endpoint.get("/health").status_code == 200


def test_a_failing_text_is_its_own_requests_error(endpoint: Server) -> None:
    """The one 5xx: the model's own fault; without a word of its innards, and without harm to those beside it."""
    answers: dict[str, Any] = {}

    def ask(text: str) -> None:
        import requests

        answers[text] = requests.post(endpoint.url + "/v1/classify", json={"texts": [text, "nap"]}, timeout=20)

    threads = [threading.Thread(target=ask, args=(text,)) for text in ("nap a", "boom", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "secret" not in check(answers.pop("boom"), 500)
    assert [answer.status_code for answer in answers.values()] == [200, 200, 200]


def test_overload_is_refused_at_once_and_time_runs_out(endpoint: Server) -> None:
    import requests

    with serving(limits={"max_queued_requests": 4, "timeout_s": 1.0}) as server:

        def ask(found: list[Any]) -> None:
            start = time.monotonic()
            answer = requests.post(server.url + "/v1/classify", json={"texts": ["nap"] * 1}, timeout=20)
            found.append((answer, time.monotonic() - start))

        found: list[Any] = []
        threads = [threading.Thread(target=ask, args=(found,)) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = sorted(answer.status_code for answer, _ in found)
        assert statuses.count(200) >= 1 and statuses.count(429) >= 4 and set(statuses) <= {200, 429}
        for answer, seconds in found:
            if answer.status_code == 429:
                check(answer, 429)
                assert int(answer.headers["retry-after"]) >= 1 and seconds < 0.5
        # Nine naps at most 16 tokens each run as one batch; nine batches of one do not fit a second.
        with serving(limits={"timeout_s": 0.3}, batching={"max_tokens": 16}) as slow:
            check(slow.post("/v1/classify", {"texts": [f"nap {'w ' * 13}"] * 9}), 504)
            time.sleep(0.3)
            assert slow.post("/v1/classify", {"texts": ["a"]}).status_code == 200
