"""Every error a user can meet, as one tree.

    EmorayError                 something the user can mend; shown as one message, never as a traceback
    ├── ConfigError             a config file or an override is wrong (all problems at once)
    ├── DataError               a data set can't be read or is malformed (all problems at once)
    ├── ModelError              an encoder or a tokenizer can't be loaded or doesn't fit the data
    ├── StorageError            a path or URI can't be read or written
    ├── CheckpointError         a checkpoint is damaged or incomplete
    ├── MissingExtraError       a part of emoray needs a library that isn't installed
    ├── ClusterError            Ray can't be reached or can't give what the config asks for
    └── RunError                a run can't start or go on
        ├── RunExistsError      the run's folder holds another recipe, or may not be touched
        ├── FencedError         a newer attempt at the same run has taken over
        ├── NotFiniteError      the loss became NaN or infinite
        └── InterruptedRunError the run was asked to stop; the same command continues it

Messages follow one rule: the value that was met, the rule it breaks, the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence

from emoray.wording import count


class EmorayError(Exception):
    """Base of all errors that are the user's to mend."""


class ProblemsError(EmorayError):
    """Several problems found in one pass, listed together.

    Args:
        subject: what was checked, e.g. a file name.
        problems: one sentence each, ordered as found.
    """

    def __init__(self, subject: str, problems: list[str]) -> None:
        self.subject = subject
        self.problems = list(problems)
        title = f"{subject}: {count(len(problems), 'problem')}"
        super().__init__("\n".join([title, *(f"  - {problem}" for problem in problems)]))

    def __reduce__(self) -> tuple[type[ProblemsError], tuple[str, list[str]]]:
        return type(self), (self.subject, self.problems)


class ConfigError(ProblemsError):
    """A config file or an override is wrong."""


class DataError(ProblemsError):
    """A data set can't be read or is malformed."""


class ModelError(EmorayError):
    """An encoder or a tokenizer can't be loaded or doesn't fit the data."""


class StorageError(EmorayError):
    """A path or URI can't be read or written.

    Args:
        passing: whether the same may succeed a moment later, as after an error of the network: a run is taken up again.
    """

    def __init__(self, message: str, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class CheckpointError(EmorayError):
    """A checkpoint is damaged or incomplete."""


class MissingExtraError(EmorayError):
    """A part of emoray needs a library that isn't installed."""


class ClusterError(EmorayError):
    """Ray can't be reached or can't give what the config asks for."""


class RunError(EmorayError):
    """A run can't start or go on."""


class RunExistsError(RunError):
    """The run's folder holds another recipe, or may not be touched."""


class FencedError(RunError):
    """A newer attempt at the same run has taken over."""


class NotFiniteError(RunError):
    """The loss became NaN or infinite."""


class InterruptedRunError(RunError):
    """The run was asked to stop; the same command continues it.

    Args:
        signals: those that asked, if any did; the command ends with the status of the first.
    """

    def __init__(self, message: str, signals: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.signals = list(signals)
