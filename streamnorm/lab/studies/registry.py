"""The studies by name: each is the module of that name, imported when it is asked for, and its ``main``."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from streamnorm.lab.studies.arguments import Arguments

STUDIES = {
    "online": "one sample a batch and tiny mini-batches, fully connected (section 7.3, Figures 4 and 5)",
    "convolutional": "normalizations of a convolutional network (section 7.4, part of Figure 6)",
    "moments": "moments of every order, Settings A, B and C (sections 3.4 and 7.2, Figure 3)",
    "references": "every reference, without a stream and with one (section 7.4, Figures 6, 7 and A1)",
    "accumulation": "how many mini-batches a weight update takes together (footnote 3)",
    "specialcase": "testing with the last mini-batch's statistics (section 3.3.3)",
    "unrolled": "unrolled convolutional networks (section 7.5, Figures 8, 9 and 10)",
    "shakespeare": "language models of characters (section 7.6, Figures 11 and 12)",
    "autoencoder": "auto-encoders of sparse text, one document at a time",
    "pipeline": "batch normalization from training to testing: what to test with",
    "mnist": "sigmoid units on MNIST, after the talk of Ioffe (2015)",
    "inception": "a small Inception network: learning rates, sigmoids, an ensemble, after the same talk",
    "streams": "one row and one weight update at a time on real and drifting streams: what to normalize with",
    "smallbatch": "training and testing with 1 to 32 samples a batch: what to normalize with",
    "comments": "two comments: gain and bias before a convolution, curvature and over-fitting",
}


def study(name: str) -> Callable[[Arguments], Path]:
    """What carries out a study: trains what is missing, checks the claims, writes the record and returns its path.

    Raises:
        ValueError: for a name that no study has.
    """
    if name not in STUDIES:
        near = difflib.get_close_matches(name, STUDIES, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown study {name!r}; {hint}the studies are {', '.join(STUDIES)}")
    return import_module(f"streamnorm.lab.studies.{name}.study").main
