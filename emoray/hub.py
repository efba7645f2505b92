"""Is the Hugging Face Hub in reach? Asked once, in seconds, instead of through a stack of retries."""

from __future__ import annotations

import threading
from contextlib import suppress
from functools import lru_cache

REMEDY = (
    "Give a local folder, or put a cached copy where HF_HOME points (and set HF_HUB_OFFLINE=1 to use nothing else)."
)
_PATIENCE_S = 6.0
"""Seconds that the Hub has to give any answer at all before copies on this machine are used."""


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def reachable() -> bool:
    """Whether the Hub answers; False too where HF_HUB_OFFLINE is set."""
    return not is_offline() and _answers()


@lru_cache(maxsize=1)
def _answers() -> bool:
    """Whether the Hub answers at all.

    `huggingface_hub` tries six times over 24 s, and a resolver or firewall that swallows packets adds its own
    waits. The thread bounds them all; being a daemon, it doesn't hold up the process's end either.
    """
    from huggingface_hub import constants, get_session

    answered: list[int] = []

    def ask() -> None:
        with suppress(Exception):  # whatever it is, the Hub is out of reach
            answered.append(get_session().head(constants.ENDPOINT, timeout=_PATIENCE_S).status_code)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE_S)
    return bool(answered) and answered[0] < 500 and answered[0] != 407
