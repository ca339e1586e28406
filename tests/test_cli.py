"""The commands `report`, `check`, `convert`, `bench` and `doctor` of `python -m nmfx`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_timer import PACKED_WINS, install
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo import build, call

import nmfx
from nmfx.__main__ import main


class Net(nn.Module):
    """What language models call their layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(32, 16)
        self.proj, self.norm, self.odd = nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 6)
        self.small = nn.Linear(6, 16)
        self.lm_head = nn.Linear(16, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.small(self.odd(self.norm(self.proj(self.embed_tokens(x))))))


def run(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    """What a command prints; on stderr if it is refused."""
    try:
        main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert code == status, (out, err)
    if status == 2:
        assert err.count("\n") == 1
        assert not out
        return err
    assert not err
    return out


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(Net().state_dict(), path)
    return path


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(nmfx.fold(nmfx.sparsify(Net(), {"proj": "2:4", "odd": "1:8"})).state_dict(), path)
    return path


# --- report -------------------------------------------------------------------------------------


def test_report_of_a_file_of_others(sparse: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in json.loads(run(capsys, "report", sparse, "--json"))}
    assert rows["proj.weight"]["pattern"] == "2:4"
    assert rows["odd.weight"]["pattern"] == "1:8"
    assert rows["small.weight"]["pattern"] is None
    assert rows["proj.weight"]["density"] == 0.5
    assert rows["odd.weight"]["packed_bytes"] < rows["odd.weight"]["bytes"]
    text = run(capsys, "report", sparse)
    assert "proj.weight" in text
    assert "2 of 5 weights satisfy" in text


@pytest.mark.parametrize("state", ["sparse", "frozen", "folded", "packed"])
def test_report_of_our_own_files(
    state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nmfx.sparsify(Net(), {"proj": "2:4", "odd": "1:8"})
    if state == "frozen":
        nmfx.freeze(model)
    if state == "folded":
        model = nmfx.fold(model)
    if state == "packed":
        model = nmfx.lower(model, tune=False)
    nmfx.save(model, tmp_path, max_shard_size="1KB")
    rows = {row["name"]: row for row in json.loads(run(capsys, "report", tmp_path, "--json"))}
    assert rows["proj.weight"]["state"] == state
    assert rows["proj.weight"]["pattern"] == rows["proj.weight"]["trained_as"] == "2:4"
    assert rows["odd.weight"]["pattern"] == "1:8"
    # A trained weight is not N:M yet: its pruned values are still there.
    trained = state in ("sparse", "frozen")
    assert rows["proj.weight"]["density"] == (1.0 if trained else 0.5)
    packed = sum(t.nbytes for n, t in model.state_dict().items() if n.startswith("proj.weight"))
    assert rows["proj.weight"]["bytes"] == packed
    assert rows["proj.weight"]["satisfied"] == (not trained)
    text = run(capsys, "report", tmp_path)
    (line,) = (line for line in text.splitlines() if line.startswith("proj.weight"))
    assert line.split()[3:6] == [state, "2:4", "100.0%" if trained else "50.0%"]
    assert f"{0 if trained else 2} of 5 weights satisfy an N:M pattern" in text
    assert ("2 are of a model in training" in text) == trained


def test_report_of_a_tied_weight_that_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Net()
    model.lm_head.weight = model.embed_tokens.weight
    nmfx.save(nmfx.sparsify(model, {"lm_head": "2:4"}, tied=True), tmp_path)
    rows = {row["name"]: row for row in json.loads(run(capsys, "report", tmp_path, "--json"))}
    (row,) = (row for row in rows.values() if row["state"] == "sparse")
    assert row["name"] in ("lm_head.weight", "embed_tokens.weight")
    assert row["pattern"] == "2:4"


# --- check --------------------------------------------------------------------------------------


def test_check_says_where_a_pattern_is_broken(
    sparse: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "satisfy 2:4" in run(capsys, "check", sparse, "--pattern", "2:4", "--only", "proj")
    text = run(capsys, "check", sparse, "--pattern", "2:4")  # 1:8 satisfies it too
    assert "skipped  small.weight: its 6 inputs are no multiple of 4" in text
    assert "skipped  embed_tokens.weight: an embedding, by its name" in text
    content = load_file(sparse)
    content["proj.weight"][3, 8:11] = 1.0
    content["proj.weight"][3, 11] = 0.0
    save_file(content, sparse)
    text = run(capsys, "check", sparse, "--pattern", "2:4", "--only", "proj", status=1)
    assert "proj.weight: [3, 8:12] holds 3 nonzeros, 2:4 allows 2; groups like it: 1 of 96" in text
    found = json.loads(
        run(capsys, "check", sparse, "--pattern", "2:4", "--only", "proj", "--json", status=1)
    )
    assert not found["ok"]


@pytest.mark.parametrize("state", ["sparse", "frozen"])
def test_check_of_a_model_in_training_says_fold_first(
    state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nmfx.sparsify(Net(), {"proj": "2:4"})
    if state == "frozen":
        nmfx.freeze(model)
    nmfx.save(model, tmp_path)
    command = ("check", tmp_path, "--pattern", "2:4", "--only", "proj")
    text = run(capsys, *command, status=1)
    assert f"proj.weight: unmasked, of a model in training ({state}, 2:4): [0, 0:4] holds 4" in text
    assert "fold first: nmfx.save(nmfx.fold(model), path)" in text
    assert "fold first" in json.loads(run(capsys, *command, "--json", status=1))["advice"]
    nmfx.save(nmfx.fold(model), tmp_path)
    assert "fold" not in run(capsys, *command)
    assert json.loads(run(capsys, *command, "--json"))["advice"] is None


class Small(nn.Module):
    """Layers of which `sparsify` leaves two dense, and no name tells that."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 6), nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


def test_check_skips_what_the_file_says_is_dense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    command = ("check", path, "--pattern", "2:4")
    model = nmfx.sparsify(Small(), "2:4")
    nmfx.save(nmfx.lower(model, tune=False), path)
    text = run(capsys, *command)
    assert "skipped  c.weight: the output layer stays dense by default; name it in a rule" in text
    nmfx.save(nmfx.fold(model), path)
    text = run(capsys, *command)
    dense = "it was dense when nmfx wrote the file; --only checks it all the same"
    assert f"skipped  c.weight: {dense}" in text
    assert "skipped  b.weight: its 6 inputs are no multiple of 4" in text
    assert "1 weights satisfy 2:4 (keep 2 of every 4); skipped: 2" in text
    assert "broken   c.weight: [0, 0:4]" in run(capsys, *command, "--only", "c", status=1)
    # Nothing is known from a file of others, or of a model without any N:M layer.
    save_file(nmfx.fold(model).state_dict(), path)
    assert "broken   c.weight" in run(capsys, *command, status=1)
    nmfx.save(Small(), path)
    assert "broken   a.weight" in run(capsys, *command, status=1)


def test_check_of_convolutions_and_transposed_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    conv = torch.zeros(4, 8, 3, 3)
    conv[2, 4:7, 1, 2] = 1.0
    save_file({"c.weight": conv, "t.weight": torch.eye(8)[:, :3].contiguous() + 0.0}, path)
    text = run(capsys, "check", path, "--pattern", "2:4", "--only", "c", status=1)
    assert "c.weight: [2, 4:8, 1, 2] holds 3" in text
    only = ("--only", "t", "--transposed", "t")
    assert "satisfy 1:8" in run(capsys, "check", path, "--pattern", "1:8", *only)
    content = load_file(path)
    content["t.weight"][:3, 1] = 1.0
    save_file(content, path)
    text = run(capsys, "check", path, "--pattern", "2:4", *only, status=1)
    assert "t.weight: [0:4, 1] holds 3" in text


def test_check_of_a_packed_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nmfx.lower(nmfx.sparsify(Net(), {"proj": "1:4"}), tune=False)
    nmfx.save(model, tmp_path)
    only = ("--only", "proj")
    assert "satisfy 2:4" in run(capsys, "check", tmp_path, "--pattern", "2:4", *only)
    assert "do not all satisfy" in run(
        capsys, "check", tmp_path, "--pattern", "1:8", *only, status=1
    )


def test_dtypes_without_an_order_are_listed_and_not_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.ones(4, 8, dtype=torch.int8), "b.weight": torch.zeros(4, 8)}, path)
    assert "skipped  a.weight: torch.int8" in run(capsys, "check", path, "--pattern", "2:4")
    rows = {row["name"]: row for row in json.loads(run(capsys, "report", path, "--json"))}
    assert rows["a.weight"]["density"] is None
    assert "a.weight" in run(capsys, "report", path)


def test_nothing_checked_is_not_a_success(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "check", dense, "--pattern", "2:4", "--only", "small", status=1)
    assert "0 weights" in text


# --- convert ------------------------------------------------------------------------------------


def test_convert_prunes_by_magnitude(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    text = run(capsys, "convert", dense, out, "--pattern", "2:4", "--one-shot", "magnitude")
    assert "2 of 5 weights satisfy" in text
    assert "pruned to 2:4" in text
    before, after = load_file(dense), load_file(out)
    assert list(before) == list(after)
    for name in before:
        want = before[name]
        if name in ("proj.weight", "odd.weight"):
            want = torch.where(nmfx.nm_mask(want, "2:4"), want, 0.0)
        assert torch.equal(after[name], want), name
    model = nmfx.load(out, into=Net())
    assert "packed" in {row.state for row in nmfx.report(nmfx.lower(model, tune=False))}
    run(capsys, "check", out, "--pattern", "2:4")


def test_convert_without_pruning_only_takes_what_satisfies_the_pattern(
    sparse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    error = run(capsys, "convert", sparse, out, "--pattern", "1:4", status=2)
    assert "proj.weight" in error
    assert "--one-shot" in error
    assert not out.exists()
    text = run(capsys, "convert", sparse, out, "--pattern", "2:4")
    assert "2:4 already" in text
    assert torch.equal(load_file(out)["proj.weight"], load_file(sparse)["proj.weight"])


def test_convert_of_a_folder_of_hugging_face(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    model, inputs = build("hf_llama")
    source, target = tmp_path / "in", tmp_path / "out"
    model.save_pretrained(source, max_shard_size="20KB")
    shards = len(list(source.glob("*.safetensors")))
    assert shards > 2
    capsys.readouterr()  # its progress bar
    run(capsys, "convert", source, target, "--pattern", "2:4", "--one-shot", "magnitude")
    assert len(list(target.glob("*.safetensors"))) == shards
    theirs = AutoModelForCausalLM.from_pretrained(target).eval()
    want = nmfx.fold(nmfx.sparsify(model, "2:4"))
    for name, tensor in want.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name
    assert torch.equal(call(theirs, inputs).logits, call(want, inputs).logits)
    ours = nmfx.load(target, into=build("hf_llama")[0])
    assert torch.equal(call(ours, inputs).logits, call(want, inputs).logits)


def test_convert_refuses_what_it_cannot_do(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = ("--pattern", "2:4", "--one-shot", "magnitude")
    packed = tmp_path / "packed"
    packed.mkdir()
    nmfx.save(nmfx.lower(nmfx.sparsify(Net(), {"proj": "1:4"}), tune=False), packed)
    assert "packed" in run(capsys, "convert", packed, tmp_path / "o", *pattern, status=2)
    assert "no weight" in run(
        capsys, "convert", dense, tmp_path / "o", "--pattern", "64:64", status=2
    )
    assert "--only nothing" in run(
        capsys, "convert", dense, tmp_path / "o", *pattern, "--only", "nothing", status=2
    )
    assert "no such folder" in run(
        capsys, "convert", dense, tmp_path / "a" / "b.safetensors", *pattern, status=2
    )
    assert "name a file" in run(capsys, "convert", dense, tmp_path / "m.bin", *pattern, status=2)
    before = dense.read_bytes()
    for target in (dense, dense.parent):
        error = run(capsys, "convert", dense, target, *pattern, status=2)
        assert "write somewhere else" in error
    assert dense.read_bytes() == before
    assert not (tmp_path / "o").exists()


# --- errors -------------------------------------------------------------------------------------


def test_errors_are_one_line(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone.safetensors"
    assert "no such file" in run(capsys, "report", gone, status=2)
    assert "2:5:6" in run(capsys, "check", dense, "--pattern", "2:5:6", status=2)
    assert "--only q" in run(capsys, "report", dense, "--only", "q", status=2)
    assert "required" in run(capsys, "check", dense, status=2)
    dense.write_bytes(dense.read_bytes()[:-3])
    assert "not a whole safetensors file" in run(capsys, "report", dense, status=2)
    assert "at least 1" in run(capsys, "bench", "--rows", 0, status=2)
    assert "--out" in run(capsys, "bench", "--out", gone / "x.png", status=2)
    assert "--out" in run(capsys, "bench", "--out", tmp_path / "x.xyz", status=2)
    assert "--device abacus" in run(capsys, "bench", "--device", "abacus", status=2)
    assert "no such file or folder" in run(capsys, "report", tmp_path / "nowhere", status=2)


def test_output_into_a_pipe_is_plain_and_may_be_cut(dense: Path) -> None:
    command = [sys.executable, "-m", "nmfx", "report", str(dense)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert "\x1b" not in done.stdout
    assert "parameter" in done.stdout
    assert not done.stderr
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # type: ignore[union-attr]
        assert b"Traceback" not in process.stderr.read()  # type: ignore[union-attr]


# --- bench and doctor ---------------------------------------------------------------------------


def test_bench_prints_a_table_and_draws_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, PACKED_WINS)
    out = tmp_path / "bench.png"
    arguments = ("bench", "--quick", "--rows", 1, 4, "--out", out, "--pattern", "2:4")
    text = run(capsys, *arguments)
    assert "3072 x 768" in text
    assert "3.00x" in text
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert f"picture: {out}" in text
    assert text.index("linear layers in float32 on") < text.index("measuring 3072 x 768 (0 of 4")
    assert text.index("measuring 1024 x 1024 (2 of 4 done)") < text.index("fastest ms")
    found = json.loads(run(capsys, *arguments, "--json"))
    assert [one["rows"] for one in found["layers"]] == [1, 4, 1, 4]
    assert {one["ratio"] for one in found["layers"]} == {3.0}


def test_bench_without_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, PACKED_WINS)
    monkeypatch.chdir(tmp_path)
    arguments = ("bench", "--quick", "--rows", 1, "--pattern", "2:4")
    text = run(capsys, *arguments, "--no-plot")
    assert "3.00x" in text
    assert "picture" not in text
    assert not list(tmp_path.iterdir())
    assert f"picture: {tmp_path / 'nmfx_bench.png'}" in run(capsys, *arguments)
    assert "--no-plot" in run(capsys, *arguments, "--no-plot", "--out", "x.png", status=2)


def test_bench_tells_at_once_what_it_does(tmp_path: Path) -> None:
    """Into a file nothing is held back until all is measured: it takes minutes."""
    code = (
        "import nmfx.cli.bench as bench, os\n"
        "bench._time = lambda *one: os._exit(7)\n"
        "from nmfx.__main__ import main\n"
        "main(['bench', '--no-plot'])\n"
    )
    with open(tmp_path / "log", "w") as log:
        done = subprocess.run([sys.executable, "-c", code], stdout=log, stderr=log, timeout=300)
    assert done.returncode == 7
    assert "measuring 4096 x 4096 (0 of 45 done)" in (tmp_path / "log").read_text()


def test_doctor_says_what_is_fast_and_what_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: dict[str, Any] = json.loads(run(capsys, "doctor", "--json"))
    assert found["facts"]["nmfx"] == nmfx.__version__
    assert all({"what", "fast", "why"} == one.keys() for one in found["verdicts"])
    text = run(capsys, "doctor")
    assert "processor" in text
    assert "training, eager, on CPU" in text
    from nmfx.kernels import cpu

    monkeypatch.setattr(cpu, "_library", None)
    monkeypatch.setattr(cpu, "_missing", "the moon is full")
    assert "SLOW" in run(capsys, "doctor")
    assert "the moon is full" in run(capsys, "doctor")
