"""Reads a data set from the Hugging Face Hub, or from the copy of it that `datasets` keeps.

`datasets` takes most of a second to import, so nothing here imports it before a Hub id is really to be read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from emoray import hub
from emoray.data_files import SPLIT_OF, Source
from emoray.data_formats import Columns, Rows, missing_columns, take_table
from emoray.wording import count, first_line, listing

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def is_id(dataset: str) -> bool:
    """Whether it has the form of a Hub id: `name` or `owner/name`, without a data file's ending."""
    return _ID.fullmatch(dataset) is not None and not re.search(
        r"\.(jsonl?|ndjson|[ct]sv|parquet|txt|gz|zip|zst|arrow|xlsx?)$", dataset.lower()
    )


def read(dataset: str, columns: Columns, source: Source, hint: str = "") -> None:
    """Read a Hub data set into `source`; problems are added there, never raised.

    Args:
        dataset: the Hub id.
        columns: names of the columns to read.
        source: gets the rows of every split with a usual name.
        hint: what exists here under a similar name, for the message.
    """
    try:
        import datasets
    except ImportError as error:
        source.problems.append(f"no such path here{hint}, and the Hub needs 'datasets' ({error}): pip install datasets")
        return
    offline = not hub.reachable()
    try:
        with _without_network(offline):
            loaded = datasets.load_dataset(dataset)
    except Exception as error:  # `datasets` raises what its many back ends raise
        source.problems.append(_sentence(dataset, error, offline, hint))
        return
    left_out = []
    for name, split in loaded.items():
        usual = SPLIT_OF.get(str(name).lower())
        if usual is None:
            left_out.append(str(name))
            continue
        source.splits.setdefault(usual, []).append(_rows(split, str(name), columns, source.problems))
    if left_out:
        source.warnings.append(f"{count(len(left_out), 'split')} of the Hub data set not read: {listing(left_out)}.")


def _rows(split: Any, name: str, columns: Columns, problems: list[str]) -> Rows:
    rows = Rows(name, "row")
    problems_here = missing_columns(name, columns, split.column_names)
    if not problems_here:
        feature = split.features[columns.label]
        rows.names = tuple(feature.names) if hasattr(feature, "names") else None
        take_table(
            split.select_columns(columns.names()).with_format("arrow")[:],
            rows,
            columns,
            problems_here,
        )
    rows.whole = not problems_here
    problems.extend(problems_here)
    return rows


@contextmanager
def _without_network(offline: bool) -> Iterator[None]:
    """The offline switch of both libraries, which is read from the environment only at their import."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if offline:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _sentence(dataset: str, error: Exception, offline: bool, hint: str) -> str:
    reason = first_line(error)
    if offline or isinstance(error, ConnectionError) or "LocalEntryNotFoundError" in str(error):
        why = "offline mode is on" if hub.is_offline() else "the Hugging Face Hub is not in reach"
        return (
            f"'{dataset}' is not a path here{hint}, {why} and no copy of it is cached: "
            "set data.dataset to a local file or folder, or load it once where the Hub is in reach "
            "and point HF_HOME at that cache (with HF_HUB_OFFLINE=1)"
        )
    if type(error).__name__ == "DatasetNotFoundError":
        return (
            f"'{dataset}' is not a path here{hint} and no data set on the Hub that you may read: "
            "correct data.dataset, or log in for a private or gated one (hf auth login)"
        )
    return f"'{dataset}' can't be loaded from the Hub ({reason}): set data.dataset to a local copy of it"
