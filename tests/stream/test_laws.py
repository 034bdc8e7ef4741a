"""The laws of the library, over every case they speak of."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import ALL_REFS, CASES, MOMENTS, Case, draw
from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import streamnorm as sn
from streamnorm.definition.ref import REFS
from streamnorm.stream import CHUNK

BN_LIKE = sn.Streaming(alpha=(0, 1), beta=(0, 0, 1))
BATCH_REFS = {name: ref for name, ref in ALL_REFS.items() if ref.samples == "batch"}


def grad(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


# 1. The special case


@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5), (4, 3, 5, 6), (3, 3, 2, 4, 3)], ids=str)
@pytest.mark.parametrize("center", ["batch", "estimate"])
def test_special_case_is_batch_norm(shape: tuple[int, ...], center: str) -> None:
    layer = sn.StreamingNorm(3, center=center, alpha=(0, 1), beta=(0, 0, 1)).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 2.0, -1.0]))
        layer.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    for step in range(3):
        x, dy = draw(shape, step).requires_grad_(), draw(shape, 10 + step)
        ours = layer(x)
        want = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=1e-5)
        assert (ours - want).abs().max() <= 1e-10
        inputs = (x, layer.weight, layer.bias)
        for a, b in zip(torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(want, inputs, dy), strict=True):
            assert (a - b).abs().max() <= 1e-10
        layer.fold()


@pytest.mark.parametrize("moment", [m for m in MOMENTS if m.center != "estimate"], ids=repr)
@pytest.mark.parametrize("name", BATCH_REFS)
def test_special_case_is_general_batch_norm(name: str, moment: sn.Lp) -> None:
    streaming, batch = (sn.Norm(6, BATCH_REFS[name], moment, policy).double() for policy in (BN_LIKE, sn.Batch()))
    x, dy = draw((3, 6, 4, 5), 0), draw((3, 6, 4, 5), 1)
    for got, want in zip(grad(streaming, x, dy), grad(batch, x, dy), strict=True):
        assert (got - want).abs().max() <= 1e-10


@pytest.mark.parametrize("name", ["BA1", "BA2", "BA6", "groups-B"])
def test_settings_a_and_b_agree_in_the_special_case(name: str) -> None:
    x, dy = draw((5, 6, 4), 0), draw((5, 6, 4), 1)
    for p in (1, 2, 3):
        a, b = (grad(sn.Norm(6, BATCH_REFS[name], sn.Lp(p, c), BN_LIKE).double(), x, dy) for c in ("batch", "estimate"))
        assert_close(f"y p={p}", a[0], b[0], 64)
        if p == 2:
            assert_close("dx p=2", a[1], b[1], 64)
        else:
            assert (a[1] - b[1]).abs().max() > 1e-3, "B holds the center constant, which is felt for p != 2"


@pytest.mark.parametrize("name", BATCH_REFS)
def test_gradcheck_in_the_special_case(name: str) -> None:
    for moment in (sn.Lp(2, "batch"), sn.Lp(3, "batch"), sn.Lp(1.5, "zero"), sn.Lp(1, "zero")):
        layer = sn.Norm(6, BATCH_REFS[name], moment, BN_LIKE).double()
        x = draw((2, 6, 2, 2), 0).requires_grad_()
        assert torch.autograd.gradcheck(lambda z, layer=layer: fresh(layer)(z), x)


def fresh(layer: sn.Norm) -> sn.Norm:
    """The layer as if it had seen nothing: a function of its input alone, which is what gradcheck differentiates."""
    for memory in (layer.H1, layer.H2):
        if memory is not None:
            memory.clear()
    return layer


def test_training_in_the_special_case_follows_batch_norm_for_100_steps() -> None:
    def net(norm) -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(10, 16, bias=False),
            norm(16),
            nn.ReLU(),
            nn.Linear(16, 16, bias=False),
            norm(16),
            nn.ReLU(),
            nn.Linear(16, 3),
        )

    ours = net(lambda c: sn.StreamingNorm(c, center="batch", alpha=(0, 1), beta=(0, 0, 1)))
    theirs = net(nn.BatchNorm1d)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (ours, theirs)]
    generator = torch.Generator().manual_seed(2)
    for _ in range(100):
        x = torch.randn(32, 10, generator=generator)
        y = (x[:, :3] + 0.3 * x[:, 3:6] ** 2).argmax(1)
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        # 100 updates of float32 rounding, each of relative size 1e-7 to 1e-6 of what it changes.
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm().clamp_min(1e-2)


# 2. The named special cases of others


@pytest.mark.parametrize("shape", [(5, 6), (4, 6, 3), (3, 6, 4, 5)], ids=str)
def test_sample_normalizations_of_torch(shape: tuple[int, ...]) -> None:
    x, dy = draw(shape, 0), draw(shape, 1)
    twins = {
        "layer": (sn.SampleNorm(6, affine=False), lambda z: F.layer_norm(z, z.shape[1:])),
        "group": (sn.SampleNorm(6, sn.NormRef(2, "all", "one"), affine=False), lambda z: F.group_norm(z, 2)),
        "rms": (
            sn.Norm(6, sn.SP2, sn.Lp(2, "zero"), sn.Sample(), op=sn.Scale()),
            lambda z: F.rms_norm(z, z.shape[1:], eps=1e-5),
        ),
    }
    if len(shape) > 2:
        twins["instance"] = (sn.SampleNorm(6, sn.SP1, affine=False), F.instance_norm)
    for name, (ours, theirs) in twins.items():
        got, want = grad(ours.double(), x, dy), grad(theirs, x, dy)
        assert_close(f"{name} y", got[0], want[0], 64)
        assert_close(f"{name} dx", got[1], want[1], 64)


# 3. What the stream remembers


@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_short_is_the_exact_mean_in_any_order(values: list[float], seed: int) -> None:
    rule = sn.LongShort((0.7, 0.3, 0.0), (0.7, 0.3))
    s = torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1)
    shuffled = s[torch.randperm(len(s), generator=torch.Generator().manual_seed(seed))]
    for arrivals in (s, shuffled):
        memory = sn.Memory(rule, (1, 1)).double()
        for one in arrivals:
            memory.observe(one.unsqueeze(0))
        assert memory.short.item() == pytest.approx(s.mean().item(), abs=1e-9)
        assert memory.count == len(values)


@pytest.mark.parametrize("updates", [1, 2, 5])
def test_long_has_its_closed_form(updates: int) -> None:
    k1, k2 = 0.8, 0.2
    memory = sn.Memory(sn.LongShort((0.5, 0.5, 0.0), (k1, k2)), (2, 3)).double()
    shorts = []
    for u in range(updates):
        s = draw((4, 2, 3), u)
        memory.observe(s)
        shorts.append(s.mean(0))
        memory.fold()
    want = k1 ** (updates - 1) * shorts[0] + sum(k2 * k1 ** (updates - 1 - u) * shorts[u] for u in range(1, updates))
    assert_close("long", memory.long, want, 64)
    assert memory.count == 0
    assert memory.updates == updates


def test_an_update_without_arrivals_changes_nothing() -> None:
    memory = sn.Memory(sn.LongShort((0.5, 0.5, 0.0), (0.8, 0.2)), (2, 3))
    memory.observe(torch.randn(2, 2, 3))
    memory.fold()
    before = {k: v.clone() for k, v in memory.state_dict().items()}
    memory.fold()
    assert all(torch.equal(before[k], v) for k, v in memory.state_dict().items())


@pytest.mark.parametrize("rule", [sn.LongShort((0.5, 0.3, 0.2), (0.8, 0.2)), sn.Exponential(0.2)], ids=repr)
@pytest.mark.parametrize("g", [1, 5, CHUNK + 3])
def test_arrivals_at_once_equal_arrivals_one_by_one(rule: sn.Rule, g: int) -> None:
    once, each = sn.Memory(rule, (2, 3)).double(), sn.Memory(rule, (2, 3)).double()
    for round_ in range(3):
        s = draw((g, 2, 3), round_)
        if round_ != 1:
            s[g // 2, 1, 2] = float("nan")
        together = once.observe(s)
        apart = torch.cat([each.observe(one.unsqueeze(0)) for one in s])
        good = together.isfinite().flatten(1).all(1)
        assert torch.equal(good, apart.isfinite().flatten(1).all(1))
        assert_close("estimates", together[good], apart[good], g)
        for name, value in each.state_dict().items():
            assert_close(name, once.state_dict()[name].double(), value.double(), g)
        once.fold()
        each.fold()


# 4. Merging


def test_merge_equals_having_seen_both() -> None:
    rule = sn.LongShort((0.7, 0.3, 0.0), (0.7, 0.3))
    whole, left = sn.Memory(rule, (2, 3)).double(), sn.Memory(rule, (2, 3)).double()
    common = draw((3, 2, 3), 0)
    for memory in (whole, left):
        memory.observe(common)
        memory.fold()
    right = copy.deepcopy(left)
    s = draw((7, 2, 3), 1)
    whole.observe(s)
    left.observe(s[:2])
    right.observe(s[2:])
    left.merge([right])
    for name in ("long", "short", "count", "updates"):
        assert_close(name, getattr(left, name).double(), getattr(whole, name).double(), 64)


# 5. beta only mixes


def test_h2_accumulates_the_same_whatever_beta() -> None:
    states = []
    for beta in [(0, 0, 0), (0, 0, 1), (0.7, 0.3, 0), (0.7, 0, 0.3)]:
        layer = sn.StreamingNorm(3, beta=beta, affine=False).double()
        for step in range(4):
            grad(layer, draw((4, 3), step), draw((4, 3), 10 + step))
            if step == 1:
                layer.fold()
        states.append(layer.H2.state())
    for state in states[1:]:
        for name, value in state.items():
            assert torch.equal(value, states[0][name])
    assert states[0]["long"].abs().sum() > 0


# 6. References that collapse


@pytest.mark.parametrize("policy", [sn.Streaming(), "own"], ids=["streaming", "own"])
@pytest.mark.parametrize("names", [("SP2", "SP3", "SP5"), ("BA1", "BA4", "BA6"), ("BA2", "BA3", "BA5")], ids=str)
def test_references_collapse_on_fully_connected_input(names: tuple[str, ...], policy: sn.Policy | str) -> None:
    x, dy = draw((5, 6), 0), draw((5, 6), 1)
    for moment in (sn.Lp(2, "batch"), sn.Lp(1, "zero"), sn.Lp(3, "batch")):
        own = sn.Sample() if names[0].startswith("SP") else sn.Batch()
        results = [grad(sn.Norm(6, REFS[n], moment, own if policy == "own" else policy).double(), x, dy) for n in names]
        for got in results[1:]:
            assert_close("y", got[0], results[0][0], 64)
            assert_close("dx", got[1], results[0][1], 64)


def test_one_activation_in_setting_a_is_refused_before_any_change() -> None:
    for name, shape in itertools.product(("SP1", "SP4"), [(4, 6)]):
        layer = sn.StreamingNorm(6, REFS[name], center="batch")
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(sn.DegenerateReferenceError, match="Setting A"):
            layer(torch.randn(shape))
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    for name in ("BA1", "BA6"):
        with pytest.raises(sn.DegenerateReferenceError, match="a single value"):
            sn.BatchNorm(6, REFS[name])(torch.randn(1, 6))


@pytest.mark.parametrize("policy", [sn.Streaming(), "own"], ids=["streaming", "own"])
@pytest.mark.parametrize(
    ("local", "window", "same_as"),
    [
        *[("SP3", 1, "SP5"), ("BA3", 1, "BA5"), ("BA4", 1, "BA6")],
        *[("SP3", 9, "SP2"), ("SP4", 9, "SP1"), ("BA3", 9, "BA2"), ("BA4", 9, "BA1")],
    ],
)
def test_windows_of_one_and_of_the_whole_map(local: str, window: int, same_as: str, policy: sn.Policy | str) -> None:
    x, dy = draw((3, 6, 4, 5), 0), draw((3, 6, 4, 5), 1)
    own = sn.Sample() if local.startswith("SP") else sn.Batch()
    for moment in (sn.Lp(2, "batch"), sn.Lp(1, "batch"), sn.Lp(3, "zero")):
        chosen = own if policy == "own" else policy
        a = grad(sn.Norm(6, REFS[local].with_window(window), moment, chosen).double(), x, dy)
        b = grad(sn.Norm(6, REFS[same_as], moment, chosen).double(), x, dy)
        assert_close("y", a[0], b[0], 64)
        assert_close("dx", a[1], b[1], 64)


def test_one_sample_collapses_batch_references_to_sample_references() -> None:
    x, dy = draw((1, 6, 4, 5), 0), draw((1, 6, 4, 5), 1)
    for i in range(1, 6):
        for moment in (sn.Lp(2, "batch"), sn.Lp(1, "zero")):
            a = grad(sn.Norm(6, REFS[f"BA{i}"], moment, sn.Batch()).double(), x, dy)
            b = grad(sn.Norm(6, REFS[f"SP{i}"], moment, sn.Sample()).double(), x, dy)
            assert_close(f"BA{i} y", a[0], b[0], 64)
            assert_close(f"BA{i} dx", a[1], b[1], 64)


# 7. Invariance


@pytest.mark.parametrize("name", ALL_REFS)
def test_invariance_to_shift_and_scale(name: str) -> None:
    ref = ALL_REFS[name]
    x = draw((3, 6, 4, 5), 0)
    for p in (1, 2, 3):
        for center, b in (("batch", 3.0), ("zero", 0.0)):
            for policy in (sn.Sample() if ref.samples == "one" else sn.Batch(), sn.Streaming()):
                y, z = (sn.Norm(6, ref, sn.Lp(p, center, eps=0), policy).double()(v).detach() for v in (x, 2.5 * x + b))
                # The shift costs digits: x + b is rounded relative to b, which is up to 2^2 times the spread of x.
                assert_close(f"{p} {center} {policy}", z, y, 256)


# 8. Testing


@pytest.mark.parametrize("case", [c for c in CASES if c.moment.p in (2, 3)], ids=str)
def test_evaluation_is_pure(case: Case) -> None:
    layer = case.layer()
    for step in range(2):
        layer(case.input(step))
        layer.fold()
    layer(case.input(5))
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    x = case.input(6)
    y = layer(x)
    assert torch.equal(y, layer(x)), "two evaluations differ"
    each = torch.cat([layer(one.unsqueeze(0)) for one in x])
    assert_close("a sample alone", each, y, 64)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("name", ["BA1", "BA6", "SP2", "BA4"])
def test_the_last_update_left_undone_equals_the_stored_estimate(name: str) -> None:
    layer = sn.Norm(6, ALL_REFS[name], sn.Lp(2, "batch"), sn.Streaming()).double()
    for step in range(3):
        layer(draw((3, 6, 4, 5), step))
        if step < 2:
            layer.fold()
    rule, state = layer.H1.rule, layer.H1.state()
    recomputed = rule.mix[0] * state["long"] + rule.mix[1] * state["short"]
    lazy = layer.eval()(draw((3, 6, 4, 5), 9))
    assert_close("estimate", layer.H1.estimate, recomputed, 4)
    layer.fold()
    assert torch.equal(layer(draw((3, 6, 4, 5), 9)), lazy), "a weight update changed what testing uses"


# 10. Samples and batches


def test_sample_normalization_does_not_see_the_batch_and_batch_normalization_does() -> None:
    x, dy = draw((8, 6), 0), draw((8, 6), 1)
    for layer, equal in ((sn.SampleNorm(6), True), (sn.BatchNorm(6), False)):
        layer = layer.double()
        whole = grad(layer, x, dy)[1]
        parts = torch.cat([grad(layer, a, b)[1] for a, b in zip(x.split(2), dy.split(2), strict=True)])
        difference = ((whole - parts).norm() / whole.norm()).item()
        assert difference <= 1e-10 if equal else difference > 1e-4


# 11. Round trips


@pytest.mark.parametrize("case", [c for c in CASES if c.moment.p == 1], ids=str)
def test_round_trips(case: Case) -> None:
    layer = case.layer()
    grad(layer, case.input(0), case.input(1))
    layer.fold()
    grad(layer, case.input(2), case.input(3))
    loaded = case.layer()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded.load_state_dict(torch.load(buffer))
    twins = {"deepcopy": copy.deepcopy(layer), "pickle": pickle.loads(pickle.dumps(layer)), "state_dict": loaded}
    want = grad(layer, case.input(4), case.input(5))
    after = layer.state_dict()
    for name, twin in twins.items():
        for a, b in zip(grad(twin, case.input(4), case.input(5)), want, strict=True):
            assert torch.equal(a, b), name
        assert all(torch.equal(v, after[k]) for k, v in twin.state_dict().items()), name


@pytest.mark.parametrize(
    "layer",
    [
        sn.StreamingNorm(6, sn.BA6, 1, "zero", (0.9, 0.1), (0.5, 0.2, 0.3), (0.9, 0.1, 0.8, 0.2), 1e-3, False),
        sn.StreamingNorm(6, sn.BA4.with_window(3)),
        sn.BatchNorm(6, sn.BA2, 3, "zero", 0.5, 1e-4, False),
        sn.SampleNorm(6, sn.NormRef(2, "all", "one"), 1),
        sn.Norm(6, sn.SP2, sn.Lp(2, "zero"), sn.Sample(), affine=True, op=sn.Scale()),
        sn.Norm(6, sn.BA1, sn.Lp(1, "estimate"), sn.Streaming(kappa=(0.9, 0.1, 0.9, 0.1))),
    ],
    ids=repr,
)
def test_repr_is_a_constructor_call(layer: sn.Norm) -> None:
    names = {name: getattr(sn, name) for name in dir(sn)}
    again = eval(repr(layer), names)
    assert repr(again) == repr(layer)
    assert (again.definition, again.policy) == (layer.definition, layer.policy)
    assert (again.affine is None) == (layer.affine is None)


def test_state_stays_wide_whatever_the_weights_become() -> None:
    layer = sn.StreamingNorm(4)
    x = torch.randn(8, 4) * 3 + 300
    layer(x)
    exact = layer.H1.short.clone()
    for narrow in (torch.bfloat16, torch.float16):
        layer.to(narrow)
        assert layer.weight.dtype == narrow
        assert layer.H1.short.dtype == torch.float32
        assert torch.equal(layer.H1.short, exact)
    assert layer.double().H1.short.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input(dtype: torch.dtype) -> None:
    x = draw((16, 6, 5), 0).float()
    narrow, wide = sn.StreamingNorm(6), sn.StreamingNorm(6)
    y = narrow(x.to(dtype))
    assert y.dtype == dtype
    # The input was rounded once and so is the output; the statistics are the float32 ones of the rounded input.
    assert_close("y", y.float(), wide(x.to(dtype).float()).detach(), 1, dtype)
    assert torch.equal(narrow.H1.short, wide.H1.short)


# 13. Locality


def test_a_neuron_of_ba6_knows_itself_alone() -> None:
    def run(x: torch.Tensor) -> sn.Norm:
        layer = sn.StreamingNorm(6, sn.BA6, affine=False, alpha=(0.7, 0.3)).double()
        for step in range(3):
            y = layer(x[step])
            (y**3).sum().backward()
            layer.fold()
        return layer

    x = torch.stack([draw((4, 6, 3, 3), s) for s in range(3)])
    other = x.clone()
    other[:, :, 2, 1, 1] += 5.0
    a, b = run(x.requires_grad_()), run(other.requires_grad_())
    for memory in ("H1", "H2"):
        for name in ("long", "short", "estimate"):
            changed = getattr(getattr(a, memory), name) != getattr(getattr(b, memory), name)
            changed[:, 2, 1, 1] = False
            assert not changed.any()
    assert not torch.equal(a.H1.long, b.H1.long)
