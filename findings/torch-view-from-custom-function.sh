#!/usr/bin/env bash
# A custom autograd function that returns a reshaped result cannot be followed by ReLU(inplace=True).
# Version: torch 2.13.0, 2026-11-30.
#
# Guessed: forward makes a new tensor y and returns y.view(...). Nobody else holds y, so the result is as good as a new tensor
#   and an in-place operation may change it.
# Instead: RuntimeError, "Output 0 of Scale is a view and is being modified inplace". Only with gradients: under no_grad it works.
#   The same reshape by torch.ops.aten._unsafe_view, which promises that y is not used again, is accepted, with right gradients.
# Matters: a normalization layer written as an autograd function likes to work on (n, groups, -1) and to give back the shape of the
#   input. It passes its own tests and every evaluation, and fails where a model has ReLU(inplace=True) behind it, as ResNets have.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import torch


def last_step(way, y, shape):
    if way == "view":
        return y.view(shape)
    if way == "_unsafe_view":
        return torch.ops.aten._unsafe_view(y, shape)
    return y.clone().view(shape).clone()  # "copy"


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, way):
        y = x.reshape(2, -1) * 3  # new memory, nothing of x
        return last_step(way, y, x.shape)

    @staticmethod
    def backward(ctx, g):
        return g * 3, None


relu = torch.nn.ReLU(inplace=True)
x = torch.tensor([[[1.0, -2.0]], [[-3.0, 4.0]]], requires_grad=True)
seen = {}
for way in ("view", "_unsafe_view", "copy"):
    x.grad = None
    try:
        relu(Scale.apply(x, way)).sum().backward()
        seen[way] = x.grad.flatten().tolist()
    except RuntimeError as error:
        seen[way] = "RuntimeError: " + str(error).split(".")[0]
    print(f"{way:13} with gradients: {seen[way]}")
with torch.no_grad():
    quiet = relu(Scale.apply(x, "view")).flatten().tolist()
print(f"view          under no_grad:  works, {quiet}")
assert seen["view"].startswith("RuntimeError") and "is a view" in seen["view"]
assert seen["_unsafe_view"] == seen["copy"] == [3.0, 0.0, 0.0, 3.0]
assert quiet == [3.0, 0.0, 0.0, 12.0]
PY
"$dir/venv/bin/python" "$dir/finding.py"
