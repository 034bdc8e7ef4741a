#!/usr/bin/env bash
# onnxruntime's GroupNormalization gives NaN where its InstanceNormalization and LayerNormalization are right.
# Version: onnxruntime 1.32.0 (CPU) and onnx 1.23.2, 2026-11-30.
#
# Guessed: the three are one formula over other sets of values, so they are equally exact: right to about 0.001 in float32 for values
#   of mean 3000 and deviation 1.
# Instead: instance and layer normalization are right; group normalization is NaN in places, and at a mean of 300 already wrong in
#   the second digit. The standard defines it as a function of other operators, which takes the variance as mean(x^2) - mean(x)^2,
#   and the runtime carries that out as written. With one channel in each group it is instance normalization, and still NaN.
# Matters: the same numbers pass or fail by the name of the operator. A model with group normalization behind features that have an
#   offset trains well elsewhere and answers NaN once it is served by this operator.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper

C = 8


def run(op, x, width, **attributes):
    feeds = {"x": x, "scale": np.ones(width, np.float32), "bias": np.zeros(width, np.float32)}
    inputs = [helper.make_tensor_value_info(k, TensorProto.FLOAT, v.shape) for k, v in feeds.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node(op, list(feeds), ["y"], **attributes)], "g", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0].astype(np.float64)


def error(y, x, sets):
    x, y = x.astype(np.float64).reshape(sets), y.reshape(sets)
    exact = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return np.abs(y - exact).max()  # NaN if y has one


noise = np.random.default_rng(0).standard_normal((4, C, 32, 32))
seen = {}
for mean in (0, 300, 3000):
    x = (noise + mean).astype(np.float32)
    flat = x.reshape(4, -1)
    seen[mean] = {
        "LayerNormalization": error(run("LayerNormalization", flat, flat.shape[1], axis=-1), flat, (4, -1)),
        "InstanceNormalization": error(run("InstanceNormalization", x, C), x, (4 * C, -1)),
        "GroupNormalization, a channel a group": error(run("GroupNormalization", x, C, num_groups=C), x, (4 * C, -1)),
        "GroupNormalization, two channels a group": error(run("GroupNormalization", x, C, num_groups=C // 2), x, (2 * C, -1)),
    }
    for name, e in seen[mean].items():
        print(f"mean {mean:4}  largest error {e:8.2g}  {name}")
for name in seen[0]:
    assert seen[0][name] < 1e-3
    if name.startswith("Group"):
        assert seen[300][name] > 0.01 and np.isnan(seen[3000][name])
    else:
        assert seen[300][name] < 0.001 and seen[3000][name] < 0.01
PY
"$dir/venv/bin/python" "$dir/finding.py"
