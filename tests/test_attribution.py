"""Which words pulled a prediction: checked against leaving the word out by hand, on the real path of a real model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from tiny import Emoray

from emoray import attribution
from emoray.attribution import Occlusion, explain, log_odds
from emoray.classifier import Classifier
from emoray.metrics import Calibration
from emoray.tokens import Tokens


class Lexicon:
    """A model whose logits are a sum over the words that it knows: what each word does is known."""

    labels = ("sad", "glad")
    calibration = Calibration(2.0)
    weights: ClassVar = {"lonely": -3.0, "party": 2.0, "!!!": 0.5, "雨": -1.0, "don't": -0.25, "🎉": 4.0}

    def logits(self, texts: Sequence[str]) -> tuple[Any, Tokens]:
        scores = [sum(weight * text.count(word) for word, weight in self.weights.items()) for text in texts]
        return np.array([[-s, s] for s in scores], np.float32), None  # type: ignore[return-value]

    def seen(self, texts: Sequence[str]) -> list[int]:
        return [min(len(text), 60) for text in texts]


def effects(text: str, label: str = "glad") -> dict[str, float]:
    (found,) = explain(Lexicon(), [text], [label])
    for word in found.words:
        assert text[word.start : word.end] == word.word
    return {word.word: round(word.effect, 6) for word in found.words}


def test_effects_are_the_changes_of_the_log_odds() -> None:
    # Log-odds of two labels are the difference of their logits, 2 * score, over the temperature.
    assert effects("a lonely party!!!") == {"a": 0, "lonely": -3.0, "party": 2.0, "!!!": 0.5}
    assert effects("a lonely party!!!", "sad") == {"a": 0, "lonely": 3.0, "party": -2.0, "!!!": -0.5}


def test_words_are_whole() -> None:
    assert list(effects("I don't like well-worn l’amour, 42nd")) == [
        "I",
        "don't",
        "like",
        "well-worn",
        "l’amour",
        ",",
        "42nd",
    ]
    assert effects("大雨だ🎉") == {"大": 0, "雨": -1.0, "だ": 0, "🎉": 4.0}
    assert list(effects("Мне грустно")) == ["Мне", "грустно"]
    assert list(effects("मुझे यह पसंद है!")) == ["मुझे", "यह", "पसंद", "है", "!"], "vowel signs are no letters to Python"
    assert list(effects("می\u200cروم خانه, cafe\u0301")) == ["می\u200cروم", "خانه", ",", "cafe\u0301"]


def test_what_the_model_does_not_see_has_no_effect() -> None:
    assert "party" not in effects("x" * 58 + " party")


def test_default_label_is_the_predicted_one() -> None:
    sad, glad, empty = explain(Lexicon(), ["lonely", "party", " "])
    assert (sad.label, glad.label) == ("sad", "glad")
    assert [word.effect for word in sad.words] == [3.0]
    assert empty.words == ()
    assert explain(Lexicon(), []) == []
    with pytest.raises(ValueError, match="'angry' is none of"):
        explain(Lexicon(), ["lonely"], ["angry"])


def test_strongest_first_either_way() -> None:
    (found,) = explain(Lexicon(), ["a party for lonely people!!!"], ["glad"])
    assert [word.word for word in found.strongest(3)] == ["lonely", "party", "!!!"]
    assert found.text(2) == "glad because of: lonely -3.0, party +2.0"


def test_log_odds_are_finite_where_probabilities_round_to_one() -> None:
    logits = np.array([[500.0, -500.0, -400.0], [1.0, 2.0, 0.0]], np.float32)
    found = log_odds(logits, np.array([0, 1]), Calibration())
    p = np.exp(2) / np.exp([1, 2, 0]).sum()
    assert found == pytest.approx([900.0, np.log(p / (1 - p))])


def test_on_a_trained_model(trained_run: Path) -> None:
    classifier = Classifier.load(trained_run)
    texts = ["i feel furious and late today", "sunshine, party: that is how it was"]
    for text, found, whole in zip(texts, classifier.explain(texts), classifier(texts), strict=True):
        assert found.label == whole.label
        for word in found.words:
            (left,) = classifier([text[: word.start] + text[word.end :]])
            before, after = (p.scores[found.label] for p in (whole, left))
            expected = np.log(before / (1 - before)) - np.log(after / (1 - after))
            assert word.effect == pytest.approx(expected, abs=2e-3)


def test_cut_texts_are_explained_as_far_as_they_are_seen(trained_run: Path) -> None:
    classifier = Classifier.load(trained_run)
    text = "party friends dance " * 30
    (found,) = classifier.explain([text])
    assert classifier([text])[0].truncated
    assert 0 < len(found.words) < 31
    assert classifier.seen(["short", text]) == [5, found.words[-1].end]


def test_a_long_text_is_asked_in_parts(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = Classifier.load(trained_run)
    text = "i feel furious and late today"
    (whole,) = classifier.explain([text])
    asked: list[int] = []
    logits = classifier.logits
    monkeypatch.setattr(classifier, "logits", lambda texts: asked.append(len(texts)) or logits(texts))
    monkeypatch.setattr(attribution, "_AT_ONCE", 4)
    (parts,) = classifier.explain([text])
    assert asked == [1, 4, 2]
    assert [w.effect for w in parts.words] == pytest.approx([w.effect for w in whole.words], abs=1e-4)


def test_command(emoray: Emoray, trained_run: Path) -> None:
    answer = emoray("classify", trained_run, "i feel furious and late today", "--explain")
    assert answer.status == 0
    first, second = answer.out.splitlines()
    assert "because of:" in second
    found = json.loads(emoray("classify", trained_run, "i feel furious", "--explain", "--json").out)
    assert [word["word"] for word in found["words"]] == ["i", "feel", "furious"]
    assert "words" not in json.loads(emoray("classify", trained_run, "i feel furious", "--json").out)
    assert "because of" not in emoray("classify", trained_run, "i feel furious").out
    assert first


def test_a_huge_text_is_not_copied_once_a_word() -> None:
    text = "one two three " + "x" * 1_000_000
    variants = list(Occlusion.of([text], [13]).variants())
    assert [variant[:9] for variant in variants] == [" two thre", "one  thre", "one two  "]
    assert max(map(len, variants)) < 2000
