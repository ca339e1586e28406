"""What `lower` makes of a tensor-parallel model: each rank packs its part."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from distributed_net import X, check_equal, copied, dense, refuses, train, weights, whole_batch
from distributed_tp import WIDTHS, after, before, mesh_of_all, parallel
from fake_timer import DENSE_WINS, PACKED_WINS, install
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import nmfx
from nmfx.capture.lowering import Target
from nmfx.capture.parts import LinearPart

LAYERS = [f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("fc1", "fc2")]


def parts(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LinearPart)]


def states(model: nn.Module) -> dict[str, str]:
    return {row.fqn: row.state for row in nmfx.report(model).rows}


def check_outputs(fast: nn.Module, folded: nn.Module, x: Tensor = X) -> None:
    """Outputs and the gradient of the input, within rounding."""
    grads = []
    for model in (fast, folded):
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        out.square().sum().backward()
        grads.append((out.detach(), leaf.grad))
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def check_tp_lower_packs_parts() -> None:
    """Columns of fc2 on each rank: 12 and 16 are whole groups of 4; 14 and 10 cut one."""
    for inner in WIDTHS:
        for make in (before, after):
            model = train(make(inner), whole_batch)
            values = weights(model)
            folded = nmfx.fold(model)
            fast = nmfx.lower(model, (X,), tune=False)
            assert parts(fast) == LAYERS, parts(fast)
            found = states(fast)
            packed = {name for name in LAYERS if found[f"{name}.part.weight"] == "packed"}
            assert packed >= {name for name in LAYERS if "fc1" in name or inner in (24, 32)}, found
            assert "tensor parallel" in str(nmfx.report(fast))
            assert set(states(model).values()) == {"sparse", "dense"}, states(model)
            check_equal(model, values)
            check_outputs(fast, folded)
            back = nmfx.fold(fast)
            assert not parts(back)
            check_equal(back, folded)
            assert list(back.state_dict()) == list(folded.state_dict())
            assert type(back.blocks[0].fc1) is nn.Linear
            assert back.blocks[0].fc2.weight.placements == (Shard(1),)
            again = nmfx.lower(back, (X,), tune=False)
            assert torch.equal(again(X), fast(X))


def check_tp_lower_inplace() -> None:
    model = train(before(24), whole_batch)
    folded = nmfx.fold(model)
    assert nmfx.lower(model, (X,), inplace=True, tune=False) is model
    assert len(parts(model)) == 4
    check_outputs(model, folded)


def check_tp_lower_measures_each_rank() -> None:
    """One rank finds packed faster, the other dense: what they send each other is the same."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch, PACKED_WINS if dist.get_rank() == 0 else DENSE_WINS)
        model = train(before(24), whole_batch)
        folded = nmfx.fold(model)
        fast = nmfx.lower(model, [(X,), (X[:1],)])
        report = nmfx.report(fast)
    wanted = "packed" if dist.get_rank() == 0 else "dense"
    assert set(states(fast).values()) == {wanted, "dense"}, states(fast)
    assert parts(fast) == LAYERS, fast
    assert "the whole model was not timed" in str(report), str(report)
    row = next(row for row in report.rows if "blocks.0.fc1" in row.fqn)
    assert row.ms_dense > 0, row
    check_outputs(fast, folded)
    check_equal(nmfx.fold(fast), folded)


def check_tp_lower_where_one_rank_has_nothing_sparse() -> None:
    """Only the first rows of fc1 satisfy 2:4."""
    plain = dense(24)
    with torch.no_grad():
        for block in plain.blocks:
            rows = block.fc1.weight[:12]
            rows *= nmfx.nm_mask(rows, "2:4", 1)
    model = parallel(plain)
    for tune in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            install(patch, PACKED_WINS)
            fast = nmfx.lower(model, (X,), tune=tune)
        wanted = "packed" if dist.get_rank() == 0 else "dense"
        assert states(fast)["blocks.1.fc1.part.weight"] == wanted, states(fast)
        check_outputs(fast, model)
        check_outputs(copied(fast), model)


def check_tp_lower_with_real_timings() -> None:
    model = after(32)
    fast = nmfx.lower(model, (X,))
    check_outputs(fast, nmfx.fold(model))


def check_tp_lower_weights_from_elsewhere() -> None:
    """Nothing is sparsified; the weights satisfy 2:4."""
    folded = parallel(nmfx.fold(nmfx.sparsify(dense(24), "2:4")))
    fast = nmfx.lower(folded, (X,), tune=False)
    assert len(parts(fast)) == 4
    check_outputs(fast, folded)


