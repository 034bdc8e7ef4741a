"""A cycle in one call equals the loop over its mini-batches, and ``vectorized`` leaves layers as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import MIXED
from nets import NETS, MakeNorm, assert_equal, batch, dau, everything, memories, net, streaming
from torch import nn
from torch.utils.checkpoint import checkpoint

import streamnorm as sn
from streamnorm.nn.norm import Norm
from streamnorm.ops.backends import using


def arms() -> list[tuple[str, str, float, sn.NormRef, sn.Policy]]:
    found = []
    for p in (1, 2):
        for center in ("batch", "estimate", "zero"):
            found.append(("streaming", center, p, sn.BA1, MIXED))
            found.append(("batch", center, p, sn.BA1, sn.Batch()))
            if center != "estimate":  # a sample alone keeps no estimate
                found.append(("sample", center, p, sn.SP2, sn.Sample()))
    return found


def cases() -> list[Any]:
    found = []
    for kind in NETS:
        for name, center, p, ref, policy in arms():
            for m in (1, 2, 3):
                if (kind, center, ref, m) == ("FC", "batch", sn.BA1, 1):
                    continue  # one activation: refused
                for n in (1, 2, 5):
                    setting = {"batch": "A", "estimate": "B", "zero": "C"}[center]
                    moment = sn.Lp(p, center)
                    label = f"{kind}-{name}-{setting}{p}-{m}x{n}"
                    found.append(pytest.param(kind, ref, moment, policy, m, n, id=label))
    return found


def assert_cycles_agree(
    kind: str, norm: MakeNorm, m: int, n: int, cycles: int = 3, warmup: int = 0, bound: float = 1e-11
) -> None:
    """``bound``: rounding is 2e-16, sums have some 100 terms, and where a sigma stands at its floor sqrt(eps) = 3e-3 a
    division makes that 300 times as large: 7e-12."""
    one_call, one_by_one = net(kind, norm), net(kind, norm)
    fast = dau(one_call, m, n, warmup=warmup)
    slow = dau(one_by_one, m, n, warmup=warmup, vectorize=False)
    for step in range(cycles):
        x, y = batch(kind, m * n, step)
        loss, output = fast.update(x, y)
        slow_loss, slow_output = slow.update(x, y)
        torch.testing.assert_close(loss, slow_loss, rtol=bound, atol=bound)
        torch.testing.assert_close(output, slow_output, rtol=bound, atol=bound)
        want = everything(one_by_one)
        for name, value in everything(one_call).items():
            assert value.isfinite().all(), name
            size = max(1.0, want[name].abs().max().item())
            torch.testing.assert_close(value, want[name], rtol=0, atol=bound * size, msg=lambda s, k=name: f"{k}: {s}")


@pytest.mark.parametrize(("kind", "ref", "moment", "policy", "m", "n"), cases())
def test_a_cycle_in_one_call_equals_the_loop(
    kind: str, ref: sn.NormRef, moment: sn.Lp, policy: sn.Policy, m: int, n: int
) -> None:
    warmup = 1 if m == 1 and kind == "FC" else 0  # no first sigma from one activation alone
    assert_cycles_agree(kind, lambda c: Norm(c, ref, moment, policy, affine=True), m, n, 3 + warmup, warmup)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("ref", [sn.BA4.with_window(3), sn.BA6, sn.SP1, sn.NormRef(2, "all", "one")], ids=repr)
def test_a_cycle_in_one_call_equals_the_loop_for_other_references(kind: str, ref: sn.NormRef) -> None:
    assert_cycles_agree(kind, lambda c: Norm(c, ref, sn.Lp(2, "estimate"), MIXED), 3, 4)


def test_a_cycle_longer_than_a_chunk_of_the_rules_equals_the_loop() -> None:
    from streamnorm.stream import CHUNK

    assert_cycles_agree("FC", streaming, 2, CHUNK + 3, cycles=1)


def test_a_warm_up_in_one_call_equals_the_loop() -> None:
    models = net("FC"), net("FC")
    for model, vectorize in zip(models, (True, False), strict=True):
        for step in range(3):
            dau(model, 1, 5, vectorize=vectorize).warm_up(batch("FC", 5, step)[0])
    for name, want in everything(models[1]).items():
        # the bound of assert_cycles_agree
        torch.testing.assert_close(everything(models[0])[name], want, rtol=1e-11, atol=1e-11)


# --- vectorized


@pytest.mark.parametrize("kind", ["BatchNorm1d", "SyncBatchNorm"])
def test_batch_normalization_of_torch_is_refused_in_one_call_by_name(kind: str) -> None:
    model = net("FC", getattr(nn, kind))
    with pytest.raises(ValueError, match=f"{kind} '1' would normalize 3 mini-batches as one") as refusal:
        dau(model, 2, 3).update(*batch("FC", 6, 0))
    assert "streamnorm.BatchNorm" in str(refusal.value)
    assert "vectorize=False" in str(refusal.value)


def test_batch_normalization_of_torch_is_served_by_the_loop_and_in_eval_mode() -> None:
    model = net("FC", nn.BatchNorm1d)
    dau(model, 2, 3, vectorize=False).update(*batch("FC", 6, 0))
    assert model[1].num_batches_tracked == 3
    for layer in (model[1], model[4]):
        layer.eval()
    with sn.vectorized(model, 3):
        model(batch("FC", 6, 0)[0])
    assert model[1].num_batches_tracked == 3


def test_layers_are_as_before_after_an_exception_inside_vectorized() -> None:
    model = net("FC")
    memories(model)[1].steps = 2  # whatever stood there

    def fail_inside() -> None:
        with sn.vectorized(model, 3):
            assert [layer.steps for layer in memories(model)] == [3, 3]
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail_inside()
    assert [layer.steps for layer in memories(model)] == [1, 2]


def test_layers_are_as_before_after_an_update_that_raises() -> None:
    model = net("FC")
    cycle = dau(model, 2, 3)
    with pytest.raises(RuntimeError):
        cycle.update(torch.zeros(6, 7, dtype=torch.float64), torch.zeros(6, dtype=torch.int64))
    assert [layer.steps for layer in memories(model)] == [1, 1]
    cycle.update(*batch("FC", 6, 0))


def test_vectorized_can_be_nested() -> None:
    model = net("FC")
    with sn.vectorized(model, 6):
        with sn.vectorized(model, 2):
            model(batch("FC", 6, 0)[0])
        assert [layer.steps for layer in memories(model)] == [6, 6]
        model(batch("FC", 6, 1)[0])
    assert [layer.steps for layer in memories(model)] == [1, 1]
    assert memories(model)[0].H1.seen == 8


@pytest.mark.parametrize("batches", [0, -1])
def test_vectorized_refuses_fewer_than_one_mini_batch(batches: int) -> None:
    with pytest.raises(ValueError, match=f">= 1, got {batches}"), sn.vectorized(net("FC"), batches):
        pass


def test_samples_that_do_not_divide_are_refused_and_change_nothing() -> None:
    model = net("FC")
    before = everything(model)
    with pytest.raises(ValueError, match="7 samples do not divide into 3"), sn.vectorized(model, 3):
        model(batch("FC", 7, 0)[0])
    assert_equal(everything(model), before)


@pytest.mark.parametrize("spoiled", [False, True])
@pytest.mark.parametrize("backend", [None, "eager", "generic"])
def test_the_loss_may_be_the_mean_over_the_mini_batches(backend: str | None, spoiled: bool) -> None:
    """H2 remembers the gradients of the loop, whose losses add up; also where a gradient is not finite, and through a
    call that is computed again."""
    n = 5
    made = []
    for averaged in (False, True):
        torch.manual_seed(2)
        layer = sn.Norm(3, sn.BA1, sn.Lp(2, "zero"), MIXED, affine=True).double()
        assert layer.H2 is not None
        values: list[torch.Tensor] = []
        with using(backend):
            for call in range(3):
                x = torch.randn(4 * n, 3, dtype=torch.double, requires_grad=True)
                dy = torch.randn(4 * n, 3, dtype=torch.double)
                if spoiled and call == 1:
                    dy[7, 2] = float("inf")
                with sn.vectorized(layer, n, averaged=averaged):
                    y = checkpoint(layer, x, use_reentrant=False) if call == 2 else layer(x)
                share = n if averaged else 1
                y.backward(dy / share)
                grads = (x.grad, layer.weight.grad, layer.bias.grad)
                values += [share * grad for grad in grads if grad is not None]
                layer.zero_grad()
                layer.fold()
        made.append([*values, *layer.H2.buffers()])
    assert len(made[0]) == 9 + 2
    for i, (got, want) in enumerate(zip(made[1], made[0], strict=True)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, equal_nan=True, msg=f"value {i}")


def test_a_cycle_of_one_mini_batch_has_the_units_of_the_loop() -> None:
    """Time steps are no mini-batches: the loss is not their mean."""
    made = []
    for averaged in (False, True):
        torch.manual_seed(2)
        layer = sn.NormRNN(4, 3)
        with sn.vectorized(layer, 1, averaged=averaged):
            layer(torch.randn(5, 8, 4, requires_grad=True))[0].sum().backward()
        made.append(dict(layer.named_buffers()))
    torch.testing.assert_close(made[1], made[0], rtol=0, atol=0)
