"""Recalibration: recompute the statistics that testing uses from data, with fixed weights; and how far off they are.

The second of two ways to test a batch normalization ("Batch Normalization: The Untold Story"): statistics of
mini-batches in training, then a pass over the data for those of testing. Imports the state postproc.

Legend: a table is ``(2, ...)``, row 0 the mean, row 1 sigma; a site is one set of statistics that testing uses.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from streamnorm.calibration.course import TOLERANCE, Course
from streamnorm.calibration.estimators import DECAY, Across, Corrected, Estimator, Mean, Moving, Pooled, alone
from streamnorm.calibration.postproc import Site, Told, layers, once_through
from streamnorm.checks import is_whole
from streamnorm.definition.stats import DegenerateReferenceError, Lp

Choice = Literal["pooled", "moving", "corrected"]
ESTIMATORS: dict[str, type[Estimator]] = {"pooled": Pooled, "moving": Moving, "corrected": Corrected}
Call = Callable[[nn.Module, Any], Any]
Progress = Callable[[int, int, int | None], None]

LEFT = 0.01
"""The most initial weight left in a moving average without a warning: 44 mini-batches at a decay of 0.9."""
BAR = 30
"""Width of a progress bar in characters."""


def _given(model: nn.Module, batch: Any) -> Any:
    """Call the model on a batch: a tensor, the first of a tuple or list, or a dictionary of arguments."""
    is_tuple = isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence)
    x = batch[0] if is_tuple and batch else batch
    weight = next(model.parameters(), None)

    def brought(part: Any) -> Any:
        if weight is not None and isinstance(part, (Tensor, PackedSequence)):
            part = part.to(weight.device)  # type: ignore[arg-type]
        return part

    if isinstance(x, (Tensor, PackedSequence)):
        return model(brought(x))
    if isinstance(x, Mapping):
        return model(**{name: brought(part) for name, part in x.items()})
    raise TypeError(
        f"a batch is a tensor, a tuple that begins with one, or a dictionary of arguments, got {type(batch).__name__}; "
        "for others say how the model is called: call=lambda model, batch: model(...)"
    )


def _bar(number: int, batch: int, batches: int | None) -> None:
    """A progress bar on stderr."""
    drawn = f"batch {batch}"
    if batches:
        drawn = f"[{'#' * (BAR * batch // batches):{BAR}}] {drawn} of {batches}"
    print(f"\rpass {number} {drawn}", end="\n" if batch == batches else "", file=sys.stderr, flush=True)


def _show(progress: bool | Progress, data: Iterable[Any], number: int) -> Callable[[int], None]:
    draw = _bar if progress is True else progress
    try:
        batches = len(data)  # type: ignore[arg-type]
    except TypeError:
        batches = None
    return (lambda batch: draw(number, batch, batches)) if draw else lambda batch: None


class _Taken:
    """So many batches of data that may be endless."""

    def __init__(self, data: Iterable[Any], batches: int) -> None:
        self.data, self.batches = data, batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        came = 0
        for batch in islice(self.data, self.batches):
            came += 1
            yield batch
        if came < self.batches:
            raise ValueError(f"batches={self.batches}, and {came} came from the data; give more data, or fewer batches")


def _checked(data: Iterable[Any], batches: int | None, estimator: str = "pooled") -> Iterable[Any]:
    """The data of each pass, after checking the arguments."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(
            f"data is a loader, a list or anything else that yields batches, got {type(data).__name__}; of a tensor, "
            "give its batches: x.split(64)"
        )
    if batches is not None and not is_whole(batches):
        raise ValueError(f"batches is a number of batches >= 1, or None, got {batches!r}")
    return data if batches is None else _Taken(data, batches)


def recalibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    estimator: Choice = "pooled",
    decay: float = DECAY,
    passes: int | None = None,
    batches: int | None = None,
    call: Call | None = None,
    across: Across | None = None,
    progress: bool | Progress = False,
) -> int:
    """Recompute the statistics that testing uses from ``data``, with the current weights, and store them.

    ::

        train      a mini-batch by itself, or F's estimate; weights are learned
        postproc   during this call: weights are frozen, outputs ignored, statistics accumulated
        test       fixed statistics, saved in ``state_dict()`` next to the parameters

    The result describes what each layer sees in testing, with fixed statistics in the layers before it. In the first
    pass every layer normalizes a mini-batch with its own statistics; after each pass one more layer, in the order of
    their calls, is exact and normalizes with its new statistics, and so do layers that hardly moved. So the result does
    not depend on the batching. There are at most as many passes as layers, and about a dozen for many layers with
    residual connections; twice as many if sigma needs the mean first (p other than 2, about the mean). In recurrent
    layers statistics depend on themselves, and it takes some dozens of passes (27 to 46 with a two-layer ``NormGRU``)
    until they converge; ``passes`` ends it earlier.

    Works for every ``Norm`` that has a memory, even if called several times or at every time step, including
    ``TimeSpecific`` ones, and for ``torch.nn`` batch normalization (``running_mean``, unbiased ``running_var``).
    Streaming layers then continue training as if nothing had happened; the running average of a batch normalization
    continues from the new values. Modes, hooks and everything else are left unchanged, and after an error the
    statistics too.

    Args:
        model: in any mode.
        data: a loader, or any iterable of batches: tensors, tuples that begin with the input, dictionaries of
            arguments. One that can be iterated only once (an iterator) needs ``passes=1``. A loader that samples anew
            in each pass works: each layer is taken from one pass, with fixed statistics before it.
        estimator: ``"pooled"``: S of all data as one reference. ``"moving"``: the running average of the s of
            mini-batches, the mean from 0, sigma from 1, as proposed in "Batch Normalization: The Untold Story"; shuffle
            the data. ``"corrected"``: the same with bias correction for the initial values.
        decay: of the moving averages.
        passes: the most passes. 1 is the usual single pass, in which earlier layers normalize each mini-batch with its
            own statistics. None: until all are exact, and 1 for moving averages.
        batches: so many in each pass, for data that may be endless; None: all. An iterator is not restarted.
        call: ``call(model, batch)`` runs the model on a batch of any other kind.
        across: the sum of a tensor over all replicas, each of which has its own batches; they are weighted by their
            counts.
        progress: show a bar, or call ``progress(pass, batch, batches or None)`` after each batch.

    Returns:
        The number of passes.

    Raises:
        ValueError: for a model without such layers, data that yield nothing or fewer than ``batches``, statistics that
            are not finite, or an iterator where several passes are needed.
        DegenerateReferenceError: for a sigma of single activations.
        TypeError: for a batch that needs ``call``.

    Warns:
        UserWarning: if the initial values still weigh more than 0.01 in a moving average; for layers that were not
            called, which keep their statistics; for data that differ from pass to pass; if the statistics of layers
            that are called several times still move.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3), nn.BatchNorm1d(3))
    >>> x = torch.randn(100, 4)
    >>> recalibrate(model, x.split(8))
    2
    >>> torch.allclose(model[1].running_mean, model[0](x).mean(0), atol=1e-6)
    True
    """
    data = _checked(data, batches, estimator)
    if not 0 < decay < 1:
        raise ValueError(f"decay is the weight of the old value, between 0 and 1, got {decay!r}")
    if passes is not None and not is_whole(passes):
        raise ValueError(f"passes is a number of passes >= 1, or None, got {passes!r}")
    most = 1 if passes is None and estimator != "pooled" else passes
    if most != 1 and isinstance(data, Iterator):
        raise ValueError(
            f"data may be needed several times, and {type(data).__name__} can be gone through once; give a list or a "
            "loader, or passes=1, or with batches=... so many for each pass"
        )
    found = layers(model)
    sites = [site for layer in found for site in layer.sites]
    before = [(site, site.snapshot()) for site in sites]
    course, number = Course(most), 0
    try:
        while True:
            number += 1
            make = partial(_estimator, estimator, decay, course.tables)
            told = once_through(model, data, found, make, course.fixed, call or _given, _show(progress, data, number))
            first = {site: one.value(across or alone) for site, one in told.first.items()}
            for site, table in course.take(told, _values(told, across), first).items():
                site.store(table, told.sites[site].arrivals)
            if course.is_over:
                break
        for site, table in course.best().items():
            site.store(table, told.sites[site].arrivals if site in told.sites else told.batches)
    except BaseException as error:
        for site, snapshot in before:
            site.put_back(snapshot)
        error.add_note(f"in pass {number} of streamnorm.recalibrate; the model is as it was before")
        raise
    _warn([site for site in sites if site not in course.tables], told)
    if course.differs:
        site, far = course.differs
        warnings.warn(
            f"the data differ from pass to pass (statistics at {site.name!r} moved by {far:.2g} of a sigma), so "
            "statistics have the noise of a single pass; for exact ones give the same data each time: list(loader)",
            stacklevel=2,
        )
    elif most is None and course.is_recurrent and course.still > TOLERANCE:
        warnings.warn(
            f"after {number} passes, statistics of layers that are called several times still move, by "
            f"{course.still:.2g} of their sigma; if that is too much, give passes={2 * number}",
            stacklevel=2,
        )
    return number


def _estimator(choice: str, decay: float, tables: Mapping[Site, Tensor], site: Site) -> Estimator:
    """The estimator of a site in a pass; ``tables`` are the result of the previous one."""
    kind: type[Estimator] = ESTIMATORS[choice]
    moment = site.moment
    if kind is Pooled and site.ref.samples == "one":
        kind = Mean  # each sample is a reference by itself
    if kind is Pooled and (type(moment).sigma is not Lp.sigma or type(moment).norm is not Lp.norm):
        raise ValueError(
            f"{site.name}: pooled statistics are known of Lp, not of {moment!r}; average those of mini-batches: "
            'estimator="corrected"'
        )
    center = tables.get(site) if kind.needs_center(moment) else None
    if center is None and kind.needs_center(moment) and kind is not Pooled:
        center = site.stored()
    options: Any = {"decay": decay} if issubclass(kind, Moving) else {}
    return kind(site.ref, moment, site.unbiased, center, **options)


