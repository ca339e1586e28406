"""One linear layer on a GPU: semi-structured and packed weights against the best dense.

    python benchmarks/bench_gpu_linear.py

All of a table is interleaved in one process, each call from cold caches, GPU time by events.
"dense" is the faster of eager F.linear and torch.compile (max-autotune); "torch's 2:4" is
`to_sparse_semi_structured` used as the tutorial does; "semi-structured" and "packed" are the two
forms that `nmfx.lower` chooses from. Ratios are dense over the form: more than 1 is faster. An
empty cell says in "why" what refused or differed from dense.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import records
import torch
import torch.nn.functional as F
from gpu_timing import gpu, interleave
from harness import header, write_result
from torch import Tensor

from nmfx.calls import TOLERANCE, relative_error
from nmfx.kernels import semi_structured as semi
from nmfx.mask import nm_project
from nmfx.ops.linear_nm import linear_nm
from nmfx.ops.linear_semi_structured import linear_semi_structured
from nmfx.packing import pack

Call = Callable[[Tensor], Tensor]
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (1024, 1024))
PATTERNS = ("2:4", "1:4", "1:16")
ROWS = (1, 8, 16, 64, 512, 2048, 8192)
FORMS = ("torch's 2:4", "semi-structured", "packed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many, from the first")
    parser.add_argument("--no-compile", action="store_true", help="dense is eager alone")
    args = parser.parse_args()
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor")
    lines = [header("One linear layer on a GPU", gpu()), __doc__.split("\n\n", 2)[2]]
    for shape in SHAPES[: args.shapes]:
        for pattern in PATTERNS:
            lines += [
                f"## {shape[0]} x {shape[1]}, bfloat16, {pattern}",
                cell(args, shape, pattern),
            ]
            print("\n".join(lines[-2:]), flush=True)
    print(write_result("gpu_linear", "\n\n".join(lines) + "\n", gpu()))


@torch.no_grad()
def cell(args: argparse.Namespace, shape: tuple[int, int], pattern: str) -> str:
    """A line for each number of rows."""
    n, m = map(int, pattern.split(":"))
    weight = nm_project(torch.randn(shape, device="cuda").bfloat16(), pattern, 1)
    found = []
    for rows in args.rows:
        torch.compiler.reset()
        x = torch.randn(rows, shape[1], device="cuda").bfloat16()
        calls, why = forms(weight, n, m, compile=not args.no_compile), []
        expected = calls["eager"](x)
        for name, call in list(calls.items()):
            try:
                error = relative_error(expected, call(x))
            except RuntimeError as refused:
                why.append(f"{name}: {str(refused).splitlines()[0]}")
                del calls[name]
                continue
            if error > TOLERANCE[torch.bfloat16]:
                why.append(f"{name}: differs by {error:.0e}")
                del calls[name]
        times = interleave({k: (lambda c=c, x=x: c(x)) for k, c in calls.items()}, args.rounds)
        dense = min(times[k].median for k in ("eager", "compiled") if k in times)
        ratios = [f"{dense / times[k].median:.2f}" if k in times else "" for k in FORMS]
        found.append([str(rows), f"{dense * 1e3:.1f}", *ratios, "; ".join(why)])
    return records.table(["rows", "dense us", *FORMS, "why"], found)


def forms(weight: Tensor, n: int, m: int, compile: bool) -> dict[str, Call]:
    """All ways to multiply by the weight; those that cannot be made are left out."""
    out, into = weight.shape
    values, index = pack(weight, (n, m))
    calls: dict[str, Call] = {
        "eager": lambda x: F.linear(x, weight),
        "packed": lambda x: linear_nm(x, values, index, None, out, into, n, m),
    }
    if compile:
        calls["compiled"] = torch.compile(calls["eager"], mode="max-autotune-no-cudagraphs")
    backend = semi.backend_of(weight.device)
    if not isinstance(backend, str):
        tensors = semi.compress(weight, backend)
        calls["semi-structured"] = lambda x: linear_semi_structured(
            x, *tensors, None, out, into, weight.dtype
        )
        tutorial = torch.sparse.to_sparse_semi_structured(weight)
        calls["torch's 2:4"] = lambda x: F.linear(x, tutorial)
    return calls


if __name__ == "__main__":
    main()
