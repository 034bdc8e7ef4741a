"""The compiled kernels: every one against float64, in output, every gradient and all state, on whatever input comes.

``tests/oracle/test_oracle_agreement.py`` holds the fastest backend in float64, which is this one, against the oracle in
every case. Here it is held, in every dtype, layout and instruction set, against the slower backend in float64.
"""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from close import rounding
from torch import Tensor

import streamnorm as sn
from streamnorm.ops import cpu, library
from streamnorm.ops.backends import using
from streamnorm.stream import LongShort

if library.library() is None:
    pytest.skip(f"no compiled kernels: {library.status()}", allow_module_level=True)

MIXED = sn.Streaming(alpha=(0.6, 0.4), beta=(0.5, 0.3, 0.2), kappa=(0.8, 0.2, 0.9, 0.1))
ONE_PASS = sn.Streaming(alpha=(1, 0), beta=(1, 0, 0), kappa=(0.9, 0.1, 0.9, 0.1))
REFS = {
    **{f"{ref!r}": ref for ref in (sn.BA1, sn.BA2, sn.BA5, sn.BA6, sn.SP1, sn.SP2, sn.SP5)},
    "groups": sn.NormRef(3, "all", "one"),
    "groups-B": sn.NormRef(3, "all", "batch"),
}
# The first sigma of a mini-batch of one is sqrt(eps), and dy / sigma all but cancels: 0.1 costs one digit, not three.
MOMENTS = [sn.Lp(p, center, eps=0.01) for p in (1, 2) for center in ("batch", "estimate", "zero")]
SHAPES = {
    "features": (5, 6),
    "one": (1, 39),
    "wide": (3, 129),
    "line": (2, 6, 37),
    "map": (3, 6, 5, 7),
    "volume": (2, 6, 2, 3, 5),
}
NARROW = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype, last: bool) -> Tensor:
    """A skewed sample of ``dtype``, features together in memory or not."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = ((x + 0.4 * x**2) * (1 + 0.1 * seed) + 0.7).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


def reference(layer: sn.Norm) -> sn.Norm:
    """The same layer in float64, for the slower backend."""
    return copy.deepcopy(layer).double()


def step(layer: sn.Norm, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    for parameter in layer.parameters():
        parameter.grad = None
    y = layer(x)
    y.backward(dy)
    grads = {f"d{name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad, **grads}


def compare(name: str, got: dict[str, Tensor], want: dict[str, Tensor], terms: int, dtype: torch.dtype) -> None:
    assert got.keys() == want.keys()
    for key, value in got.items():
        assert value.isfinite().all(), f"{name} {key}"
        scale = max(want[key].abs().max().item(), 1.0)
        bound = rounding(torch.float64 if dtype == torch.float64 else torch.float32, terms, scale)
        if key in ("y", "dx"):  # stored in dtype, with one rounding of each value
            bound += NARROW.get(dtype, 0) * scale
        worst = (value.double() - want[key].double()).abs().max().item()
        assert worst <= bound, f"{name} {key}: off by {worst:.2e}, rounding allows {bound:.2e}"


def follow(
    name: str, layer: sn.Norm, inputs: list[tuple[Tensor, Tensor]], dtype: torch.dtype, is_fused: bool | None = True
) -> None:
    """Two weight updates of the layer and of its reference, state and all."""
    if dtype == torch.float64:
        layer = layer.double()
    if layer.affine is not None:
        torch.nn.init.uniform_(layer.affine.weight, 0.5, 2)
        torch.nn.init.uniform_(layer.affine.bias, -1, 1)
    slow = reference(layer)
    terms = max(64, inputs[0][0].numel() // layer.num_features)
    for i, (x, dy) in enumerate(inputs):
        got = step(layer, x, dy)
        with using("eager"):
            want = step(slow, x.double(), dy.double())
        compare(f"{name} call {i}", got, want, terms, dtype)
        if i % 2:
            layer.fold(), slow.fold()
        compare(f"{name} state {i}", dict(layer.named_buffers()), dict(slow.named_buffers()), terms, torch.float32)
    if is_fused is not None:
        assert bool(layer._calls.fused and layer._calls.fused.latest) == is_fused, f"{name}: which path was taken?"


def cases() -> Iterator[Any]:
    for (ref_name, ref), moment, policy in itertools.product(
        REFS.items(), MOMENTS, (MIXED, ONE_PASS, sn.Batch(), sn.Sample())
    ):
        streams = isinstance(policy, sn.Streaming)
        if not streams and (isinstance(policy, sn.Sample) != (ref.samples == "one")):
            continue
        if isinstance(policy, sn.Sample) and moment.center == "estimate":
            continue
        setting = {"batch": "A", "estimate": "B", "zero": "C"}[moment.center]
        kind = {id(MIXED): "mixed", id(ONE_PASS): "onepass"}.get(id(policy), type(policy).__name__)
        yield pytest.param(ref, moment, policy, id=f"{ref_name}-{setting}{moment.p}-{kind}")


CASES = [*cases()]
OTHERS = [torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("turn", "dtype", "case"),
    [
        *(pytest.param(i, torch.float32, case, id=f"{case.id}-float32") for i, case in enumerate(CASES)),
        *(pytest.param(i, OTHERS[i % 3], case, id=f"{case.id}-other") for i, case in enumerate(CASES)),
    ],
)
def test_equals_float64(turn: int, dtype: torch.dtype, case: Any) -> None:
    # What differs between dtypes is the width: float32 takes half of the shapes in turns, one of the others a third.
    ref, moment, policy = case.values
    first, every = (turn // 3 % 3, 3) if dtype in OTHERS else ((turn + turn // 18) % 2, 2)
    shapes = [*SHAPES.items()][first::every]
    for place, (shape_name, shape) in enumerate(shapes):
        if shape[1] % ref.groups(shape[1]) if ref.features != 3 else shape[1] % 3:
            continue
        view = ref.view(torch.empty(shape))
        if moment.center == "batch" and ref.size(view.shape) == 1:
            continue
        for last in (False, True) if dtype in OTHERS else ((turn // 4 + place) % 2 == 1,):
            # Elsewhere the gain is a layer of its own, which reads what has been rounded to a narrow dtype.
            layer = sn.Norm(shape[1], ref, moment, policy, affine=ref == sn.BA1)
            calls = 5 if dtype == torch.float32 else 3  # before a weight update and after it
            inputs = [(draw(shape, i, dtype, last), draw(shape, 50 + i, dtype, last)) for i in range(calls)]
            follow(f"{shape_name} last={last}", layer, inputs, dtype, None)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("center", ["batch", "estimate", "zero"])
def test_every_instruction_set(isa: str, p: int, center: Any) -> None:
    shapes = [(5, 70), (3, 6, 9, 7), (2, 33, 5)]
    for turn, (dtype, last) in enumerate(itertools.product(cpu.NAMES, (False, True))):
        shape = shapes[(turn + p + len(center)) % 3]
        layer = sn.Norm(shape[1], sn.BA1, sn.Lp(p, center), MIXED, affine=True)
        inputs = [(draw(shape, i, dtype, last), draw(shape, 50 + i, dtype, last)) for i in range(4)]
        follow(f"{isa} {shape} {last}", layer, inputs, dtype)


LARGE: dict[str, list[tuple[tuple[int, ...], torch.dtype, bool]]] = {
    "sums beyond float32": [((6, 5, 130, 140), torch.float32, False), ((6, 5, 130, 140), torch.bfloat16, True)],
    "tiles": [((2, 2100), torch.float32, False), ((2, 2100), torch.bfloat16, False)],
    "blocks of broken lines": [((5300, 300), torch.float32, False), ((2000, 300), torch.bfloat16, False)],
    "past the caches by columns": [
        ((100, 64, 16, 16), torch.float32, True),
        ((100, 64, 32, 16), torch.bfloat16, True),
    ],
    "past the caches by rows": [((68, 64, 32, 32), torch.float32, False)],
}
"""The ways of ``csrc/norm.cpp`` for what is large, each by the smallest tensors that go it: sums that go on in float64,
more slots than are processed together, blocks of rows, and outputs that bypass the caches, or do not where a row ends
within a line of them."""


@pytest.mark.parametrize("policy", [MIXED, ONE_PASS], ids=["mixed", "onepass"])
@pytest.mark.parametrize("which", LARGE)
def test_large_tensors(which: str, policy: sn.Policy) -> None:
    for shape, dtype, last in LARGE[which]:
        layer = sn.Norm(shape[1], sn.BA1, sn.Lp(2, "estimate"), policy, affine=True)
        inputs = [(draw(shape, i, dtype, last), draw(shape, 50 + i, dtype, last)) for i in range(2)]
        follow(f"{shape} {last}", layer, [inputs[0], inputs[1], inputs[0]], dtype)


@pytest.mark.parametrize("size", range(3), ids=["features", "maps", "large maps"])
@pytest.mark.parametrize("policy", range(3), ids=["mixed", "onepass", "batch"])
@pytest.mark.parametrize("moment", range(len(MOMENTS)), ids=lambda i: repr(MOMENTS[i]))
def test_vectorized_cycles(moment: int, policy: int, size: int) -> None:
    """In 1, 2 or 6 steps, in turns."""
    shape, steps = [(12, 40), (12, 7, 5, 3), (6, 3, 40, 41)][size], [1, 2, 6][(moment + policy + size) % 3]
    for last in (False, True):
        layer = sn.Norm(shape[1], sn.BA1, MOMENTS[moment], [MIXED, ONE_PASS, sn.Batch()][policy], affine=True)
        layer.steps = steps
        inputs = [(draw(shape, i, torch.float32, last), draw(shape, 50 + i, torch.float32, last)) for i in range(4)]
        follow(f"{shape} {last}", layer, inputs, torch.float32)


@pytest.mark.parametrize("offset", [1e6, -1e6])
@pytest.mark.parametrize("center", ["batch", "estimate"])
@pytest.mark.parametrize("policy", [MIXED, ONE_PASS, sn.Batch()], ids=["mixed", "onepass", "batch"])
def test_a_huge_mean_costs_no_digits(policy: sn.Policy, center: Any, offset: float) -> None:
    """A mean of 1e6 and a deviation of 1: float32 holds the data to 0.06, and y must be as good as the data."""
    for shape, last in itertools.product([(64, 5), (4, 5, 9, 9), (9, 4, 300, 5)], (False, True)):
        layer = sn.Norm(shape[1], sn.BA1, sn.Lp(2, center), policy, affine=True)
        slow = reference(layer)
        for i in range(4):
            x, dy = draw(shape, i, torch.float32, last) + offset, draw(shape, 9 + i, torch.float32, last)
            got = step(layer, x, dy)
            with using("eager"):
                want = step(slow, x.double(), dy.double())
            # mu_hat is kept in float32: half a unit in its last place, against a deviation of about 1, for every call
            allowed = (i + 2) * abs(offset) * 2.0**-24 * 4 + 1e-4
            for key, value in list(got.items())[:2]:
                worst = (value - want[key]).abs().max() / max(want[key].abs().max(), 1)
                assert worst < allowed, f"{shape} {last} call {i} {key}: {worst:.1e} of {allowed:.1e}"
            if i == 1:
                layer.fold(), slow.fold()


@pytest.mark.parametrize("scale", [1e-38, 1e-42, 1e-30, 1e15])
def test_tiny_and_large_values(scale: float) -> None:
    """What has squares of too little precision is given back to the composition, with the same result."""
    for p, shape in itertools.product((1, 2), [(6, 5), (3, 5, 4, 4)]):
        layer = sn.Norm(5, sn.BA1, sn.Lp(p, "estimate"), MIXED, affine=True)
        follow(
            f"{scale} {p}",
            layer,
            [(draw(shape, i, torch.float32, False) * scale, draw(shape, i, torch.float32, False)) for i in range(3)],
            torch.float32,
            is_fused=scale < 1e9,
        )


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 2, 3)], ids=str)
def test_nothing_that_is_not_finite_gets_into_the_stream(shape: tuple[int, ...]) -> None:
    bads = itertools.cycle((float("nan"), float("inf"), float("-inf")))
    for where, last, position in itertools.product(("x", "dy"), (False, True), range(torch.Size(shape).numel())):
        layer = sn.StreamingNorm(shape[1])
        for i in range(2):
            step(layer, draw(shape, i, torch.float32, last), draw(shape, 9 + i, torch.float32, last))
        before = copy.deepcopy(layer)
        x, dy = draw(shape, 5, torch.float32, last), draw(shape, 6, torch.float32, last)
        broken = x if where == "x" else dy
        broken[torch.unravel_index(torch.tensor(position), shape)] = next(bads)
        step(layer, x, dy)
        kept = [layer.H1, layer.H2] if where == "x" else [layer.H2]
        old = [before.H1, before.H2] if where == "x" else [before.H2]
        for memory, was in zip(kept, old, strict=True):
            assert memory is not None
            assert was is not None
            assert memory.skipped == was.skipped + 1
            for name in (*memory.state(), "estimate", "seen"):
                assert torch.equal(getattr(memory, name), getattr(was, name)), f"{where} {position} {name}"


def test_odd_layouts_are_copied_and_right() -> None:
    base = draw((6, 8, 10, 12), 0, torch.float32, False)
    views = {
        "every second sample": base[::2],
        "every second feature": base[:, ::2],
        "a window": base[:, :, 2:7, 3:9],
        "transposed": base.transpose(2, 3),
        "expanded": base[:1].expand(6, 8, 10, 12),
        "overlapping": torch.as_strided(base, (4, 8, 5), (40, 5, 1)).unfold(1, 4, 2)[..., 0],
        "offset": base.flatten()[3 : 3 + 6 * 8 * 10].reshape(6, 8, 10),
        "flipped": base.flip(0),
    }
    for name, x in views.items():
        for dy in (
            torch.randn(x.shape),
            torch.ones(()).expand(x.shape),
            torch.randn(*x.shape[::-1]).permute(*range(x.ndim)[::-1]),
        ):
            layer = sn.StreamingNorm(x.shape[1])
            slow = reference(layer)
            for _ in range(2):
                got = step(layer, x, dy)
                with using("eager"):
                    want = step(slow, x.double(), dy.double())
                compare(name, got, want, max(64, x.numel() // x.shape[1]), torch.float32)


def test_an_empty_batch_changes_nothing() -> None:
    layer = sn.StreamingNorm(4)
    before = copy.deepcopy(layer.state_dict())
    for shape in ((0, 4), (0, 4, 3, 3), (2, 4, 0, 3)):
        assert layer(torch.empty(shape)).shape == shape
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_on_poisoned_memory() -> None:
    """Nothing is read that was not written: memory is handed out full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        for ref, p, shape in itertools.product((sn.BA1, sn.SP1, sn.SP2, sn.SP5), (1, 2), [(3, 5), (2, 5, 3, 7)]):
            moment = sn.Lp(p, "zero")
            for last in (False, True):
                layer = sn.Norm(5, ref, moment, MIXED, affine=True)
                inputs = [
                    (draw(shape, i, torch.float32, last), draw(shape, 9 + i, torch.float32, last)) for i in range(3)
                ]
                follow(f"{ref} {p} {shape}", layer, inputs, torch.float32, None)
    finally:
        torch.use_deterministic_algorithms(before)


