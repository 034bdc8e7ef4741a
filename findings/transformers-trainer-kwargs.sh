#!/usr/bin/env bash
# In transformers' Trainer a **kwargs in the signature of forward multiplies accumulated gradients.
# Version: transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU), 2026-12-01.
#
# Guessed: with gradient_accumulation_steps=4 an update is that of one batch of four times the size, for any model whose loss is the
#   mean over its batch; what else forward accepts does not matter.
# Instead: a forward that ends with **kwargs is taken to divide its loss by num_items_in_batch, which it is passed; the trainer then
#   does not divide by 4. A model that ignores the argument gets 4 times the gradient, without a warning.
# Matters: **kwargs is common in a forward that ignores what it does not know. The learning rate is then off by the number of
#   mini-batches, and comparing accumulation with large batches compares learning rates.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import tempfile

import torch
import torch.nn.functional as F
import transformers
from torch import nn

torch.manual_seed(0)
x, labels = torch.randn(16, 4), torch.randint(3, (16,))
data = [{"x": one, "labels": label} for one, label in zip(x, labels)]


class Strict(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)

    def forward(self, x, labels):
        return {"loss": F.cross_entropy(self.linear(x), labels)}


class Lenient(Strict):
    def forward(self, x, labels, **kwargs):
        return super().forward(x, labels)


def change(kind, size, steps):
    model = kind()
    before = model.linear.weight.detach().clone()
    arguments = transformers.TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, max_grad_norm=0.0, train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()
    return model.linear.weight.detach() - before


whole = change(Strict, 16, 1)
ratios = {kind.__name__: (change(kind, 4, 4).norm() / whole.norm()).item() for kind in (Strict, Lenient)}
print("an update of 4 batches of 4, relative to that of 16 samples:", ratios)
assert abs(ratios["Strict"] - 1) < 1e-4 and abs(ratios["Lenient"] - 4) < 1e-3
PY
"$dir/venv/bin/python" -W ignore "$dir/finding.py"
