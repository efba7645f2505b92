"""Fine-tune BERT encoders for emotion classification with Ray: exactly, and without padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emoray.classifier import Classifier

__version__ = "0.1.0"
__all__ = ["Classifier", "__version__"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: `emoray --help` must not wait for torch.
    if name == "Classifier":
        from emoray.classifier import Classifier

        return Classifier
    raise AttributeError(f"module 'emoray' has no attribute '{name}'")