def test_results_do_not_depend_on_the_threads() -> None:
    """The same bits, run after run and whatever the number of threads."""
    threads = torch.get_num_threads()
    for shape, last in itertools.product([(32, 96, 17, 19), (300, 1000), (8, 200, 20, 20)], (False, True)):
        x, dy = draw(shape, 0, torch.float32, last), draw(shape, 1, torch.float32, last)
        results = []
        try:
            for count in (1, 2, 2, 3, 5):
                torch.set_num_threads(count)
                layer = sn.StreamingNorm(shape[1])
                got = [step(layer, x, dy), step(layer, x, dy)]
                results.append([*got[0].values(), *got[1].values(), *layer.buffers()])
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), f"{shape} {last}"


def test_weights_of_another_dtype() -> None:
    layer, x = sn.StreamingNorm(6).bfloat16(), draw((4, 6, 3), 0, torch.bfloat16, False)
    got = step(layer, x, torch.ones_like(x))
    assert got["daffine.weight"].dtype == torch.bfloat16
    assert layer.H1 is not None
    assert layer.H1.short.dtype == torch.float32


def test_who_watches_sees_torch_operations() -> None:
    """Tracing, compiling and transforms would not see what a kernel does."""
    layer = sn.StreamingNorm(3)
    x = torch.randn(4, 3)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    layer(x)
    with Watch():
        layer(x)
    assert len(seen) > 10


