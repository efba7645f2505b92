"""What an actor of `emoray predict` does: read a piece of the input, score its rows, write them as a part"""

from __future__ import annotations

import json
import pickle
import socket
from collections import Counter
from dataclasses import dataclass
from typing import Any

from emoray.batch_format import Format
from emoray.batch_output import Output
from emoray.batch_rows import Piece, fault_of, rows_of, table_of, texts_in
from emoray.errors import CheckpointError, EmorayError, StorageError
from emoray.prediction import Prediction
from emoray.run import Attempt


@dataclass(frozen=True)
class Job:
    """What all actors of a command must know.

    Attributes:
        model: its `location` and `fingerprint`.
        output, kind: as `Output` takes them.
        attempt: the command's number, which lets it write.
        text_column: where the texts are.
        form: how the output looks.
        cpus: threads of an actor.
        use_gpu: whether it computes on a GPU.
    """

    model: dict[str, str]
    output: str
    kind: str
    attempt: int
    text_column: str
    form: Format
    cpus: int
    use_gpu: bool


class Scorer:
    """A model in an actor; Ray Data makes one an actor, and gives it pieces.

    Errors that a person must mend come back as values: Ray would wrap them, and try some of them again.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._output = Output(job.output, job.kind, job.kind)
        self._attempt = Attempt(self._output.home, job.attempt)
        self._classifier: Any = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score one piece.

        Args:
            row: `piece`, a `Piece` as JSON.

        Returns:
            `number` of the piece, and `note` (what is known of the part, as JSON) or `error` (pickled).
        """
        given = json.loads(row["piece"])
        piece = Piece(**{**given, "names": tuple(given["names"])})
        try:
            return {"number": piece.number, "note": json.dumps(self._score(piece)), "error": b""}
        except (CheckpointError, StorageError) as error:
            return self._failed(piece, type(error)(f"Node {socket.gethostname()}: {error}"))
        except EmorayError as error:
            return self._failed(piece, error)

    def _failed(self, piece: Piece, error: EmorayError) -> dict[str, Any]:
        return {"number": piece.number, "note": "", "error": pickle.dumps(error)}

    def _score(self, piece: Piece) -> dict[str, Any]:
        if self._classifier is None:
            self._classifier = self._load()
        column = self._job.text_column
        faults: list[str | None]
        if piece.kind == "parquet":
            kept = table_of(piece)
            texts = texts_in(kept, column) if column in kept.column_names else [None] * kept.num_rows
            faults = [None] * len(texts)
        else:
            kept = rows_of(piece)
            texts = [row.values.get(column) for row in kept]
            faults = [row.fault for row in kept]
        verdicts: list[Any] = [fault or fault_of(text) for fault, text in zip(faults, texts, strict=True)]
        good = [place for place, fault in enumerate(verdicts) if fault is None]
        for place, prediction in zip(good, self._classifier([texts[place] for place in good]), strict=True):
            verdicts[place] = prediction
        header = piece.number == 0 or not self._output.is_file
        note = {"rows": len(verdicts), "errors": len(verdicts) - len(good), "labels": _count(verdicts)}
        self._keep(piece.number, self._job.form.encode(kept, verdicts, header), note)
        return note

    def _load(self) -> Any:
        import torch

        from emoray.classifier import Classifier
        from emoray.process import set_up_torch

        self._attempt.must_be_seen("choose an --output that every node can write")
        device = "cuda" if self._job.use_gpu else "cpu"
        set_up_torch(self._job.cpus, torch.device(device))
        location, fingerprint = self._job.model["location"], self._job.model["fingerprint"]
        classifier = Classifier.load(location, device)
        if classifier.fingerprint != fingerprint:
            raise CheckpointError(
                f"{location}: is another model here ({classifier.fingerprint}) than where the command was given "
                f"({fingerprint}): name a place that all nodes see"
            )
        return classifier

    def _keep(self, number: int, content: bytes, note: dict[str, Any]) -> None:
        try:
            self._output.keep(number, content, note, self._attempt)
        except StorageError:
            self._attempt.check()  # a newer command sweeps away what is half written: that is not the disk's fault
            raise


def _count(verdicts: list[Prediction | str]) -> dict[str, int]:
    return dict(Counter(verdict.label for verdict in verdicts if isinstance(verdict, Prediction)))
