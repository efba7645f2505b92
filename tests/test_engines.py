"""Engines give the model's own answers; exports are compared, refused where they differ, never used when damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import LABELS, Emoray, object_store, sentences

from emoray import Classifier, checkpoint
from emoray import export as exports
from emoray.classifier import find_model
from emoray.engines import choice
from emoray.engines.exports import Precision, find, locate
from emoray.errors import CheckpointError, DataError, ModelError
from emoray.evaluation import evaluate

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx isn't installed")
TEXTS = [text for label in LABELS for text in sentences(label)[::7]] + ["a", "rain " * 80]


def quiet(line: str) -> None:
    pass


def ensure(place: Path, *precisions: Precision) -> None:
    model = find_model(str(place))
    exports.ensure(model, checkpoint.fetch(model), precisions or ("fp32", "int8"), quiet)


@pytest.fixture(scope="module")
def exported(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with both exports beside it; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("exported") / "best"
    shutil.copytree(trained_run / "best", folder)
    made = exports.export(str(folder), ("fp32", "int8"), say=quiet)
    assert [found.accepted for found in made] == [True, True]
    return folder


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "copy")


def test_onnx_says_what_torch_says_whatever_the_company(exported: Path) -> None:
    torch, onnx, int8 = (Classifier.load(exported, engine=name) for name in ("torch", "onnx", "onnx-int8"))
    want, tokens = torch.logits(TEXTS)
    np.testing.assert_allclose(onnx.logits(TEXTS)[0], want, atol=2e-5)
    alone = np.concatenate([onnx.forward(tokens.take(np.array([row]))) for row in range(len(TEXTS))])
    np.testing.assert_allclose(alone, want, atol=2e-5)
    assert (int8.logits(TEXTS)[0].argmax(1) == want.argmax(1)).mean() > 0.9
    assert [onnx.engine.name, int8.engine.name] == ["onnx", "onnx-int8"]
    # What hangs on the classifier works with any engine.
    assert onnx.explain(TEXTS[:1])[0].label == torch.explain(TEXTS[:1])[0].label
    assert evaluate(onnx, None, "test").metrics()["f1"] == evaluate(torch, None, "test").metrics()["f1"]


def test_an_encoder_that_cannot_be_packed_is_exported_padded(tmp_path: Path) -> None:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    from emoray.engines.graph import export
    from emoray.engines.onnx import OnnxEngine
    from emoray.forward import Forward, score
    from emoray.tokens import Tokens

    model = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=90, dim=32, n_layers=2, n_heads=2, hidden_dim=64, num_labels=4)
    ).eval()
    tokens = Tokens.of([np.arange(1, size, dtype=np.int32) for size in (4, 9, 3, 30, 17, 2)])
    want = score(Forward(model), tokens, np.arange(6), 256)
    export(model, tmp_path / "model.onnx")
    engine = OnnxEngine("onnx", tmp_path / "model.onnx", 4, 0, threads=1)
    np.testing.assert_allclose(engine.forward(tokens), want, atol=2e-5)


def test_an_export_says_how_far_it_agrees(exported: Path, emoray: Emoray, tmp_path: Path) -> None:
    model = shutil.copytree(exported, tmp_path / "again")
    shutil.rmtree(model / "onnx")
    answer = emoray("export", model, "--precision", "int8", "--json")
    assert answer.status == 0, answer.err
    (facts,) = json.loads(answer.out)
    assert facts["precision"] == "int8" and facts["source"] == checkpoint.fingerprint(model)
    parity = facts["parity"]
    assert (parity["split"], parity["rows"]) == ("validation", 32)
    assert parity.keys() >= {"same_label", "largest_difference", "accuracy", "accuracy_of_model", "f1", "f1_of_model"}
    checkpoint.verify(model)  # the model's own manifest is as final as before
    assert Classifier.load(model).fingerprint == Classifier.load(exported).fingerprint


def test_int8_that_loses_too_much_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch, emoray: Emoray) -> None:
    monkeypatch.setattr(exports, "MAY_LOSE", -0.5)
    answer = emoray("export", copy, "--precision", "int8")
    assert answer.status == 1 and "NOT USED: int8 loses" in answer.out
    assert not (copy / "onnx/int8/model.onnx").exists()
    with pytest.raises(ModelError, match="points of accuracy"):
        Classifier.load(copy, engine="onnx-int8")
    chosen = Classifier.load(copy, engine="auto").engine
    assert chosen.name != "onnx-int8" and "points of accuracy" in chosen.figures["onnx-int8"]["left_out"]


@pytest.mark.slow
def test_without_labels_int8_is_not_used(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "onnx")
    facts = json.loads((copy / "emoray.json").read_text())
    facts["config"]["data"]["dataset"] = str(tmp_path / "gone")
    (copy / "emoray.json").write_text(json.dumps(facts))
    (copy / "manifest.json").write_text(json.dumps({"files": checkpoint.sums(copy)}))
    with pytest.raises(DataError, match="--data"):
        exports.export(str(copy), ("int8",), say=quiet)
    ensure(copy)
    fp32, int8 = find(copy, "fp32"), find(copy, "int8")
    assert fp32 is not None and fp32.accepted and int8 is not None and not int8.accepted
    assert fp32.facts["parity"]["split"] == "sentences of the package"


def test_damaged_and_stale_exports_are_refused_and_made_anew(copy: Path) -> None:
    graph = copy / "onnx/fp32/model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"sha256 differs.*emoray export"):
        Classifier.load(copy, engine="onnx")
    facts = json.loads((copy / "onnx/int8/export.json").read_text())
    (copy / "onnx/int8/export.json").write_text(json.dumps({**facts, "source": "another"}))
    (copy / "onnx/int8/manifest.json").write_text(json.dumps({"files": checkpoint.sums(copy / "onnx/int8")}))
    with pytest.raises(CheckpointError, match="made from model another"):
        Classifier.load(copy, engine="onnx-int8")
    ensure(copy)
    assert Classifier.load(copy, engine="onnx").engine.name == "onnx"
    assert Classifier.load(copy, engine="onnx-int8").engine.name == "onnx-int8"


@pytest.mark.slow
def test_a_model_that_cannot_be_written_to_is_exported_into_the_cache(
    copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.rmtree(copy / "onnx")
    monkeypatch.setenv("EMORAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(exports.os, "access", lambda path, mode: False)  # root may write everywhere
    ensure(copy, "fp32")
    assert not (copy / "onnx").exists() and locate(copy, "fp32")[1].exists()
    assert Classifier.load(copy, engine="onnx").engine.name == "onnx"


def test_a_stale_export_that_cannot_be_replaced_hides_no_newer_one(
    copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (copy / "onnx/fp32/export.json").open("a") as stream:
        stream.write(" ")
    with pytest.raises(CheckpointError):
        find(copy, "fp32")
    monkeypatch.setenv("EMORAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(exports.os, "access", lambda path, mode: False)
    ensure(copy, "fp32")
    assert Classifier.load(copy, engine="onnx").engine.name == "onnx"


def test_a_model_on_an_object_store_gets_its_exports_there(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(copy / "onnx")
    monkeypatch.setattr(exports, "find_model", lambda location: object_store(copy))
    made = exports.export("s3://bucket/model", ("fp32", "int8"), say=quiet)
    assert [one.accepted for one in made] == [True, True]
    assert find(copy, "fp32") is not None and find(copy, "int8") is not None


@pytest.mark.parametrize("off", [0.1, np.nan])
def test_a_graph_that_gives_other_scores_is_no_export(exported: Path, off: float) -> None:
    model = Classifier.load(exported)
    logits, tokens = model.logits(TEXTS)
    reference = exports._Reference("sentences", tokens, None, logits, tokens)
    verdict = lambda given: exports._compare("fp32", reference, given, model.calibration)["accepted"]  # noqa: E731
    assert verdict(logits + 1e-5)
    assert not verdict(logits + np.float32([off, *[0] * (len(LABELS) - 1)]))


def test_all_of_a_sorted_file_is_compared() -> None:
    assert exports._spread(3, 4000).tolist() == [0, 1, 2]
    kept = exports._spread(10_000, 4000)
    assert len(kept) == 4000 and kept[0] == 0 and kept[-1] == 9999


def test_auto_takes_the_fastest_and_int8_only_where_it_pays(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def expect(wins: str, **times: float) -> None:
        monkeypatch.setattr(choice, "measure", lambda engine, _: {"batch_ms_a_text": times[engine.name.split("-")[-1]]})
        engine = Classifier.load(exported, engine="auto").engine
        assert engine.name == wins and len(engine.figures) == len(times)

    expect("onnx", onnx=1.0, int8=0.99, torch=1.5)
    expect("torch", onnx=1.0, int8=0.99, torch=0.8)
    expect("onnx-int8", onnx=1.0, int8=0.5)
    monkeypatch.setattr(choice.onnx_engine, "is_there", lambda: False)
    assert Classifier.load(exported, engine="auto").engine.name == "torch"


def test_no_export_is_one_clear_message(trained_run: Path, tmp_path: Path, emoray: Emoray) -> None:
    model = shutil.copytree(trained_run / "best", tmp_path / "best")
    with pytest.raises(ModelError, match=r"there is no export: `emoray export .* --precision fp32`"):
        Classifier.load(model, engine="onnx")
    answer = emoray("export", model, "--precision", "int4")
    assert answer.status == 2 and "not one of 'fp32', 'int8'" in answer.err
    assert find_model(str(trained_run)).location.endswith("best")