def test_hooks_on_the_gain_are_called() -> None:
    layer = sn.StreamingNorm(3)
    called = []
    assert layer.affine is not None
    layer.affine.register_forward_hook(lambda *_: called.append(1))
    layer(torch.randn(4, 3))
    assert called


def test_moved_buffers_are_found() -> None:
    layer, other = sn.StreamingNorm(3), sn.StreamingNorm(3)
    for i in range(6):
        x = draw((4, 3), i, torch.float32, False)
        step(layer, x, x), step(other, x, x)
        if i == 1:
            layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
        if i == 2:
            layer.share_memory()
        if i == 3:
            layer.double().float()
        layer.fold(), other.fold()
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), other.buffers(), strict=True))


def test_a_rule_of_ones_own_is_left_to_the_op() -> None:
    class Mine(LongShort):
        pass

    class Policy(sn.Policy):
        F = Mine((0.7, 0.3, 0.0), (0.7, 0.3))
        G = Mine((0.7, 0.3, 0.0), (0.7, 0.3))
        uses_estimate = True

    layer = sn.Norm(6, sn.BA1, sn.Lp(2, "estimate"), Policy())
    x = [(draw((4, 6, 5), i, torch.float32, False), draw((4, 6, 5), i, torch.float32, False)) for i in range(3)]
    follow("own rule", layer, x, torch.float32, False)


FORK = """
import os, torch, streamnorm as sn
torch.set_num_threads(2)
layer, x = sn.StreamingNorm(64), torch.randn(64, 64, 16, 16)
layer(x)
child = os.fork()
if child == 0:
    layer(x)
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""


def test_a_forked_worker_does_not_hang() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "0", done.stderr
