"""Every route of the contract, in requests written from the documentation of the servers that speak it."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from serving import LABELS, MAX_LENGTH, Dummy, Server

from emoray.attribution import log_odds

TEXTS = ["i feel wonderful", "leave me alone", "what was that noise"]
EXPECTED = Dummy()(TEXTS)
LONG = "word " * (MAX_LENGTH + 5)


def pairs(place: int) -> list[dict[str, Any]]:
    return [{"label": label, "score": score} for label, score in EXPECTED[place].scores.items()]


def logits_of(texts: list[str]) -> Any:
    dummy = Dummy()
    return dummy.forward(dummy.encode(texts))


# Our own


def test_own_dialect_says_all_there_is(endpoint: Server) -> None:
    answer = endpoint.post("/v1/classify", {"texts": TEXTS}).json()
    assert answer["model"] == "emotion@0123456789ab"
    for got, want in zip(answer["predictions"], EXPECTED, strict=True):
        assert got == {
            "label": want.label,
            "score": want.score,
            "scores": want.scores,
            "truncated": False,
            "tokens": want.tokens,
        }
        assert list(got["scores"]) == list(want.scores)
        assert sum(got["scores"].values()) == pytest.approx(1)


def test_words_that_pulled(endpoint: Server) -> None:
    """The same figures that the model gives when it is asked for each text without each word."""
    texts = ["so glad 😀 now", "alone", LONG]
    answer = endpoint.post("/v1/classify", {"texts": texts, "explain": True}).json()["predictions"]
    dummy = Dummy()
    for text, got in zip(texts, answer, strict=True):
        tokens = dummy.encode([text])
        label = int(dummy.forward(tokens).argmax())
        whole = log_odds(dummy.forward(tokens), np.array([label]), dummy.calibration)[0]
        assert [text[word["start"] : word["end"]] for word in got["words"]] == [word["word"] for word in got["words"]]
        assert len(got["words"]) == min(len(text.split()), MAX_LENGTH - 2)
        for word in got["words"]:
            left = dummy.forward(dummy.encode([text[: word["start"]] + text[word["end"] :]]))
            assert word["effect"] == pytest.approx(whole - log_odds(left, np.array([label]), dummy.calibration)[0])
    assert "words" not in endpoint.post("/v1/classify", {"texts": texts}).json()["predictions"][0]


def test_too_many_words_to_explain(endpoint: Server) -> None:
    answer = endpoint.post("/v1/classify", {"texts": ["a b c d e f g h i j k"] * 5, "explain": True})
    assert answer.status_code == 413
    assert answer.json()["error"] == "explaining costs one more text for each word: 55 words, and 50 is the limit"


def test_top_k_keeps_the_likeliest(endpoint: Server) -> None:
    answer = endpoint.post("/v1/classify", {"texts": TEXTS[:1], "top_k": 2}).json()
    assert answer["predictions"][0]["scores"] == dict(list(EXPECTED[0].scores.items())[:2])
    assert len(endpoint.post("/", {"inputs": "a", "parameters": {"top_k": 99}}).json()[0]) == len(LABELS)


def test_long_texts_are_cut_and_it_says_so(endpoint: Server) -> None:
    prediction = endpoint.post("/v1/classify", {"texts": [LONG]}).json()["predictions"][0]
    assert prediction["truncated"] is True and prediction["tokens"] == MAX_LENGTH


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/classify", {"texts": ["short", LONG], "truncate": False}),
        ("/predict", {"inputs": [["short"], [LONG]], "truncate": False}),
    ],
)
def test_long_texts_are_refused_where_they_must_not_be_cut(endpoint: Server, path: str, body: Any) -> None:
    answer = endpoint.post(path, body)
    assert answer.status_code == 422 and "text 1 " in answer.json()["error"] and "16 tokens" in answer.json()["error"]


# Hugging Face


def test_hugging_face_nests_even_one_text(endpoint: Server) -> None:
    assert endpoint.post("/", {"inputs": TEXTS[0]}).json() == [pairs(0)]
    assert endpoint.post("/", {"inputs": TEXTS}).json() == [pairs(0), pairs(1), pairs(2)]
    two = endpoint.post("/", {"inputs": TEXTS[0], "parameters": {"top_k": 2, "function_to_apply": "softmax"}})
    assert two.json() == [pairs(0)[:2]]
    old = endpoint.post("/", {"inputs": TEXTS[0], "parameters": None, "options": {"wait_for_model": True}})
    assert old.json() == [pairs(0)]


def test_other_functions_are_of_the_logits(endpoint: Server) -> None:
    logits = logits_of(TEXTS[:1])[0]
    for function, values in (("none", logits), ("sigmoid", 1 / (1 + np.exp(-logits.astype(float))))):
        body = {"inputs": TEXTS[0], "parameters": {"function_to_apply": function}}
        got = endpoint.post("/", body).json()[0]
        assert [item["score"] for item in got] == sorted((item["score"] for item in got), reverse=True)
        assert {item["label"]: item["score"] for item in got} == pytest.approx(dict(zip(LABELS, values, strict=True)))


# text-embeddings-inference


def test_tei_is_flat_for_one_and_nested_for_a_batch(endpoint: Server) -> None:
    assert endpoint.post("/predict", {"inputs": TEXTS[0]}).json() == pairs(0)
    assert endpoint.post("/predict", {"inputs": [TEXTS[0]]}).json() == pairs(0)
    batch = endpoint.post("/predict", {"inputs": [[text] for text in TEXTS], "truncate": True, "raw_scores": False})
    assert batch.json() == [pairs(0), pairs(1), pairs(2)]
    assert endpoint.post("/predict", {"inputs": [[TEXTS[0]]]}).json() == [pairs(0)]


def test_tei_raw_scores_are_logits(endpoint: Server) -> None:
    got = endpoint.post("/predict", {"inputs": TEXTS[0], "raw_scores": True}).json()
    assert {item["label"]: item["score"] for item in got} == pytest.approx(
        dict(zip(LABELS, logits_of(TEXTS[:1])[0], strict=True))
    )


@pytest.mark.parametrize(
    "inputs", [["a", "b"], [["a", "b"]], [["a"], "b"], [], [[]], 3, None, {"text": "a"}, [["a"], [1]]]
)
def test_tei_pairs_are_refused_with_the_way_to_send_a_batch(endpoint: Server, inputs: Any) -> None:
    answer = endpoint.post("/predict", {"inputs": inputs})
    assert answer.status_code == 422 and '[["first"], ["second"]]' in answer.json()["error"]


# infinity, vLLM


def test_infinity(endpoint: Server) -> None:
    answer = endpoint.post("/classify", {"model": "emotion", "input": TEXTS, "raw_scores": False}).json()
    tokens = sum(prediction.tokens for prediction in EXPECTED)
    assert answer.pop("id") and answer.pop("created") > 1.7e9
    assert answer == {
        "object": "classify",
        "model": "emotion@0123456789ab",
        "data": [pairs(0), pairs(1), pairs(2)],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


@pytest.mark.parametrize("model", [None, "", "emotion", "emotion@0123456789ab", "default/not-specified"])
def test_infinity_takes_one_text_and_any_of_its_names(endpoint: Server, model: str | None) -> None:
    body = {"input": TEXTS[0], "raw_scores": True, "user": "me"} | ({} if model is None else {"model": model})
    assert endpoint.post("/classify", body).json()["data"][0][0]["score"] == pytest.approx(logits_of(TEXTS[:1]).max())


def test_infinity_has_no_other_model(endpoint: Server) -> None:
    answer = endpoint.post("/classify", {"input": "a", "model": "bert"})
    assert answer.status_code == 404 and "'emotion'" in answer.json()["error"]


# KServe V2


def v2(data: Any, shape: list[int], **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "text", "shape": shape, "datatype": "BYTES", "data": data}], **more}


def test_v2_json(endpoint: Server) -> None:
    answer = endpoint.post("/v2/models/emotion/infer", v2(TEXTS, [3], id="mine")).json()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("mine", "emotion", "0123456789ab")
    assert answer["parameters"] == {"labels": list(LABELS)}
    label, scores = answer["outputs"]
    assert label == {"name": "label", "datatype": "BYTES", "shape": [3], "data": [p.label for p in EXPECTED]}
    assert (scores["name"], scores["datatype"], scores["shape"]) == ("scores", "FP32", [3, 3])
    assert scores["data"] == pytest.approx([p.scores[name] for p in EXPECTED for name in LABELS])


def test_v2_shapes_outputs_and_versions(endpoint: Server) -> None:
    column = endpoint.post("/v2/models/emotion/infer", v2([[t] for t in TEXTS], [3, 1], outputs=[{"name": "label"}]))
    assert [output["name"] for output in column.json()["outputs"]] == ["label"]
    flat = endpoint.post("/v2/models/emotion/versions/0123456789ab/infer", v2(TEXTS, [3, 1]))
    assert flat.json()["outputs"][0]["data"] == [p.label for p in EXPECTED]
    for path in ("/v2/models/emotion/versions/1/infer", "/v2/models/bert/infer"):
        assert endpoint.post(path, v2(TEXTS, [3])).status_code == 404


def binary(texts: list[bytes], shape: list[int] | None = None, **more: Any) -> tuple[bytes, dict[str, str]]:
    tail = b"".join(struct.pack("<I", len(text)) + text for text in texts)
    tensor = {
        "name": "text",
        "shape": shape or [len(texts)],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": len(tail)},
    }
    header = json.dumps({"inputs": [tensor], **more}).encode()
    return header + tail, {
        "Inference-Header-Content-Length": str(len(header)),
        "Content-Type": "application/octet-stream",
    }


def test_v2_binary(endpoint: Server) -> None:
    body, headers = binary([t.encode() for t in TEXTS], parameters={"binary_data_output": True})
    answer = endpoint.post("/v2/models/emotion/infer", data=body, headers=headers)
    length = int(answer.headers["Inference-Header-Content-Length"])
    assert answer.headers["Content-Type"] == "application/octet-stream"
    label, scores = json.loads(answer.content[:length])["outputs"]
    sizes = [output["parameters"]["binary_data_size"] for output in (label, scores)]
    assert sum(sizes) == len(answer.content) - length and "data" not in label and "data" not in scores
    table = np.frombuffer(answer.content[length + sizes[0] :], "<f4").reshape(scores["shape"])
    assert table == pytest.approx(np.array([[p.scores[name] for name in LABELS] for p in EXPECTED]))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"inputs": []}, "inputs: must not be empty"),
        (v2(TEXTS, [2]), "the shape says 2 texts, but data holds 3"),
        (v2(TEXTS, [1, 3]), "must be [texts] or [texts, 1]"),
        (v2(None, [1]), "either `data` or `parameters.binary_data_size`"),
        (v2([1], [1]), "data[0]"),
        (v2(["a"], [1], outputs=[{"name": "logits"}]), "must be 'label' or 'scores'"),
        (v2(["a"], [1], outputs=[{"name": "label", "parameters": {"classification": 2}}]), "classification"),
        (v2(["a"], [1], outputs=[{"name": "label", "parameters": {"binary_data": 1}}]), "binary_data"),
    ],
)
def test_v2_shapes_that_do_not_fit(endpoint: Server, change: Any, sentence: str) -> None:
    answer = endpoint.post("/v2/models/emotion/infer", change)
    assert answer.status_code == 422 and sentence in answer.json()["error"]


def test_v2_about(endpoint: Server) -> None:
    for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/emotion", "/v2/models/emotion/ready"):
        assert endpoint.get(path).status_code == 200, path
    metadata = endpoint.get("/v2/models/emotion").json()
    assert metadata["versions"] == ["0123456789ab"] and metadata["outputs"][1]["shape"] == [-1, 3]
    assert endpoint.get("/v2/models/bert").status_code == endpoint.get("/v2/models/bert/ready").status_code == 404


# About


def test_info(endpoint: Server) -> None:
    info = endpoint.get("/info").json()
    assert (info["model"], info["labels"], info["state"]) == ("emotion@0123456789ab", list(LABELS), "ready")
    assert info["limits"] == {"max_texts": 50, "max_body_bytes": 20_000, "max_length": MAX_LENGTH, "timeout_s": 3}
    assert info["swap"]["state"] == "idle" and info["versions"]["emoray"]


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_load_nothing_from_elsewhere(endpoint: Server, path: str) -> None:
    page = endpoint.get(path)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for word in ("http://", "https://", "//cdn", "@import", "stylesheet", "src="):
        assert word not in page.text.replace("xmlns='http://www.w3.org/2000/svg'", ""), word


def test_request_ids(endpoint: Server) -> None:
    assert endpoint.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = endpoint.get("/nowhere", headers={"X-Request-Id": "not {mine}"}).headers["x-request-id"]
    assert len(made) == 32 and made.isalnum()


def test_head_has_no_body(endpoint: Server) -> None:
    answer = endpoint.session.head(endpoint.url + "/health", timeout=5)
    assert answer.status_code == 200 and answer.content == b"" and int(answer.headers["content-length"]) > 0
