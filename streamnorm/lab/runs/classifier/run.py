"""Run: everything that decides what a training run computes, as a frozen dataclass. Imports checks and reading alone.

The command line is derived from it, a record of results repeats it, and a checkpoint is refused by another one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self, get_type_hints

from streamnorm.checks import expect_finite, expect_whole, is_whole
from streamnorm.reading import misfit, of_annotation


@dataclass(frozen=True)
class Described:
    """A frozen dataclass of settings that can be written as JSON and read again."""

    KIND: ClassVar[str] = "a run of this version"

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON has them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """What fields have where nothing is said, as JSON has them."""
        return {f.name: list(f.default) if isinstance(f.default, tuple) else f.default for f in fields(cls)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The run that ``to_json`` described.

        Raises:
            ValueError: for a field that a run of this version does not have, or a value that is none of its type.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{cls.KIND} has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        hints = get_type_hints(cls)
        if wrong := misfit(values, {name: of_annotation(hints[name]) for name in values}):
            raise ValueError(f"{cls.KIND} is described otherwise: {wrong}")
        fields_: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields_)


ARCHITECTURES = {
    "A": "fully connected",
    "B": "convolutional",
    "C": "convolutional with looped blocks",
    "D": "fully recurrent",
}
LOOPS = {"C": (5, 5), "D": (5,)}
"""The architectures that call a layer several times: the paper's k1 and k2 (Figure 9), and its k (Figure 8)."""


@dataclass(frozen=True)
class Settings(Described):
    """What the arms of a comparison have in common.

    Attributes:
        data: digits, which needs no files, mnist, cifar10, or a folder of images, FOLDER/CLASS/picture.png.
        architecture: A, fully connected; B, convolutional; C, the same with its blocks in loops; D, three states of
            maps, each renewed from all (paper, Figure 2; ours in every number).
        loops: of C, how often its two blocks are applied, k1 and k2; of D, the number of time steps, k. By default 5
            each; A and B have none.
        width: features of the first layer; B and C double them in their second stage, D in its second and third state.
        p: order of the moment.
        center: batch (Setting A), estimate (B), zero (C); None: estimate for streaming arms, batch for others.
        alpha: of streaming arms.
        beta: of streaming arms.
        kappa: of streaming arms; None: (alpha1, alpha2, alpha1, alpha2).
        backward_stats: of streaming arms in C and D; going back, N uses the estimate saved at its time step, or the
            latest one, which is the paper's caveat (section 4.3).
        samples_per_batch: m, S/B.
        batches_per_update: n, B/U.
        epochs: passes over the training data; what does not fill a last cycle is left out.
        learning_rate: of SGD; a tenth of it in the last sixth of the updates (the paper's 25 : 5 epochs).
        momentum: of SGD.
        weight_decay: of SGD.
        warmup: cycles of forward passes alone, before the first update; None: 4 where streaming references are tiny.
        train_limit: train on so many samples only, the first of the file.
        test_limit: test on so many samples only, the first of the file.
    """

    data: str = "digits"
    architecture: Literal["A", "B", "C", "D"] = "A"
    loops: tuple[int, ...] = ()
    width: int = 128
    p: float = 2.0
    center: Literal["batch", "estimate", "zero"] | None = None
    alpha: tuple[float, float] = (0.7, 0.3)
    beta: tuple[float, float, float] = (0.7, 0.3, 0.0)
    kappa: tuple[float, float, float, float] | None = None
    backward_stats: Literal["saved", "latest"] = "saved"
    samples_per_batch: int = 1
    batches_per_update: int = 32
    epochs: int = 10
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    warmup: int | None = None
    train_limit: int | None = None
    test_limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("width", "samples_per_batch", "batches_per_update", "epochs"):
            expect_whole(name, getattr(self, name))
        if self.architecture not in ARCHITECTURES:
            named = ", ".join(f'"{letter}" ({what})' for letter, what in ARCHITECTURES.items())
            raise ValueError(f"architecture is one of {named}, got {self.architecture!r}")
        object.__setattr__(self, "loops", self._checked_loops())
        if self.backward_stats not in ("saved", "latest"):
            raise ValueError(f'backward_stats is "saved" or "latest", got {self.backward_stats!r}')
        if self.backward_stats == "latest" and not self.loops:
            raise ValueError(
                'backward_stats is "latest" for architectures C and D alone: a layer of '
                f"{self.architecture} is called once before it goes back, so that its saved estimate is the latest"
            )
        for name in ("learning_rate", "momentum", "weight_decay"):
            expect_finite(name, getattr(self, name))
        if self.warmup is not None:
            expect_whole("warmup", self.warmup, least=0)

    def _checked_loops(self) -> tuple[int, ...]:
        default = LOOPS.get(self.architecture, ())
        if isinstance(self.loops, (tuple, list)) and not self.loops:
            return default
        if not default:
            raise ValueError(f"loops is for architectures C and D, {self.architecture} has none; got {self.loops!r}")
        fits = isinstance(self.loops, (tuple, list)) and len(self.loops) == len(default)
        if not fits or not all(map(is_whole, self.loops)):
            wanted = "two whole numbers >= 1, k1 and k2," if len(default) == 2 else "one whole number >= 1, k,"
            raise ValueError(f"loops is {wanted} for architecture {self.architecture}, got {self.loops!r}")
        return tuple(self.loops)

    @property
    def samples_per_update(self) -> int:
        """m n."""
        return self.samples_per_batch * self.batches_per_update

    @property
    def network(self) -> str:
        """The architecture with its loops.

        >>> Settings(architecture="C").network, Settings(architecture="B").network
        ('C(5, 5)', 'B')
        """
        return self.architecture + (f"({', '.join(map(str, self.loops))})" if self.loops else "")


@dataclass(frozen=True)
class Run(Settings):
    """One training run. The same seed gives the same initial weights and the same order of data to every arm.

    Attributes:
        arm: the normalization: none, layer, instance, group, rms, batch, tsbn, streaming (or paper, the same),
            default, which counts its memory in samples and takes no alpha, beta or kappa, batchrenorm, onlinenorm, or
            a reference of the paper with -S for its streaming form (BA6-S), -B for the one without a stream (BA6-B,
            SP3-B), or -T for that with a running estimate for each time step (BA6-T). Without a map (architecture A)
            BA1, BA4 and BA6 are one, and so are SP2, SP3 and SP5, and BA2, BA3 and BA5. In C and D the running
            estimate of batch is shared over time (the paper's original BN), that of tsbn is one per time step.
        seed: of weights and order.

    >>> Run(arm="batch", samples_per_batch=64, batches_per_update=1).label
    'batch 64 S/B x 1 B/U'
    """

    arm: str = "streaming"
    seed: int = 0

    @property
    def label(self) -> str:
        """What a table calls this run."""
        return f"{self.arm} {self.samples_per_batch} S/B x {self.batches_per_update} B/U"
