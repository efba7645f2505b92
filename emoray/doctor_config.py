"""`emoray doctor` on a config: is it valid, and is what it names in reach and well formed?"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from emoray.doctor_findings import Case, Finding, ok, problem, warning
from emoray.doctor_machine import existing
from emoray.errors import ConfigError, DataError, EmorayError, StorageError

_MOST_CUT = 0.05
"""Share of texts cut to max_length above which that is reported."""


def config(case: Case) -> Iterator[Finding]:
    from emoray.config import load
    from emoray.task import with_absolute_paths

    if not case.has_config:
        return
    name = case.path or "overrides"
    try:
        case.config = with_absolute_paths(load(case.path, case.overrides))
    except ConfigError as error:
        remedy = "correct these keys; emoray show CONFIG prints a config as it is understood"
        yield problem("config", "; ".join(error.problems), remedy)
    else:
        yield ok("config", f"{name} is valid")


def storage(case: Case) -> Iterator[Finding]:
    """Storage as this process sees it; the cluster's nodes are asked where one is joined.

    A nameless file is really written: permissions alone say nothing to root, on NFS, or where a quota is used up.
    """
    from emoray.storage import Storage

    try:
        folder = Storage(case.storage_path)
        folder.must_be_writable()
        if folder.local_path is not None:
            with tempfile.TemporaryFile(dir=existing(folder.local_path)) as probe:
                probe.write(b"x")
    except (StorageError, OSError) as error:
        yield problem("storage", str(error), "set run.storage_path to a folder or URI that you may write")
    else:
        yield ok("storage", f"{case.storage_path} can be written")


def the_hub(case: Case) -> Iterator[Finding]:
    """The Hugging Face Hub, or a cached copy, where the config names something that isn't a local path."""
    from emoray import data_hub, hub

    if case.config is None:
        return
    encoder, source = case.config.model.pretrained, case.config.data.dataset
    wanted = {} if os.path.isdir(encoder) else {f"model.pretrained={encoder}": _is_cached("models", encoder)}
    if source != "quickstart" and not os.path.exists(os.path.expanduser(source)) and data_hub.is_id(source):
        wanted[f"data.dataset={source}"] = _is_cached("datasets", source)
    missing = [name for name, cached in wanted.items() if not cached]
    if not wanted:
        return
    if hub.reachable():
        yield ok("Hub", f"in reach, for {', '.join(wanted)}")
    elif missing:
        why = "switched off by HF_HUB_OFFLINE" if hub.is_offline() else "out of reach"
        yield problem("Hub", f"{why}, and there is no cached copy of {', '.join(missing)}", hub.REMEDY)
    elif hub.is_offline():
        yield ok("Hub", f"switched off by HF_HUB_OFFLINE; there are cached copies of {', '.join(wanted)}")
    else:
        found = f"out of reach; there are cached copies of {', '.join(wanted)}"
        yield warning("Hub", found, "set HF_HUB_OFFLINE=1 if they are meant: no command waits for the Hub then")


def _is_cached(kind: str, repository: str) -> bool:
    """Whether there is anything of a repository ("models" or "datasets"); what is read later tells if it is enough."""
    from huggingface_hub import constants

    folders = [Path(constants.HF_HUB_CACHE) / f"{kind}--{repository.replace('/', '--')}"]
    if kind == "datasets":  # as `datasets` keeps what it has prepared
        home = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
        folders.append(Path(home) / repository.replace("/", "___"))
    return any(folder.is_dir() for folder in folders)


def dataset(case: Case) -> Iterator[Finding]:
    from emoray import data

    if case.config is None:
        return
    try:
        case.dataset = data.load(case.config.data)
    except DataError as error:
        more = f"; and {len(error.problems) - 5} more problems" if len(error.problems) > 5 else ""
        found = f"{error.subject}: {'; '.join(error.problems[:5])}{more}"
        yield problem("data", found, "correct the data, or data.dataset and its columns; emoray check-data tells all")
        return
    rows = ", ".join(f"{len(split.texts):,} {name}" for name, split in case.dataset.splits.items())
    found = f"{case.dataset.source}: {rows}; {len(case.dataset.labels)} labels"
    if case.dataset.doubts:
        remedy = "have a look at these rows; training takes them as they are"
        yield warning("data", f"{found}. {' '.join(case.dataset.doubts)}", remedy)
    else:
        yield ok("data", ". ".join([found, *(note.rstrip(".") for note in case.dataset.notes)]))


def encoder(case: Case) -> Iterator[Finding]:
    """Its config and tokenizer; the weights are loaded for the step."""
    from emoray.task import prepare

    if case.config is None or case.dataset is None:
        return
    try:
        case.task = prepare(case.config, dataset=case.dataset)
    except EmorayError as error:
        remedy = "set model.pretrained to a whole folder or Hub id of an encoder, and model.max_length to what it takes"
        yield problem("encoder", str(error), remedy)
        return
    cut = np.concatenate([part.tokens.truncated for part in case.task.parts.values()])
    found = f"{case.config.model.pretrained}: {case.task.hf_config.model_type}"
    if cut.mean() > _MOST_CUT:
        most = case.config.model.max_length
        found += f"; {cut.mean():.0%} of the texts are longer than model.max_length={most} and get cut"
        yield warning("encoder", found, "raise model.max_length, as far as the encoder has positions")
    else:
        yield ok("encoder", f"{found}, {cut.sum():,} of {len(cut):,} texts get cut to model.max_length")
