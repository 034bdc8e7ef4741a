"""The process that times: it shows that every variant is right, then times what the journal does not hold yet.

The memory allocator is told at the start of a process how to behave, so ``streamnorm bench`` starts one for each way.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamnorm.lab.bench import floor, timing
from streamnorm.lab.bench.case import Case, WrongError
from streamnorm.lab.bench.journal import Journal

RED, INTERRUPTED = 3, 130
"""Exit statuses."""

Show = Callable[[float, str], None]


def work(
    cases: Sequence[Case],
    journal: Journal,
    allocator: str,
    rounds: int,
    command: str = "",
    show: Show = lambda done, text: None,
    quick: bool = False,
    device: str = "cpu",
    wait: Callable[[], None] = lambda: None,
) -> None:
    """Time the cases that are not in the journal under this allocator.

    Args:
        command: names the command that asks, which a case has to be right for only once.
        show: called with a share of the work and a word on it.
        quick: hurry with the memory floor too.
        device: whose memory it is.
        wait: returns when all work that was given to a device is done.

    Raises:
        WrongError: if any variant of any case is not right; nothing has been timed then.
    """
    known = {(case.allocator, case.group, case.name) for case in journal.cases()}
    pending = [case for case in cases if (allocator, case.group, case.name) not in known]
    _gate(pending, journal, command, show)
    if pending:
        show(0, f"{allocator}: memory floor")
        least = {"sizes": floor.SIZES[:2], "rounds": 1, "seconds": 1e-3} if quick else {}
        journal.add_floor(allocator, floor.measure(**least, device=device, wait=wait))
    for i, case in enumerate(pending):
        show(i / len(pending), f"{allocator}: {case}")
        times = timing.measure(
            case,
            rounds,
            say=lambda r, i=i, case=case: show((i + r / rounds) / len(pending), f"{allocator}: {case}"),
            wait=wait,
        )
        journal.add_case(allocator, case, times, case.peaks())
        gc.collect()


def _gate(cases: Sequence[Case], journal: Journal, command: str, show: Show) -> None:
    green, red = journal.green(command), []
    for i, case in enumerate(cases):
        if str(case) not in green:
            show(i / len(cases), f"is it right? {case}")
            try:
                case.gate()
            except WrongError as error:
                red.append(str(error))
            else:
                journal.add_green(command, case)
    if red:
        raise WrongError("\n".join(red))


@contextmanager
def progress() -> Iterator[Show]:
    """A bar where there is ``rich`` and a terminal, else a line for each new word."""
    said = [""]

    def plain(done: float, text: str) -> None:
        if text != said[0]:
            print(f"{done:4.0%}  {text}", file=sys.stderr, flush=True)
        said[0] = text

    if not sys.stderr.isatty():
        yield plain
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    except ImportError:
        yield plain
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda done, text: bar.update(task, completed=done, description=text)


def main(asked: dict[str, Any]) -> int:
    """What ``streamnorm.lab.bench.run`` starts, with its wishes as JSON."""
    import torch

    from streamnorm.lab.bench.device import waiting
    from streamnorm.lab.bench.registry import Asked, cases

    torch.set_num_threads(asked["threads"])
    torch.manual_seed(0)
    found = cases(asked["groups"], Asked(asked["quick"], asked["compile"], asked["device"]))
    journal, names = Journal(Path(asked["journal"])), ("allocator", "rounds", "command", "quick", "device")
    try:
        with progress() as show:
            work(found, journal, show=show, wait=waiting(asked["device"]), **{name: asked[name] for name in names})
    except WrongError as error:
        print(error, file=sys.stderr)
        return RED
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
