#!/usr/bin/env bash
# A backbone that Lightning froze says something else in training than in validation.
# Version: lightning 2.6.6, torch 2.13.0 (CPU), 2026-12-01.
#
# Guessed: BaseFinetuning.freeze(backbone, train_bn=False) makes batch normalization a constant map: what a frozen backbone says of a
#   sample is the same in training_step and in validation_step, and does not depend on the rest of the batch.
# Instead: it sets track_running_stats = False, which in training mode means that each mini-batch is normalized by itself. The running
#   statistics stay, and are used in validation only. For data with another mean than the backbone was trained on the two differ by
#   several deviations.
# Matters: the head is trained on other features than it is tested on, and the gap grows with the shift of the new data, which is why
#   one fine-tunes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 lightning==2.6.6 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import logging

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

logging.disable(logging.WARNING)
import lightning
from lightning.pytorch.callbacks import BaseFinetuning

torch.manual_seed(0)
backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
for _ in range(200):
    backbone(torch.randn(64, 4))  # stands for its training
data = torch.randn(64, 4) + 3  # the new data
heard = {}


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(4, 1)

    def training_step(self, batch, index):
        heard["training"] = self.backbone(batch[0])
        return self.head(heard["training"]).square().mean()

    def validation_step(self, batch, index):
        heard["validation"] = self.backbone(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Frozen(BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.backbone, train_bn=False)

    def finetune_function(self, module, epoch, optimizer):
        pass


before = {name: value.clone() for name, value in backbone.state_dict().items()}
loader = DataLoader(TensorDataset(data), batch_size=64)
quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, accelerator="cpu")
lightning.Trainer(max_epochs=1, callbacks=[Frozen()], num_sanity_val_steps=0, **quiet).fit(Module(), loader, loader)
same = all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
gap = (heard["training"] - heard["validation"]).abs().max().item()
print("weights and statistics of the backbone are unchanged:", same)
print("the same 64 samples, mean of each feature in training:", heard["training"].mean(0).abs().max().item())
print("largest difference between training and validation: %.1f" % gap)
assert same and gap > 1 and heard["training"].mean(0).abs().max() < 1e-3
PY
"$dir/venv/bin/python" -W ignore "$dir/finding.py"
