"""Asking the Hugging Face hub, whose library tries for half a minute where nobody answers. Imports nothing of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

SECONDS_TO_ANSWER = 5


@contextmanager
def at_once_or_never() -> Iterator[None]:
    """Let the library look into its own cache alone while nobody answers at the hub."""
    from datasets import config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    if not any(before) and not answers(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


def answers(url: str) -> bool:
    """Whether the library gets any answer there, be it an error."""
    from huggingface_hub import get_session

    try:
        get_session().head(url, timeout=SECONDS_TO_ANSWER)
    except Exception:  # of whichever of its libraries: no name, no route, no time, no certificate
        return False
    return True
