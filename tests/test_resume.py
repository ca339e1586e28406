"""Training that is killed and resumed ends where uninterrupted training ends, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

PROGRAM = """
import sys, time
from pathlib import Path
import torch
from torch import nn
import nmfx

torch.set_num_threads(1)
folder, steps, every, resume = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
folder.mkdir(exist_ok=True)
checkpoint = folder / "checkpoint.pt"


def make():
    layers = [nn.Linear(16, 32), nn.Dropout(0.2), nn.ReLU(), nn.Linear(32, 16)]
    return nmfx.sparsify(nn.Sequential(*layers), {"0": "3:4", "3": "2:4"}, lambda_w=1e-3)


torch.manual_seed(0)
model = make()
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
attachment = nmfx.attach(model, optimizer)
monitor = nmfx.Monitor(model, every=3)
first = 0
if resume == "yes":
    content = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(content["model"])
    nmfx.load_state_dict(model, content["nmfx"])
    optimizer.load_state_dict(content["optimizer"])
    schedule.load_state_dict(content["schedule"])
    monitor.load_state_dict(content["monitor"])
    torch.set_rng_state(content["random"])
    first = content["step"]
for step in range(first, steps):
    if step == steps // 4:
        nmfx.set_pattern(model, {"0": "2:4"})
    if step == steps // 2:
        nmfx.set_lambda(model, 5e-4)
    if step == 3 * steps // 4:
        nmfx.freeze(model)
    x = torch.randn(8, 16)
    optimizer.zero_grad()
    (model(x) - x.roll(1, 1)).square().mean().backward()
    optimizer.step()
    schedule.step()
    monitor.step()
    if (step + 1) % every == 0:
        temporary = folder / "temporary.pt"
        torch.save({
            "step": step + 1,
            "model": model.state_dict(),
            "nmfx": nmfx.state_dict(model),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "monitor": monitor.state_dict(),
            "random": torch.get_rng_state(),
        }, temporary)
        temporary.replace(checkpoint)
        (folder / "progress").write_text(str(step + 1))
        time.sleep(float(sys.argv[5]))
nmfx.save(model, folder / "final.safetensors")
torch.save({"monitor": monitor.state_dict(), "random": torch.get_rng_state(),
            "optimizer": optimizer.state_dict()}, folder / "final.pt")
"""


def start(folder: Path, *arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, str(folder), *map(str, arguments)]
    return subprocess.Popen(command)


@pytest.mark.parametrize("kill_after", [20, 60, 100])
def test_killed_and_resumed_training_is_bit_identical(kill_after: int, tmp_path: Path) -> None:
    steps, every = 120, 20
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    straight = start(whole, steps, every, "no", 0)
    first = start(broken, steps, every, "no", 0.5)
    progress = broken / "progress"
    deadline = time.monotonic() + 300
    while not progress.exists() or int(progress.read_text() or 0) < kill_after:
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert not (broken / "final.pt").exists()
    assert start(broken, steps, every, "yes", 0).wait(300) == 0
    assert straight.wait(300) == 0
    # The file names its tensors' digests and every layer's state: equal bytes say it all.
    from nmfx.storage.reading import open_model

    one, two = (open_model(folder / "final.safetensors") for folder in (whole, broken))
    assert one.spec == two.spec
    assert '"state":"frozen"' in str(one.spec)
    ends = [torch.load(folder / "final.pt", weights_only=True) for folder in (whole, broken)]
    assert torch.equal(ends[0]["random"], ends[1]["random"])
    assert ends[0]["monitor"]["history"] == ends[1]["monitor"]["history"]
    for key, state in ends[0]["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, ends[1]["optimizer"]["state"][key][name])