@contextlib.contextmanager
def interrupted_at(number: int) -> Iterator[None]:
    """Ctrl-C while the layer with this number is lowered."""
    lower, count = Target.lower, 0

    def broken(self: Target, *args: object) -> None:
        nonlocal count
        count += 1
        if count == number:
            raise KeyboardInterrupt
        lower(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Target, "lower", broken)
        yield


def check_tp_lower_interrupted() -> None:
    for number in (1, 3):
        model = train(before(24), whole_batch)
        folded = nmfx.fold(model)
        with interrupted_at(number), pytest.raises(KeyboardInterrupt):
            nmfx.lower(model, (X,), inplace=True, tune=False)
        assert not parts(model)
        check_equal(model, folded)
        check_outputs(model, folded)


class Sequence(nn.Module):
    """Rows of the sequence lie on different ranks between the layers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(2, 4, 16).chunk(2, 1)[dist.get_rank()]
        return self.net.head(self.net.blocks(x))


def check_tp_lower_sequence_parallel() -> None:
    plan = {
        "norm": SequenceParallel(use_local_output=True),
        "fc1": ColwiseParallel(input_layouts=Shard(1)),
        "fc2": RowwiseParallel(output_layouts=Shard(1)),
    }
    model = Sequence(nmfx.sparsify(dense(24), {"*.fc*": "2:4"}))
    for block in model.net.blocks:
        parallelize_module(block, mesh_of_all(), plan)
    fast = nmfx.lower(model, (X,), tune=False)
    assert len(parts(fast)) == 4
    check_outputs(fast, nmfx.fold(model))
    assert sent(fast) == sent(nmfx.fold(model))


def sent(model: nn.Module) -> dict[object, int]:
    """How often each collective is called, forward and backward."""
    with CommDebugMode() as comms:
        model(X).square().sum().backward()
    assert comms.get_total_counts() > 0
    return dict(comms.get_comm_counts())


def check_tp_lower_sends_the_same() -> None:
    model = before(24)
    assert sent(nmfx.lower(model, (X,), tune=False)) == sent(nmfx.fold(model))


def check_tp_lower_uneven() -> None:
    """7 rows as 4 + 3, with DTensors between the layers."""
    torch.manual_seed(8)
    net = nn.Sequential(nn.Linear(16, 7, bias=False), nn.Linear(7, 16), nn.Linear(16, 7))
    model = nmfx.sparsify(net, {"0": "2:4", "2": "1:4"})
    plan = {
        "0": ColwiseParallel(output_layouts=Replicate(), use_local_output=False),
        "2": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh_of_all(), plan)
    model[1].register_forward_pre_hook(lambda module, args: args[0].to_local())
    fast = nmfx.lower(model, (X,), tune=False)
    assert parts(fast) == ["0", "2"]
    check_outputs(fast, nmfx.fold(model))


def check_tp_lower_refusals() -> None:
    plain = parallel(dense(24))
    parameters = dict(plain.named_parameters())
    refuses("is N:M sparse", lambda: nmfx.lower(plain, (X,), inplace=True))
    assert [*plain.named_parameters()] == [*parameters.items()]
    fast = nmfx.lower(before(24), (X,), tune=False)
    refuses("is lowered already", lambda: nmfx.lower(fast, (X,)))
    refuses("this process's part of a layer", lambda: nmfx.save(fast, "/nowhere.safetensors"))
    refuses("this process's part of a layer", lambda: nmfx.preview(fast, "2:4", (X,)))
    refuses("cuda_graph=True", lambda: nmfx.lower(before(24), (X,), cuda_graph=True))


class Summed(nn.Module):
    """A layer whose ranks add up plain tensors: nothing tells but a run."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        dist.all_reduce(x)
        return x


def check_lower_hears_collectives() -> None:
    torch.manual_seed(3)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        install(patch, PACKED_WINS if dist.get_rank() == 0 else DENSE_WINS, (1.0, 9.0))
        for model, heard in ((Summed(), True), (nn.Sequential(nn.Linear(16, 16)), False)):
            fast = nmfx.lower(nmfx.sparsify(model, "2:4"), (X,))
            notes = str(nmfx.report(fast))
            assert ("exchanges tensors with other processes" in notes) == heard, notes
            assert ("whole model: dense" in notes) != heard, notes
            torch.testing.assert_close(fast(X), nmfx.fold(model)(X))


def check_tp_lower_compiled() -> None:
    for inner in (24, 28):
        fast = nmfx.lower(before(inner), (X,), tune=False)
        with torch.no_grad():
            compiled = torch.compile(fast, fullgraph=True)
            torch.testing.assert_close(compiled(X), fast(X))
