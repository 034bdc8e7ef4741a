#!/usr/bin/env bash
# A batch that is masked as a whole makes flax's BatchNorm NaN for good.
# Version: flax 0.12.8 and jax 0.10.2 (CPU), 2026-11-30.
#
# Guessed: the mask says which rows count, and a NaN under it is not seen (so it is here). If no row counts, the running
#   statistics stay as they are.
# Instead: the mean of nothing is NaN, and the running mean and variance take it in. Both of flax's layers do it, linen.BatchNorm
#   and nnx.BatchNorm; from then on every output in evaluation is NaN, while training, which does not use the running statistics,
#   goes on with right outputs and a loss that falls.
# Matters: compiled programs want one shape, so a stream is padded to it, and an interval without arrivals is a batch of padding
#   alone.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check flax==0.12.8 jax==0.10.2 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

rng = np.random.default_rng(0)


def padded(rows):
    """Rows of mean 5, padded to 8 with NaN, and the mask of those that count."""
    batch = np.full((8, 1), np.nan, np.float32)
    batch[:rows] = 5 + rng.standard_normal((rows, 1))
    return jnp.asarray(batch), jnp.asarray(np.arange(8)[:, None] < rows)


def with_nnx(sizes):
    norm = nnx.BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
    for rows in sizes:
        batch, mask = padded(rows)
        out = norm(batch, use_running_average=False, mask=mask)
    quiet = norm(jnp.full((1, 1), 5.0), use_running_average=True)
    return norm.mean[...].item(), norm.var[...].item(), float(out[0, 0]), float(quiet[0, 0])


def with_linen(sizes):
    norm = linen.BatchNorm(momentum=0.5)
    state = norm.init(jax.random.key(0), jnp.zeros((8, 1)), use_running_average=True)
    for rows in sizes:
        batch, mask = padded(rows)
        out, new = norm.apply(state, batch, use_running_average=False, mask=mask, mutable=["batch_stats"])
        state = {**state, **new}
    quiet = norm.apply(state, jnp.full((1, 1), 5.0), use_running_average=True)
    stats = state["batch_stats"]
    return stats["mean"].item(), stats["var"].item(), float(out[0, 0]), float(quiet[0, 0])


seen = {}
for run in (with_nnx, with_linen):
    for name, sizes in (("3 to 8 rows a batch", [8, 3, 5, 8, 6, 8]), ("one batch of none", [8, 3, 0, 8, 6, 8])):
        seen[run, name] = run(sizes)
        print(run.__name__, f"{name:20}", "running mean %.2f, variance %.2f; training output %.2f, evaluation %.2f" % seen[run, name])
for (_, name), (mean, var, train, quiet) in seen.items():
    assert np.isfinite(train)
    if name == "one batch of none":
        assert np.isnan([mean, var, quiet]).all()
    else:
        assert abs(mean - 5) < 1 and 0 < var < 3 and abs(quiet) < 2
PY
"$dir/venv/bin/python" "$dir/finding.py"
