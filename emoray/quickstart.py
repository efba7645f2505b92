"""The main job in small, on what ships in the package: make a tiny encoder, train, classify three sentences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from emoray import data
from emoray.config import DataConfig

SENTENCES = (
    "I still can't believe how lucky I am, what a wonderful day!",
    "Tengo miedo de quedarme sola esta noche.",
    "How dare they cancel my order without a word?",
)
_VOCABULARY = 4000


def config_path() -> Path:
    """configs/quickstart.yaml, which the wheel carries inside the package."""
    packed = Path(str(resources.files("emoray"))) / "quickstart_data" / "quickstart.yaml"
    return packed if packed.exists() else Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def make_encoder(folder: Path) -> None:
    """Train a WordPiece tokenizer on the package's sentences and write it with the config of a small BERT.

    The weights come from the seed (`model.from_scratch`), so the folder holds none.
    """
    from transformers import BertConfig, BertTokenizer

    texts = data.load(DataConfig(dataset="quickstart")).splits["train"].texts
    vocabulary = _train_wordpiece(texts)
    folder.mkdir(parents=True, exist_ok=True)
    BertTokenizer(vocab=vocabulary, do_lower_case=True).save_pretrained(folder)
    BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=128,
        hidden_dropout_prob=0.3,
    ).save_pretrained(folder)


def _train_wordpiece(texts: Sequence[str]) -> dict[str, int]:
    """A WordPiece vocabulary, piece -> id, as BERT's tokenizer reads it."""
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator(texts, vocab_size=_VOCABULARY, min_frequency=2, show_progress=False)
    vocabulary: dict[str, int] = json.loads(tokenizer.to_str())["model"]["vocab"]
    return vocabulary
