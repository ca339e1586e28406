"""Which reads and writes of weights their source shows, and what stand-ins leave of them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nmfx
from nmfx.capture.readers import weights_read

X = torch.randn(3, 16)


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.named = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})

    def used(self, x: Tensor) -> Tensor:
        return self.o(x)


# --- reads -------------------------------------------------------------------------------------


class Pairs(Parent):
    reads = ("q", "k")

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q, self.k
        return self.used(x @ (q.weight + k.weight))


class Display(Parent):
    reads = ("q", "k")

    def forward(self, x: Tensor) -> Tensor:
        return self.used(F.linear(x, torch.cat([one.weight for one in (self.q, self.k)]))[:, 8:24])


class Group(Parent):
    reads = ("q", "k")

    def forward(self, x: Tensor) -> Tensor:
        pair = [self.q, self.k]
        for one in pair:
            x = F.linear(x, one.weight)
        return self.used(x @ pair[0].weight)


class Enumerated(Parent):
    reads = ("layers.0", "layers.1", "layers.2")

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = F.linear(x, layer.weight) + number
        return self.used(x)


class Zipped(Parent):
    reads = ("layers.0", "layers.1", "layers.2", "named.a", "named.b")

    def forward(self, x: Tensor) -> Tensor:
        for one, other in zip(self.layers, self.named.values(), strict=False):
            x = x @ (one.weight + other.weight)
        return self.used(x)


class Sliced(Parent):
    reads = ("layers.0", "layers.1", "layers.2")  # which ones only running tells

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers[1:]):
            x = F.linear(x, layer.weight)
        return self.used(x)


class Values(Parent):
    reads = ("named.a", "named.b")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.named.values():
            x = F.linear(x, layer.weight)
        return self.used(x)


class Items(Parent):
    reads = ("named.a", "named.b")

    def forward(self, x: Tensor) -> Tensor:
        for _, layer in self.named.items():
            x = F.linear(x, layer.weight)
        return self.used(x)


class Annotated(Parent):
    reads = ("q",)

    def forward(self, x: Tensor) -> Tensor:
        q: nn.Linear = self.q
        return self.used(x @ q.weight)


class Chosen(Parent):
    reads = ("q", "k")

    def forward(self, x: Tensor) -> Tensor:
        one = self.q if x.sum() > 0 else self.k
        return self.used(x @ one.weight)


class Itself(Parent):
    reads = ("q",)

    def forward(self, x: Tensor) -> Tensor:
        state = (x, self.q)
        state = (state[0], state[1])
        for number in (0, 1):
            x = x + number * state[0]
        return self.used(x @ self.q.weight)


class OfAttention(nn.Module):
    """The weight belongs to a child of the module that masks it."""

    reads = ("attn.out_proj",)

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.o = nn.MultiheadAttention(16, 2), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.linear(self.attn(x, x, x)[0], self.attn.out_proj.weight))


class Inner(nn.Linear):
    def __init__(self) -> None:
        super().__init__(16, 16)
        self.extra = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.extra.weight, self.bias)


class Nested(nn.Module):
    """A parent reads the weight of a layer that reads that of its own child."""

    reads = ("i",)

    def __init__(self) -> None:
        super().__init__()
        self.i, self.o = Inner(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.i(x) + F.linear(x, self.i.weight))


class Shows(nn.Module):
    """A child that shows the weight of its own child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    @property
    def circular_weight(self) -> Tensor:
        return self.circular_weight if self.training else self.weight

    @functools.cached_property
    def first_weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Scaled(nn.Linear):
    def scaled_weight(self, by: float) -> Tensor:
        return by * self.weight


class Hiding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.s, self.l, self.o = Shows(), Scaled(16, 16), nn.Linear(16, 4)


class OfProperty(Hiding):
    reads = ("s.inner",)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.l(F.linear(self.s(x), self.s.weight)))


class OfPropertyOfProperty(Hiding):
    reads = ("s.inner",)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.l(F.linear(self.s(x), self.s.circular_weight)))


class OfCachedProperty(Hiding):
    reads = ("s.inner",)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.l(self.s(x) + self.s.first_weight.sum()))


class OfMethod(Hiding):
    reads = ("l",)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.s(F.linear(self.l(x), self.l.scaled_weight(0.5))))


READERS: list[Any] = [
    Pairs, Display, Group, Enumerated, Zipped, Sliced, Values, Items, Annotated, Chosen, Itself,
    OfAttention, Nested, OfProperty, OfPropertyOfProperty, OfCachedProperty, OfMethod,
]  # fmt: skip


@pytest.mark.parametrize("cls", READERS)
def test_what_the_source_reads_is_masked(cls: Any) -> None:
    torch.manual_seed(0)
    model = nmfx.sparsify(cls().eval(), "2:4")
    assert weights_read(model, cls).read == {f"{name}.weight" for name in cls.reads}
    torch.testing.assert_close(model(X), nmfx.fold(model)(X))
    assert nmfx.verify(model, X) == {}


# --- writes ------------------------------------------------------------------------------------


def clamped_in_place(self: Any) -> None:
    self.q.weight.data.clamp_(-0.1, 0.1)


def by_an_alias(self: Any) -> None:
    w = self.q.weight
    w.clamp_(-0.1, 0.1)


def by_an_alias_of_data(self: Any) -> None:
    w = self.q.weight.data
    w /= w.norm()


def by_a_part_of_an_alias(self: Any) -> None:
    w = self.q.weight.detach()
    w[0] = 1.0


def with_out(self: Any) -> None:
    torch.clamp(self.q.weight, -0.1, 0.1, out=self.q.weight)


def with_init(self: Any) -> None:
    nn.init.ones_(self.q.weight)


WRITES = [clamped_in_place, by_an_alias, by_an_alias_of_data, by_a_part_of_an_alias, with_out]


