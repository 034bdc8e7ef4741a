"""Made-up records of runs, as ``lab.runs.classifier.loop.train`` returns them: what the tests of a report stand on."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]
REFUSED = "one activation in each reference gives sigma = 0"


def epoch(number: int, train_loss: float, test_error: float) -> dict[str, Any]:
    base = {"updates": 44 * number, "samples": 1408 * number, "train_error": 0.3, "test_loss": 0.9, "seconds": 1.0}
    return {"epoch": number, "train_loss": train_loss, "test_error": test_error, **base}


def run(arm: str, seed: int, *errors: float, label: str | None = None, failed: str | None = None) -> Record:
    """A run whose epoch k has the k-th of ``errors`` and training loss 1 / k."""
    return {
        "arm": arm,
        "label": label or f"{arm} 1 S/B x 32 B/U",
        "seed": seed,
        "run": {"data": "digits", "arm": arm, "learning_rate": 0.1, "seed": seed, "alpha": [0.5, 0.25]},
        "data": "digits",
        "source": "made by tests/helpers/records.py",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "machine": {"cpu": "some cpu", "threads": 2},
        "metrics": [epoch(k, 1 / k, error) for k, error in enumerate(errors, 1)],
        "failed": failed,
    }


def runs_of(arm: str, *finals: float, label: str | None = None) -> list[Record]:
    """A run of two epochs for each final error."""
    return [run(arm, seed, 0.5, final, label=label) for seed, final in enumerate(finals)]


CLEAR = [
    *runs_of("none", 0.060, 0.061, 0.062),
    *runs_of("streaming", 0.039, 0.042, 0.045),
    *[run("batch", seed, failed=REFUSED) for seed in range(3)],
]