def _values(told: Told, across: Across | None) -> dict[Site, Tensor]:
    """The table of every site after a pass."""
    values = {site: one.value(across or alone) for site, one in told.sites.items()}
    for site, one in told.sites.items():
        if one.is_degenerate:
            raise DegenerateReferenceError(
                f"{site.name}: sigma of a single activation about itself ({site.ref!r}) is 0 whatever it is; give more "
                'samples, or, where a batch holds one sample, estimator="pooled"'
            )
    return values


def _warn(missing: list[Site], told: Told) -> None:
    if missed := [site.name for site in missing]:
        shown = ", ".join(map(repr, missed[:5])) + (" ..." if missed[5:] else "")
        warnings.warn(f"not called, and left as they were: {shown}", stacklevel=3)
    share, one = max(((one.initial_share, one) for one in told.sites.values()), key=lambda pair: pair[0])
    if share > LEFT:
        assert isinstance(one, Moving)
        enough = math.ceil(math.log(LEFT) / math.log(one.decay))
        warnings.warn(
            f"after {one.arrivals} mini-batches the initial values, mean 0 and sigma 1, still weigh {share:.2g} in the "
            f'moving average; give at least {enough}, or estimator="corrected" or "pooled"',
            stacklevel=3,
        )


# --- the gap between what is stored and what the data say ---


@dataclass(frozen=True)
class Row:
    """How far the stored statistics of a layer are from those of the data.

    Attributes:
        layer: its name in the model.
        mean: root mean square over its statistics of (stored mean - mean of the data) / sigma of the data.
        largest: the largest of these by absolute value.
        lowest, ratio, highest: stored sigma / sigma of the data: the lowest, the geometric mean, the highest.
    """

    layer: str
    mean: float
    largest: float
    lowest: float
    ratio: float
    highest: float


@dataclass(frozen=True)
class Gap:
    """The result of ``gap``, which prints as a table. ``rows`` holds a ``Row`` for each layer in the order of calls."""

    rows: tuple[Row, ...]

    @property
    def largest(self) -> float:
        """The largest distance of all: of a mean in sigmas, or of a sigma as the logarithm of its ratio."""
        return max(max(row.largest, -math.log(row.lowest), math.log(row.highest)) for row in self.rows)

    def __str__(self) -> str:
        width = max(len("layer"), *(len(row.layer) for row in self.rows))
        lines = [
            f"{'':{width}}  {'mean off by (sigmas)':>21}  {'sigma, stored / data':>29}",
            f"{'layer':{width}}  {'rms':>10} {'largest':>10}  {'lowest':>9} {'mean':>9} {'highest':>9}",
        ]
        for r in self.rows:
            lines.append(
                f"{r.layer:{width}}  {r.mean:10.2g} {r.largest:10.2g}  {r.lowest:9.4f} {r.ratio:9.4f} {r.highest:9.4f}"
            )
        return "\n".join(lines)


def gap(
    model: nn.Module,
    data: Iterable[Any],
    *,
    batches: int | None = None,
    call: Call | None = None,
    across: Across | None = None,
    progress: bool | Progress = False,
) -> Gap:
    """How far the statistics that testing uses are from those of ``data``, layer by layer.

    The model runs once through the data, as in testing; nothing is changed. After ``recalibrate`` on the same data
    there is no gap. For p other than 2, sigma is taken about the stored mean.

    Args:
        model, data, batches, call, across, progress: as for ``recalibrate``.

    Raises:
        ValueError: as ``recalibrate``.
        RuntimeError: for a layer that has no statistics yet.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    >>> x = 3 + torch.randn(100, 4)
    >>> gap(model, x.split(8)).largest > 0.1
    True
    >>> passes = recalibrate(model, x.split(8))
    >>> gap(model, x.split(8)).largest < 1e-5
    True
    """
    data = _checked(data, batches)
    found = layers(model)
    sites = {site for layer in found for site in layer.sites}
    stored = {site: table for site in sites if (table := site.stored()) is not None}
    if unknown := [layer.sites[0].name for layer in found if not any(site in stored for site in layer.sites)]:
        raise RuntimeError(f"{', '.join(unknown)} has no statistics yet; train the model first, or recalibrate it")
    make = partial(_estimator, "pooled", DECAY, stored)
    told = once_through(model, data, found, make, sites, call or _given, _show(progress, data, 1))
    values = _values(told, across)
    return Gap(tuple(_row(site, stored[site], values[site]) for site in told.sites))


def _row(site: Site, stored: Tensor, data: Tensor) -> Row:
    tiny = torch.finfo(data.dtype).tiny
    off = (stored[0] - data[0]).abs() / data[1].clamp_min(tiny)
    ratio = stored[1].clamp_min(tiny) / data[1].clamp_min(tiny)
    return Row(
        site.name,
        off.square().mean().sqrt().item(),
        off.max().item(),
        ratio.min().item(),
        ratio.log().mean().exp().item(),
        ratio.max().item(),
    )
