"""Parents that read a layer's weight around it see the masked one."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from masked_reference import mask_, nm_mask, sites
from torch import Tensor, nn

import nmfx
from nmfx.capture.generate import base_class
from nmfx.capture.readers import weights_read


class Never(nn.Module):
    """DETR: the layer is never called, its weight is the kernel of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.key.weight.unsqueeze(-1)
        return self.head(F.conv1d(x.mT, weight, self.key.bias).mT)


class Both(nn.Module):
    """Mamba: called in one place, read in another."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixed(self.proj(x)))

    def mixed(self, x: Tensor) -> Tensor:
        return x @ self.proj.weight + x


class Listed(nn.Module):
    """In a loop over layers, under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            weight = layer.weight
            x = torch.relu(F.linear(x, weight, layer.bias))
        first = self.layers[0]
        return self.head(x + first(x))


class Deep(nn.Module):
    """Two levels down, through a module that reads it as well."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Both()
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x)) + (self.inner.proj.weight @ x.mT).mT[..., :4]


class OtherMethod(nn.Module):
    """Gemma 3n: what reads it is called from outside, and is not `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.coefs = nn.Linear(8, 8)

    def correct(self, x: Tensor) -> Tensor:
        return F.linear(x, self.coefs.weight.clamp(-0.2, 0.2))


class UsesIt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.other = OtherMethod()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.other.correct(x))


class Recurrent(nn.Module):
    """A weight that the module which holds it consumes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0] @ self.rnn.weight_hh_l0)


# torch.matmul multiplies in another way when its weight needs no gradient: same sums, other order.
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-6}

READERS = [Never, Both, Listed, Deep, UsesIt, Recurrent]


def build(cls: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return cls(), torch.randn(2, 3, 8)


def masked(dense: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    reference = copy.deepcopy(dense)
    return reference, mask_(reference, sites(reference), 2, 4)


def sparse(dense: nn.Module, lambda_w: float = 0.25) -> nn.Module:
    rules = dict.fromkeys({site.rpartition(".")[0] for site in sites(dense)}, "2:4")
    return nmfx.sparsify(copy.deepcopy(dense), rules, lambda_w=lambda_w)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("cls", READERS)
def test_outputs_equal_those_of_the_masked_model(cls: type[nn.Module], grad: bool) -> None:
    dense, x = build(cls)
    reference, _ = masked(dense)
    model = sparse(dense)
    assert not torch.equal(dense(x), reference(x)), "the mask would not show"
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(x), reference(x), **CLOSE)
    assert not nmfx.verify(model, x)


@pytest.mark.parametrize("cls", READERS)
def test_gradients_are_those_of_the_masked_model_and_decay(cls: type[nn.Module]) -> None:
    dense, x = build(cls)
    reference, pruned = masked(dense)
    model = sparse(dense, lambda_w=0.25)
    for one in (model, reference):
        one(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        wanted = reference.get_parameter(name).grad
        if name in pruned:
            wanted = wanted + 0.25 * pruned[name]  # once per call of the outermost reader
        torch.testing.assert_close(parameter.grad, wanted, msg=name)


@pytest.mark.parametrize("cls", READERS)
def test_verbs_copies_and_threads(cls: type[nn.Module]) -> None:
    dense, x = build(cls)
    wanted = masked(dense)[0](x)
    model = sparse(dense)
    assert list(model.state_dict()) == list(dense.state_dict())
    assert torch.equal(copy.deepcopy(model)(x), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), wanted)
    nmfx.freeze(model)
    assert torch.equal(model(x), wanted)
    assert not nmfx.verify(model, x)
    nmfx.unfreeze(model)
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(model(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, wanted) for result in results)
    folded = nmfx.fold(model)
    assert all(type(a) is type(b) for a, b in zip(folded.modules(), dense.modules(), strict=True))
    assert torch.equal(folded(x), wanted)
    nmfx.unsparsify(model)
    assert all(type(a) is type(b) for a, b in zip(model.modules(), dense.modules(), strict=True))
    assert torch.equal(model(x), dense(x))


@pytest.mark.parametrize("cls", READERS)
def test_lowered_equals_folded(cls: type[nn.Module]) -> None:
    dense, x = build(cls)
    model = sparse(dense)
    fast = nmfx.lower(model, x if isinstance(x, tuple) else (x,), tune=False)
    torch.testing.assert_close(fast(x), nmfx.fold(model)(x))


@pytest.mark.parametrize("cls", READERS)
def test_a_parent_keeps_its_name_and_its_signature(cls: type[nn.Module]) -> None:
    dense, _ = build(cls)
    model = sparse(dense)
    for before, after in zip(dense.modules(), model.modules(), strict=True):
        names = [list(inspect.signature(m.forward).parameters) for m in (before, after)]
        assert names[0] == names[1], type(before)
    assert type(model).__name__ == cls.__name__


def test_the_report_says_who_else_reads_a_weight() -> None:
    model = nmfx.sparsify(Both(), "2:4")
    assert {row.fqn: row.reason for row in nmfx.report(model)}["proj.weight"] == (
        "Both also reads it around its module, and sees the masked weight"
    )


def test_a_layer_that_is_never_called_is_not_packed() -> None:
    dense, x = build(Never)
    fast = nmfx.lower(sparse(dense), (x,), tune=False)
    rows = {row.fqn: (row.state, row.reason) for row in nmfx.report(fast)}
    assert rows["key.weight"] == (
        "dense",
        "Never reads its weight and does not call it, so a packed one would be unpacked every "
        "time; folded",
    )
    dense, x = build(Both)
    fast = nmfx.lower(sparse(dense), (x,), tune=False)
    assert {row.fqn: row.state for row in nmfx.report(fast)}["proj.weight"] == "packed"


@pytest.mark.parametrize("cls", [Never, Both, Listed, UsesIt])
def test_compiled_equals_eager(cls: type[nn.Module]) -> None:
    dense, x = build(cls)
    model = sparse(dense)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).square().sum().backward()
    model(x).square().sum().backward()
    for a, b in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


class Writes(nn.Module):
    """Gemma 3n in training: the weight is clamped in place before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.coefs = nn.Linear(8, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.coefs.weight.data.clamp_(-0.1, 0.1)
        return self.head(self.hidden(self.coefs(x)))


def test_a_weight_that_is_written_to_stays_dense() -> None:
    model = nmfx.sparsify(Writes(), "2:4")
    rows = {row.fqn: (row.state, row.reason) for row in nmfx.report(model)}
    assert rows["coefs.weight"] == ("dense", "Writes writes to its weight")
    assert rows["hidden.weight"][0] == "sparse"


class Harmless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.a.weight, Tensor) and self.a.weight.dtype != x.dtype:
            x = x.to(self.a.weight.dtype)
        if self.a.weight is None or self.b.weight.data.shape[0] != 8:
            return x
        return self.b(self.a(x.to(self.a.weight))) * len(self.b.weight)

    def reset_parameters(self) -> None:
        self.a.weight.data.normal_()

    def _init_weights(self, module: nn.Module) -> None:
        nn.init.zeros_(self.b.weight)


def test_looking_at_dtype_and_shape_is_no_read() -> None:
    reads = weights_read(Harmless(), Harmless)
    assert not reads.read, reads
    assert not reads.written, reads
    model = nmfx.sparsify(Harmless(), "2:4")
    assert type(model) is Harmless


def test_reads_are_found_by_path() -> None:
    for cls, read in [
        (Never, {"key.weight"}),
        (Both, {"proj.weight"}),
        (Listed, {f"layers.{i}.weight" for i in range(3)}),
        (Deep, {"inner.proj.weight"}),
        (OtherMethod, {"coefs.weight"}),
    ]:
        assert weights_read(cls(), cls).read == read, cls
    assert weights_read(Never(), Never).only_read == {"key.weight"}
    assert not weights_read(Both(), Both).only_read


def test_code_without_source_is_taken_to_read_what_it_names() -> None:
    space: dict[str, object] = {}
    exec("def forward(self, x): return x @ self.key.weight", space)
    cls = type("NoSource", (Never,), {"forward": space["forward"]})
    dense, x = build(cls)
    assert weights_read(dense, cls).read >= {"key.weight"}
    model = nmfx.sparsify(copy.deepcopy(dense), {"key": "2:4"})
    assert base_class(model) is cls
    kept = nm_mask(dense.key.weight, 2, 4, 1)
    assert torch.equal(model(x), x @ torch.where(kept, dense.key.weight, 0.0))


def penalty(module: nn.Linear) -> Tensor:
    return module.weight.sum()


class Hidden(Never):
    """What the source of its class does not show."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.key(x)) + penalty(self.key)


def test_a_read_that_no_source_shows_is_named_by_verify_and_refused_by_lower() -> None:
    dense, x = build(Hidden)
    model = sparse(dense)
    assert set(nmfx.verify(model, x)) == {"key.weight"}
    with pytest.raises(nmfx.NMError, match=r"nmfx\.verify\(model, \.\.\.\) on the sparsified"):
        nmfx.lower(model, (x,), tune=False)
    nmfx.lower(nmfx.sparsify(build(Hidden)[0], {"head": "2:4"}), (x,), tune=False)
