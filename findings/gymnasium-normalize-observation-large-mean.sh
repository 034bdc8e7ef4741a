#!/usr/bin/env bash
# gymnasium's NormalizeObservation starts from a ten-thousandth of a sample at 0, and a large mean lets that rule for 10000 steps.
# Version: gymnasium 1.4.0, 2026-11-30. (stable-baselines3 2.9.2's RunningMeanStd, tried by hand, gives the same
#   numbers.)
#
# Guessed: the running statistics start with mean 0, variance 1 and a count of 1e-4, which only avoids a division by zero. The first
#   observation becomes about 0, by a variance near 1e-4. A careful user would add: after 100 observations the start is a millionth
#   of all, so what has deviation 1 comes out with deviation 1.
# Instead: that pretended bit of a sample lies at 0, the data at 3000, and the distance enters the variance squared: 1e-4 * 3000^2 =
#   900 samples' worth of variance. After 100 observations the variance is 10 instead of 1, after 1000 still 1.9, and only after
#   90000 it is 1 % too large. The first observation becomes 0.01, whatever it is.
# Matters: an agent sees observations that are too small and slowly grow, and takes that drift for the world. Any streaming estimate
#   that is started at a fixed point has it; starting at the first sample has not.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check gymnasium==1.4.0 numpy==2.4.6
cat > "$dir/finding.py" <<'PY'
import gymnasium
import numpy as np


class Gauge(gymnasium.Env):
    """A reading around 3000 or around 0, with deviation 1."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, mean):
        self.mean, self.rng = mean, np.random.default_rng(0)

    def read(self):
        return self.mean + self.rng.standard_normal(1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.read(), {}

    def step(self, action):
        return self.read(), 0.0, False, False, {}


var, first = {}, {}
for mean in (0.0, 3000.0):
    env = gymnasium.wrappers.NormalizeObservation(Gauge(mean))
    first[mean] = env.reset()[0].item()
    out = [env.step(0)[0].item() for _ in range(20000)]
    print(f"mean {mean:4.0f}: the first observation becomes {first[mean]:.4f}")
    rms = gymnasium.wrappers.utils.RunningMeanStd(shape=(1,))  # what the wrapper keeps, in float64
    data = Gauge(mean)
    for n in range(1, 90001):
        rms.update(data.read()[None])
        if n in (100, 1000, 10000, 90000):
            var[mean, n] = rms.var.item()
            print(f"mean {mean:4.0f}: running variance after {n:5} observations {var[mean, n]:.3f}")
    spread = [np.std(out[a:b]) for a, b in ((50, 150), (900, 1100), (15000, 20000))]
    print(f"mean {mean:4.0f}: deviation of what comes out, around step 100, 1000, 17500:", [f"{s:.2f}" for s in spread])
    if mean:
        assert spread[0] < 0.5 and spread[1] < 0.85 and spread[2] > 0.9
    else:
        assert all(s > 0.8 for s in spread)
assert abs(first[3000.0] - 0.01) < 0.001
assert 9 < var[3000.0, 100] < 11 and 1.7 < var[3000.0, 1000] < 2.1
for n in (100, 1000, 10000, 90000):
    assert abs(var[3000.0, n] - var[0.0, n] - 900 / n) < 0.02 * 900 / n
PY
"$dir/venv/bin/python" "$dir/finding.py"
