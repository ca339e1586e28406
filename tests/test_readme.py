"""The README says what the code does: its snippets run and its graph is the one that is printed."""

import re
from pathlib import Path

import torch
from fake_timer import PACKED_WINS, install
from torch import fx, nn

import nmfx

TEXT = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


def code_lines(gm):
    """The generated code without the `; x = None` that fx appends and without blank lines."""
    lines = [re.sub(r";  .*", "", line).rstrip() for line in gm.code.splitlines()]
    return [line for line in lines if line.strip()]


def test_readme_first_snippet_runs(capsys, monkeypatch):
    install(monkeypatch, PACKED_WINS)
    names = {"model": Mlp(), "x": torch.randn(3, 64)}
    exec(BLOCKS[0], names)
    assert "fc1.weight" in capsys.readouterr().out, "the report does not list fc1.weight"
    assert list(names["fast"].state_dict())[:3] == [
        "fc1.bias",
        "fc1.weight_values",
        "fc1.weight_index",
    ]


def test_readme_graph_is_what_nmfx_prints():
    shown = BLOCKS[1].splitlines()
    column = shown[0].index("def forward", 5)
    before = [line[:column].rstrip() for line in shown if line[:column].strip()]
    after = [line[column:].rstrip() for line in shown if line[column:].strip()]
    model = Mlp()
    assert before == code_lines(fx.symbolic_trace(model))
    assert after == code_lines(nmfx.trace(nmfx.sparsify(model, "2:4")))


def test_readme_lists_only_verbs_that_exist():
    named = set(re.findall(r"nmfx\.([a-zA-Z_]+)\(", TEXT))
    missing = sorted(name for name in named if not hasattr(nmfx, name))
    assert not missing, f"README calls nmfx.{missing}"
    assert {"sparsify", "report", "lower", "fold", "attach"} <= named


def test_readme_never_names_the_other_distribution():
    assert not re.search(r"pip\s+install\s+nmfx\b(?!-)", TEXT)
