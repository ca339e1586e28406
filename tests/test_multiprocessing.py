"""Models that travel to another process through torch.multiprocessing."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, fx, nn

import nmfx


class Net(nn.Module):
    """One layer of each kind of capture."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.rnn = nn.GRU(16, 16, batch_first=True)
        self.read = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc(x))
        x = x + self.attention(x, x, x)[0] @ self.read.weight
        return self.head(self.rnn(self.read(x))[0])


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    sparse = nmfx.sparsify(Net().eval(), "2:4", lambda_w=0.25)
    frozen = copy.deepcopy(sparse)
    nmfx.freeze(frozen)
    mlp = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    return {
        "sparse": sparse,
        "frozen": frozen,
        "folded": nmfx.fold(sparse),
        "lowered": nmfx.lower(sparse, tune=False),
        "graph": nmfx.sparsify(fx.symbolic_trace(mlp), "2:4"),
    }


def work(given: dict[str, nn.Module], x: Tensor, parent: Any) -> None:
    """Runs in the other process: outputs, reports, and one step on the shared weights."""
    found = {}
    with torch.no_grad():
        for name, model in given.items():
            found[name] = (model(x).numpy(), [row.state for row in nmfx.report(model)])
        given["sparse"].fc.weight.neg_()
    parent.send(found)


def test_models_run_in_a_spawned_process_and_share_their_weights() -> None:
    x = torch.randn(2, 3, 16)
    given = models()
    wanted = {
        name: (model(x).detach(), [row.state for row in nmfx.report(model)])
        for name, model in given.items()
    }
    before = given["sparse"].fc.weight.detach().clone()
    for model in given.values():
        model.share_memory()
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()  # no semaphore that a process could leave locked
    process = context.Process(target=work, args=(given, x, theirs), daemon=True)
    process.start()
    theirs.close()
    assert ours.poll(120), "the other process did not answer"
    found = ours.recv()
    process.join(60)
    assert process.exitcode == 0
    for name, (output, states) in wanted.items():
        torch.testing.assert_close(torch.from_numpy(found[name][0]), output, msg=name)
        assert found[name][1] == states, name
    assert torch.equal(given["sparse"].fc.weight, -before), "the weights are not shared"
    # Magnitudes decide, so the mask of the negated weight is the one it was.
    assert not torch.equal(given["sparse"](x), wanted["sparse"][0])
