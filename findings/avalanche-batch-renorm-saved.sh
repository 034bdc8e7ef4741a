#!/usr/bin/env bash
# The statistics of Avalanche's batch renormalization are in no file that a model is saved to.
# Version: avalanche-lib 0.6.0, torch 2.13.0 (CPU), 2026-12-01.
#
# Guessed: as in torch's batch normalization, running mean and deviation are buffers, saved and moved with the model.
# Instead: BatchRenorm2D keeps them as plain attributes. state_dict() has only gain and bias; load_state_dict() finds nothing missing,
#   and the loaded layer has a deviation of 0: what it says in evaluation is infinite. double() does not reach them either.
# Matters: replace_bn_with_brn puts it into networks for continual learning, where a saved model is the rule; with torch's layers, or
#   with strict loading, such a loss would have been an error.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps avalanche-lib==0.6.0  # the one file imports torch alone
cat > "$dir/finding.py" <<'PY'
import sysconfig
from importlib.util import module_from_spec, spec_from_file_location

import torch

path = sysconfig.get_path("purelib") + "/avalanche/models/batch_renorm.py"
spec = spec_from_file_location("batch_renorm", path)
batch_renorm = module_from_spec(spec)
spec.loader.exec_module(batch_renorm)

torch.manual_seed(0)
x = 3 * torch.randn(16, 2, 5, 5) + 1
for kind in (torch.nn.BatchNorm2d, batch_renorm.BatchRenorm2D):
    trained, loaded = kind(2), kind(2)
    for _ in range(500):
        trained(x)
    answer = loaded.load_state_dict(trained.state_dict())
    said = [layer.eval()(x).detach() for layer in (trained, loaded)]
    wide = trained.double()
    print("%-14s saves %s" % (kind.__name__, [*trained.state_dict()]))
    print("%14s %s; evaluated: sd %.2f, loaded %.2f" % ("", answer, said[0].std(), said[1].std()))
    if kind is torch.nn.BatchNorm2d:
        assert torch.equal(*said) and wide.running_var.dtype is torch.float64
    else:
        assert [*trained.state_dict()] == ["gamma", "beta"] and wide.running_avg_std.dtype is torch.float32
        assert 0.9 < said[0].std() < 1.1 and not said[1].isfinite().any()
PY
"$dir/venv/bin/python" -W ignore "$dir/finding.py"
