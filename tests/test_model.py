"""Encoders as they come: a head of other labels is drawn anew, and what can't be loaded is told with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import LABELS, object_store

from emoray import Classifier, checkpoint, classifier, hub, model
from emoray.config import ModelConfig
from emoray.errors import ModelError


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_answers", lambda: False)


def test_a_classifier_of_other_labels_gives_its_encoder(trained_run: Path) -> None:
    config = ModelConfig(pretrained=str(trained_run / "best"), max_length=32)
    same, fewer, again = (model.load(config, labels, seed=1) for labels in (LABELS, LABELS[:3], LABELS[:3]))
    kept = same.state_dict()
    for name, tensor in fewer.state_dict().items():
        assert name.startswith("classifier.") or torch.equal(tensor, kept[name])
        assert torch.equal(tensor, again.state_dict()[name])
    assert fewer.classifier.weight.shape[0] == 3 and fewer.classifier.weight.std() > 0


def test_the_hubs_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("you need to have sentencepiece installed\nto convert it")

    monkeypatch.setattr(model.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ModelError, match=r"owner/bert: the tokenizer of its cached copy .*: you need to have sentenc"):
        model.load_tokenizer("owner/bert")
    monkeypatch.setattr(hub, "_answers", lambda: True)
    with pytest.raises(ModelError, match=r"the Hub has no tokenizer of it .*: you need to have sentencepiece.*hf auth"):
        model.load_tokenizer("owner/bert")


def test_a_copy_of_a_model_goes_with_its_classifier(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that is given one model after the other would fill its disk."""
    monkeypatch.setattr(checkpoint.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(classifier, "find_model", lambda location: object_store(trained_run / "best"))
    made = Classifier.load("s3://bucket/model")
    (copy,) = tmp_path.glob("emoray-checkpoint-*")
    assert made.folder == copy and len(made.fingerprint) == 12
    del made
    assert not copy.exists()
