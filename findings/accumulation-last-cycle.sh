#!/usr/bin/env bash
# The last update of an epoch is too small where gradients are accumulated, in two of three trainers.
# Version: accelerate 1.15.0, lightning 2.6.6, transformers 5.24.0, torch 2.13.0 (CPU), 2026-12-01.
#
# Guessed: 5 mini-batches in cycles of 4 leave one; its update is the gradient of that one, as it is the mean of all there are.
# Instead: accelerate and lightning make the update, but divide by 4 as always: it is a quarter. transformers divides by 1.
# Matters: every epoch ends with a step of another size, the samples at its end weigh less, and a layer that remembers gradients
#   gets them in another unit. The sizes differ between trainers that are called equal.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 accelerate==1.15.0 lightning==2.6.6 transformers==5.24.0 \
  numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import logging
import tempfile

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

logging.disable(logging.WARNING)
import accelerate
import lightning
import transformers

STEPS, BATCHES = 4, 5
x = torch.ones(BATCHES, 1)  # every mini-batch is one sample with a gradient of 1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return {"loss": (x * self.w).mean()}


class Recorded(torch.optim.SGD):
    def step(self, closure=None):
        done = closure() if closure else None
        self.seen = [*getattr(self, "seen", []), self.param_groups[0]["params"][0].grad.item()]
        return done


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, index):
        return self.net(batch[0])["loss"]

    def configure_optimizers(self):
        self.made = Recorded(self.parameters(), lr=0.1)
        return self.made


loader = DataLoader(TensorDataset(x), batch_size=1)
seen = {}

accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=STEPS)
net = Net()
mine = Recorded(net.parameters(), lr=0.1)
net, optimizer, batches = accelerator.prepare(net, mine, loader)
for (batch,) in batches:
    with accelerator.accumulate(net):
        accelerator.backward(net(batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
seen["accelerate"] = mine.seen

quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, accelerator="cpu")
module = Module()
lightning.Trainer(max_epochs=1, accumulate_grad_batches=STEPS, **quiet).fit(module, loader)
seen["lightning"] = module.made.seen

net = Net()
mine = Recorded(net.parameters(), lr=0.1)
arguments = transformers.TrainingArguments(
    tempfile.mkdtemp(), per_device_train_batch_size=1, gradient_accumulation_steps=STEPS, num_train_epochs=1, use_cpu=True,
    report_to=[], save_strategy="no", disable_tqdm=True, max_grad_norm=0.0, lr_scheduler_type="constant",
)
transformers.Trainer(net, arguments, train_dataset=[{"x": one} for one in x], optimizers=(mine, None)).train()
seen["transformers"] = mine.seen

for name, gradients in seen.items():
    print("%-12s gradients of its updates: %s" % (name, gradients))
assert seen == {"accelerate": [1.0, 0.25], "lightning": [1.0, 0.25], "transformers": [1.0, 1.0]}
PY
"$dir/venv/bin/python" -W ignore "$dir/finding.py"
