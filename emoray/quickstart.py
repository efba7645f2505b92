"""The main job in small, on what ships in the package: sentences, a WordPiece vocabulary, the shape of a tiny BERT."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

SENTENCES = (
    "I can't believe how lucky I am, what a wonderful day!",
    "Tengo miedo de quedarme sola esta noche.",
    "How dare they cancel my order without a word?",
)


def config_path() -> Path:
    """configs/quickstart.yaml, which the wheel carries inside the package."""
    packed = Path(str(resources.files("emoray"))) / "quickstart_data" / "quickstart.yaml"
    return packed if packed.exists() else Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def make_encoder(folder: Path) -> None:
    """Write the tokenizer and the config of a small BERT; its weights come from the seed (`model.from_scratch`).

    The vocabulary was trained on the package's training sentences with `tokenizers.BertWordPieceTokenizer` (4,000
    pieces, at least two occurrences). It ships because that trainer breaks ties differently each time.
    """
    from transformers import BertConfig, BertTokenizer

    pieces = resources.files("emoray").joinpath("quickstart_vocab.txt").read_text(encoding="utf-8").splitlines()
    folder.mkdir(parents=True, exist_ok=True)
    BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, do_lower_case=True).save_pretrained(folder)
    BertConfig(
        vocab_size=len(pieces),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=128,
        hidden_dropout_prob=0.3,
    ).save_pretrained(folder)
