#!/usr/bin/env bash
# torch.compile changes what activation checkpointing does to the running statistics of batch normalization.
# Version: torch 2.13.0 (CPU), 2026-11-30.
#
# Guessed: checkpointing runs the block twice, so nn.BatchNorm1d learns each batch twice, or torch guards against it; compiling the
#   model keeps whichever it is.
# Instead: in eager mode each batch is learned twice (20 of 10), and the running mean is off by 0.8 where the data have mean 3 before
#   the first layer; compiled with fullgraph, the same model learns it once and agrees with the model without checkpoints.
# Matters: a model is tested with other statistics when it is compiled for training, or when the compiler gives up on a part of it
#   and that part falls back to eager mode; outputs and gradients in training are the same, so nothing shows it.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import torch
import torch._dynamo
from torch import nn
from torch.utils.checkpoint import checkpoint


class Net(nn.Module):
    def __init__(self, remat):
        super().__init__()
        torch.manual_seed(0)
        self.remat = remat
        self.block = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        h = checkpoint(self.block, x, use_reentrant=False) if self.remat else self.block(x)
        return self.head(h)


def train(remat, compiled):
    torch._dynamo.reset()
    net = Net(remat)
    call = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
    for step in range(10):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step)) + 3
        call(x).square().mean().backward()
    norm = net.block[1]
    return int(norm.num_batches_tracked), norm.running_mean.clone()


plain = train(False, False)
seen = {}
for remat in (False, True):
    for compiled in (False, True):
        batches, mean = seen[remat, compiled] = train(remat, compiled)
        apart = (mean - plain[1]).abs().max().item()
        print(f"checkpointed {remat!s:5}  compiled {compiled!s:5}  batches {batches:2}  running mean off by {apart:.3f}")
assert [seen[k][0] for k in ((False, False), (False, True), (True, True))] == [10, 10, 10]
assert seen[True, False][0] == 20
assert (seen[True, False][1] - plain[1]).abs().max() > 0.1 > 1e-5 > (seen[True, True][1] - plain[1]).abs().max()
PY
"$dir/venv/bin/python" -W ignore "$dir/finding.py"
