"""emoray from Python: train, classify, say why, score a split. `python examples/from_python.py` takes about a minute.

Trains on the sentences in the package, as `emoray quickstart` does; give another config's path for your own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from emoray import Classifier, config, quickstart
from emoray.console import TrainingDisplay
from emoray.evaluation import evaluate
from emoray.on_ray.train import train


def main() -> None:
    given = sys.argv[1] if len(sys.argv) > 1 else quickstart.config_path()
    recipe = config.load(given, ["run.name=from-python", *sys.argv[2:]])  # overrides, as on the command line
    if given == quickstart.config_path():
        quickstart.make_encoder(Path(recipe.model.pretrained))  # a small BERT with random weights

    with TrainingDisplay() as display:
        results = train(recipe, display)  # given again, it goes on, or says that the run is finished
    print(f"test accuracy {results['test']['accuracy']:.4f}")

    classifier = Classifier.load(f"{recipe.run.storage_path}/{recipe.run.name}")
    texts = ["i feel wonderful today", "leave me alone, all of you"]
    for text, prediction, explanation in zip(texts, classifier(texts), classifier.explain(texts), strict=True):
        print(f"{text!r}: {prediction.label} {prediction.score:.2f}; {explanation.text(3)}")

    scored = evaluate(classifier, None, "validation")
    for line in scored.per_label():
        print(f"{line}")
    low, high = scored.intervals()["accuracy"]
    print(f"validation accuracy {scored.metrics()['accuracy']:.4f}, 95% interval {low:.4f} to {high:.4f}")


if __name__ == "__main__":
    main()