@pytest.mark.parametrize("write", [*WRITES, with_init])
def test_a_weight_that_a_method_writes_to_stays_dense(write: Callable[[Any], None]) -> None:
    class P(Parent):
        def forward(self, x: Tensor) -> Tensor:
            return self.used(self.q(x))

        normalise = write

    model = nmfx.sparsify(P(), "2:4")
    rows = {row.fqn: (row.state, row.reason) for row in nmfx.report(model)}
    assert rows["q.weight"] == ("dense", "P writes to its weight")
    assert rows["o.weight"][0] == "sparse"


def test_what_ends_in_an_underscore_may_change_nothing() -> None:
    class P(Parent):
        def forward(self, x: Tensor) -> Tensor:
            return self.used(self.k(self.q(x)))

        def stop(self) -> None:
            self.q.weight.requires_grad_(False)
            torch.nn.utils.clip_grad_norm_(self.k.weight, 1.0)

        def weights_init(self) -> None:
            self.q.weight.data.normal_()

    model = nmfx.sparsify(P(), "2:4")
    assert {row.state for row in nmfx.report(model) if row.fqn in ("q.weight", "k.weight")} == {
        "sparse"
    }


class MaxNorm(nn.Linear):
    """EEGNet's constraint: the layer limits its own weight whenever it runs."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.1)
        return super().forward(x)


class Clamped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.05, 0.05)
        return F.linear(x, self.weight, self.bias)

    def reset(self) -> None:
        self.weight.data.zero_()


@pytest.mark.parametrize("cls", [MaxNorm, Clamped])
def test_a_layer_that_writes_to_its_own_weight_stays_dense(cls: type[nn.Linear]) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(cls(16, 16), nn.ReLU(), nn.Linear(16, 4))
    before = dense[0].weight.detach().abs().max()
    model = nmfx.sparsify(dense, {"?*": "2:4"})
    assert next(iter(nmfx.report(model))).reason == f"{cls.__name__} writes to its weight"
    model(X)
    assert model[0].weight.abs().max() < before


def test_a_write_that_no_source_shows_is_an_error_and_not_lost() -> None:
    def shrink(module: nn.Module) -> None:
        with torch.no_grad():
            next(iter(module._parameters.values())).mul_(0.5)

    class Hidden(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() != 0:  # does not trace
                shrink(self)
            return F.linear(x, self.weight, self.bias)

    model = nmfx.sparsify(nn.Sequential(Hidden(16, 16)), {"?*": "2:4"})
    before = model[0].weight.detach().clone()
    with pytest.raises(nmfx.NMError, match="weight: Hidden wrote to this weight while it ran"):
        model(X)
    assert torch.equal(model[0].weight, before)
    model(torch.zeros(3, 16))


# --- what user code sees of a child whose weight is read ------------------------------------------


class Counts(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = Counts(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            self.seen = "nan"
            raise ValueError("nan")
        return self.o(self.q(x) + F.linear(x, self.q.weight))


def test_methods_about_the_parameter_itself_see_it() -> None:
    class P(Reads):
        def ratio(self) -> Tensor:
            return self.q.weight.grad.norm() / self.q.weight.norm()

        def stop(self) -> float:
            self.q.weight.requires_grad = False
            return float(self.q.weight.norm())

    model: Any = nmfx.sparsify(P(), "2:4")
    model(X).sum().backward()
    assert model.ratio() == model.q.weight.grad.norm() / model.q.weight.norm()
    model.stop()
    assert not model.q.weight.requires_grad


def test_hooks_and_attributes_are_those_of_the_module_itself() -> None:
    model: Any = nmfx.sparsify(Reads(), "2:4")
    told = []
    model.q.register_forward_pre_hook(lambda module, args: told.append(module))
    model.q.register_forward_hook(lambda module, args, out: told.append(module))
    model.q.register_forward_hook(
        lambda module, args, kwargs, out: told.append(module), with_kwargs=True
    )
    model.q.register_full_backward_hook(lambda module, into, out: told.append(module))
    model(X.clone().requires_grad_()).sum().backward()
    assert len(told) == 4
    assert all(module is model.q for module in told)
    model(X)
    assert model.q.calls == 2


def test_an_attribute_that_was_set_before_an_error_is_kept() -> None:
    model: Any = nmfx.sparsify(Reads(), "2:4")
    with pytest.raises(ValueError, match="nan"):
        model(X * float("nan"))
    assert model.seen == "nan"


class Starts(nn.Linear):
    def init_weights(self, value: float) -> None:
        nn.init.constant_(self.weight, value)


class Prepares(nn.Module):
    """A parent that has a child set its own weight, outside of any forward."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.o = Starts(16, 16), nn.Linear(16, 4)

    def prepare(self, value: float) -> None:
        self.l.init_weights(value)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.l(x))


def test_methods_that_set_a_weight_are_no_reads_of_it() -> None:
    model = nmfx.sparsify(Prepares(), "2:4")
    model.prepare(3.0)
    assert (model.l.weight == 3.0).all()
    assert weights_read(model, Prepares).read == set()


class Keeps(Parent):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.q.weight
        return self.used(x @ self.last)


def test_a_weight_that_a_forward_keeps_is_the_real_one() -> None:
    model = nmfx.sparsify(Keeps(), "2:4")
    names = list(model.state_dict())
    model(X).sum().backward()
    assert model.last is model.q.weight
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))


def test_what_a_cached_property_keeps_is_made_of_todays_mask() -> None:
    model = nmfx.sparsify(OfCachedProperty(), "2:4")
    for _ in range(2):
        torch.testing.assert_close(model(X), nmfx.fold(model)(X))
        with torch.no_grad():
            model.s.inner.weight.mul_(-2).add_(0.1)
