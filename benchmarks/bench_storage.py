"""nmfx.save and nmfx.load beside torch and safetensors alone, on a BERT-base with random weights.

    python benchmarks/bench_storage.py

Medians of interleaved rounds, files in the system's cache. nmfx computes a SHA-256 of every tensor,
syncs the file to the disk before it takes the place of the old one, and checks all of it on
loading; torch.save and safetensors do none of that.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import records
import torch
from harness import header, write_result
from safetensors.torch import load_file, save_file
from timing import interleave
from train_models import CPU_MODELS

import nmfx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run?")
    args = parser.parse_args()
    torch.manual_seed(0)
    sparse = nmfx.sparsify(CPU_MODELS["bert-base"](args.quick)[0], "2:4")
    folded = nmfx.fold(sparse)
    lowered = nmfx.lower(sparse, tune=False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        plain = {k: v.clone() for k, v in folded.state_dict().items()}
        files = {
            name: place / f"{i}{'.pt' if name == 'torch' else '.safetensors'}"
            for i, name in enumerate(
                ("safetensors", "torch", "nmfx, trained", "nmfx, folded", "nmfx, packed")
            )
        }
        saves: dict[str, Callable[[], object]] = {
            "safetensors": lambda: save_file(plain, files["safetensors"]),
            "torch": lambda: torch.save(plain, files["torch"]),
            "nmfx, trained": lambda: nmfx.save(sparse, files["nmfx, trained"]),
            "nmfx, folded": lambda: nmfx.save(folded, files["nmfx, folded"]),
            "nmfx, packed": lambda: nmfx.save(lowered, files["nmfx, packed"]),
        }
        saved = interleave(saves, args.rounds, 0.0)
        models = {name: CPU_MODELS["bert-base"](args.quick)[0] for name in files}
        for name in ("nmfx, trained", "nmfx, packed"):
            nmfx.load(files[name], into=models[name])  # from now on into its like
        loads: dict[str, Callable[[], object]] = {
            "safetensors": lambda: models["safetensors"].load_state_dict(
                load_file(files["safetensors"])
            ),
            "torch": lambda: models["torch"].load_state_dict(
                torch.load(files["torch"], weights_only=True)
            ),
        }
        for name in ("nmfx, trained", "nmfx, folded", "nmfx, packed"):
            loads[name] = lambda name=name: nmfx.load(files[name], into=models[name])
        loaded = interleave(loads, args.rounds, 0.0)
        tensors = {"nmfx, packed": lowered.state_dict()}
        for name, path in files.items():
            held = sum(t.nbytes for t in tensors.get(name, plain).values())
            rows.append(
                [
                    name,
                    f"{saved[name].median:.0f}",
                    f"{loaded[name].median:.0f}",
                    f"{path.stat().st_size / 1e6:.1f}",
                    f"{path.stat().st_size / held:.4f}",
                ]
            )
    head = ["file", "save ms", "load ms", "MB", "bytes of the file / of its tensors"]
    lines = [header("Files"), __doc__.split("\n\n", 2)[2], records.table(head, rows)]
    print("\n\n".join(lines[2:]))
    if not args.quick:
        print(write_result("storage", "\n\n".join(lines) + "\n"))


if __name__ == "__main__":
    main()
