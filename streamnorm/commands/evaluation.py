"""The command that tests whatever was trained. Needs the extra ``cli``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from streamnorm.commands.autoencoders import evaluate_autoencoder
from streamnorm.commands.classifiers import evaluate_classifier
from streamnorm.commands.language import evaluate_language


@dataclass(frozen=True)
class Evaluate:
    """Test a trained network."""

    folder: Positional[Path]
    """Folder of a run that `streamnorm train` or `streamnorm compare` made, or its checkpoint file."""
    data_root: Path | None = None
    """Folder of the data files; default: the environment variable STREAMNORM_DATA."""
    lengths: tuple[int, ...] = ()
    """Of a language model: test it on sequences of so many time steps too, each from a state of 0."""
    loops: tuple[int, ...] = ()
    """Of architecture C or D: test it with so many loops too (k1 and k2, or k), in the place of those it was trained
    with."""


def evaluate_one(command: Evaluate) -> None:
    """Test the checkpoint as what its run says that it is."""
    from streamnorm.training import checkpoint
    from streamnorm.training.keeping import CHECKPOINT, kind

    folder, root = command.folder.parent if command.folder.is_file() else command.folder, command.data_root
    held = kind(checkpoint.load(folder / CHECKPOINT)["run"])
    if held == "an auto-encoder":
        if command.lengths or command.loops:
            raise ValueError(f"{folder} holds an auto-encoder, which has no --lengths and no --loops")
        evaluate_autoencoder(folder, root)
    elif held == "a language model":
        if command.loops:
            raise ValueError(f"--loops are those of architecture C or D, {folder} holds a language model")
        evaluate_language(folder, root, command.lengths)
    else:
        if command.lengths:
            raise ValueError(f"--lengths are those of a language model, {folder} holds a classifier; leave it out")
        evaluate_classifier(folder, root, command.loops)
