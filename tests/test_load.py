"""Loading packed weights: what is damaged is refused, before anything is copied."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from test_graph_module import ALL, Functional, X, exported, traced
from torch import Tensor, nn

import nmfx

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")


class Inside(nn.Module):
    """A graph within a model, with a weight that the graph reads from a module below it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = traced(Functional())
        self.body.sub = nn.Module()
        self.body.sub.w = self.body.w
        del self.body.w
        for node in self.body.graph.nodes:
            if node.op == "get_attr" and node.target == "w":
                node.target = "sub.w"
        self.body.recompile()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "leaf": lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
    "traced": lambda: traced(Functional()),
    "exported": lambda: exported(Functional()),
    "inside": Inside,
}
NAMES = {
    "leaf": ["1.weight"],
    "traced": ["w", "kernel", "mixed", "fc.weight"],
    "exported": ["w", "kernel", "mixed", "fc.weight"],
    "inside": ["body.sub.w", "body.kernel", "body.mixed", "body.fc.weight"],
}
CASES = [(maker, name) for maker, names in NAMES.items() for name in names]
COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda model: model,
    "copied": copy.deepcopy,
    "copied twice": lambda model: copy.deepcopy(copy.deepcopy(model)),
}


RULES = {"leaf": {"?": "2:4"}, "inside": {"body": "2:4", "body.*": "2:4"}}


def lowered(maker: str) -> nn.Module:
    return nmfx.lower(nmfx.sparsify(MAKERS[maker](), RULES.get(maker, ALL)), tune=False)


@pytest.mark.parametrize("how", list(COPIES))
@pytest.mark.parametrize(("maker", "name"), CASES)
def test_a_damaged_index_is_refused(maker: str, name: str, how: str) -> None:
    model = COPIES[how](lowered(maker))
    before = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(before)
    state[f"{name}_values"].fill_(7.0)
    state[f"{name}_index"].fill_(0)  # one column for both elements of a group
    with pytest.raises(nmfx.NMError) as caught:
        model.load_state_dict(state)
    assert str(caught.value).startswith(f"{name}: "), caught.value
    assert str(caught.value).endswith("; the file is damaged"), caught.value
    for key in (f"{name}_values", f"{name}_index"):
        assert torch.equal(model.state_dict()[key], before[key]), f"{key} was copied"


@pytest.mark.parametrize("maker", list(MAKERS))
def test_whole_packed_weights_load(maker: str) -> None:
    model = lowered(maker)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    assert not other.load_state_dict(model.state_dict()).missing_keys
    assert torch.equal(other(X), model(X))


def test_another_size_is_told_by_torch() -> None:
    model = lowered("traced")
    state = {**model.state_dict(), "w_index": torch.zeros(9, 1, 16, dtype=torch.int32)}
    with pytest.raises(RuntimeError, match="size mismatch for w_index"):
        model.load_state_dict(state)


def test_unpickled_graphs_load() -> None:
    model = lowered("traced")
    twin = pickle.loads(pickle.dumps(model))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(X), model(X))


def test_only_packed_graphs_have_a_hook() -> None:
    graph = traced(Functional())
    for model in (nmfx.sparsify(graph, ALL), nmfx.fold(graph)):
        assert not model._load_state_dict_pre_hooks
    once = lowered("traced")
    assert len(once._load_state_dict_pre_hooks) == 1
    assert len(copy.deepcopy(once)._load_state_dict_pre_hooks) == 1
