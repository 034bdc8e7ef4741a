"""Lightning: its trainer is the plain loop, with accumulation, and resumes from its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import RATE, expect_same, folds, loader, network, plain

lightning: Any = pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch: Any, index: int) -> Any:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("loss", F.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def trainer(folder: Path, epochs: int, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "default_root_dir": folder}
    return lightning.Trainer(max_epochs=epochs, **quiet, **options)


@pytest.mark.parametrize("every", [1, 2])
def test_its_trainer_is_a_loop(every: int, tmp_path: Path) -> None:
    module = Module()
    trainer(tmp_path, 2, accumulate_grad_batches=every).fit(module, loader(), loader())
    expect_same(module.network.state_dict(), plain([*loader(), *loader()], every).state_dict())
    assert folds(module) == {16 // every}


def test_it_resumes_exactly(tmp_path: Path) -> None:
    first = trainer(tmp_path, 1)
    first.fit(Module(), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    module = Module()
    trainer(tmp_path, 2).fit(module, loader(), ckpt_path=tmp_path / "half.ckpt")
    expect_same(module.network.state_dict(), plain([*loader(), *loader()]).state_dict())
