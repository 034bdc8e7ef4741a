"""ONNX Runtime and torchao: an evaluated network runs elsewhere, and trains with quantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import RATE, folds, loader, plain
from torch import nn

from streamnorm import StreamingNorm

pytestmark = pytest.mark.filterwarnings("ignore")


def images() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), StreamingNorm(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    model(torch.randn(16, 4, 4, 4) * 3 + 1)
    return model


@pytest.mark.parametrize(("make", "shape"), [(lambda: plain(loader()), (4,)), (images, (4, 4, 4))])
def test_onnx_runtime_says_the_same(make: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    runtime: Any = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = make().eval(), tmp_path / "model.onnx"
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        model, (torch.randn(3, *shape),), str(path), dynamo=True, input_names=["x"],
        dynamic_shapes=({0: batch},), verbose=False,
    )  # fmt: skip
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = torch.randn(7, *shape) * 2
    (said,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(said), model(x), rtol=1e-5, atol=1e-5)


def test_torchao_trains_with_quantized_weights() -> None:
    quantization: Any = pytest.importorskip("torchao.quantization")
    qat: Any = pytest.importorskip("torchao.quantization.qat")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32, bias=False), StreamingNorm(32), nn.ReLU(), nn.Linear(32, 3))
    config = quantization.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int8, weight_granularity=quantization.PerAxis(0)
    )
    quantization.quantize_(model, qat.QATConfig(config, step="prepare"))
    assert type(model[0]) is not nn.Linear
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    batches = [*loader(256)]
    for x, _ in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()
    assert folds(model) == {64}
    quantization.quantize_(model, qat.QATConfig(config, step="convert"))
    model.eval()
    x = torch.cat([x for x, _ in batches])
    assert (model(x).argmax(1) == x[:, :3].argmax(1)).float().mean() > 0.6
