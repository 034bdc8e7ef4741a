"""Random histories of layers and recurrent networks, each followed by the oracle; ``make fuzz`` runs more of them."""

from __future__ import annotations

import pytest
from histories import History, follow
from recurrent_histories import RecurrentHistory

HISTORIES, RECURRENT, PARTS = 1000, 60, 20


@pytest.mark.parametrize("part", range(PARTS))
def test_histories_of_a_layer(part: int) -> None:
    for seed in range(part, HISTORIES, PARTS):
        follow(History, seed)


@pytest.mark.parametrize("part", range(PARTS // 5))
def test_histories_of_a_recurrent_network(part: int) -> None:
    for seed in range(part, RECURRENT, PARTS // 5):
        follow(RecurrentHistory, seed)
