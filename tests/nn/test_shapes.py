"""The run-time shape checks are in force."""

from __future__ import annotations

import pytest
import torch

import streamnorm as sn
from streamnorm.ops import functional


def test_a_wrong_shape_where_rooms_meet_is_caught() -> None:
    layer = sn.StreamingNorm(3)
    streams = functional.Streams(layer.H1, layer.H2, True)
    functional.normalize(torch.randn(2, 4, 3, 1), layer.definition, streams)
    with pytest.raises(Exception, match="type"):
        functional.normalize(torch.randn(2, 3), layer.definition, streams)
    with pytest.raises(Exception, match="type"):
        layer.H1.take(torch.randn(5, 2, 3), torch.ones(4, dtype=torch.bool))
