"""Asking the Hugging Face hub, whose library tries for half a minute where nobody answers. Imports nothing of ours."""

from __future__ import annotations

import ssl
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.error import HTTPError

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
    """Whether anybody is there, be it with an error or with a certificate of which only the library knows."""
    try:
        urllib.request.urlopen(url, timeout=SECONDS_TO_ANSWER).close()
    except OSError as error:
        return isinstance(error, HTTPError) or isinstance(getattr(error, "reason", None), ssl.SSLError)
    return True
