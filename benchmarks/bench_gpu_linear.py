"""One linear layer on a GPU: semi-structured and packed weights against the best dense.

    python benchmarks/bench_gpu_linear.py

All of a table is interleaved in one process. A call is repeated over copies of its weight that do
not fit into the cache, captured in a CUDA graph, so times are those of the kernels and not of the
host that launches them: in eager mode torch's call of cuSPARSELt takes the host some 0.5 ms.
"dense" is the faster of eager F.linear and torch.compile (max-autotune, for the first shapes only:
it takes seconds for each number of rows); "torch's 2:4" is `to_sparse_semi_structured` used as the
tutorial does; "semi-structured" and "packed" are the two forms that `nmfx.lower` chooses from, the
first with cuSPARSELt's fastest algorithm. Ratios are dense over the form: more than 1 is faster.
"limit" is the ratio of the bytes that must be read and written, which bounds packed for few rows.
An empty cell says in "why" what refused or differed from dense.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import records
import torch
import torch.nn.functional as F
from gpu_timing import gpu, interleave, interleave_graphs
from harness import header, write_result
from torch import Tensor

from nmfx.calls import TOLERANCE, relative_error
from nmfx.errors import NMError
from nmfx.kernels import semi_structured as semi
from nmfx.mask import nm_project
from nmfx.ops.linear_nm import linear_nm
from nmfx.ops.linear_semi_structured import linear_semi_structured
from nmfx.packing import pack
from nmfx.tuning.algorithms import fastest_algorithm

Product = Callable[[Tensor, Tensor], Tensor]  # of an input and a dense weight
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (1024, 1024))
PATTERNS = ("2:4", "1:4", "1:16")
ROWS = (1, 4, 8, 16, 32, 64, 512, 2048, 8192)
FORMS = ("torch's 2:4", "semi-structured", "packed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many, from the first")
    parser.add_argument("--compile-s", type=float, default=60, help="seconds for torch.compile")
    args = parser.parse_args()
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor")
    lines = [header("One linear layer on a GPU", gpu()), __doc__.split("\n\n", 2)[2], ceilings()]
    compiled: dict[tuple[int, ...], Product] = {}
    for shape in SHAPES[: args.shapes]:
        for pattern in PATTERNS:
            lines += [
                f"## {shape[0]} x {shape[1]}, bfloat16, {pattern}",
                cell(args, shape, pattern, compiled),
            ]
            print("\n".join(lines[-2:]), flush=True)
            text = "\n\n".join(lines) + "\n"
            write_result("gpu_linear", text, gpu())
            if os.environ.get("OUT"):  # where a lent machine hands files back from
                (Path(os.environ["OUT"]) / "gpu_linear.md").write_text(text, encoding="utf-8")


def ceilings() -> str:
    """What the card reads and multiplies at best, in the same run."""
    source = torch.empty(1 << 31, dtype=torch.int8, device="cuda")
    target, a = torch.empty_like(source), torch.randn(8192, 8192, device="cuda").bfloat16()
    times = interleave({"copy": lambda: target.copy_(source), "matmul": lambda: a @ a}, 7)
    moved = 2 * source.nbytes / times["copy"].median / 1e9
    return (
        f"Measured here: {moved:.2f} TB/s read and written (a copy of 2 GiB), "
        f"{2 * 8192**3 / times['matmul'].median / 1e9:.0f} TFLOP/s (8192 x 8192 x 8192, bfloat16)."
    )


@torch.no_grad()
def cell(
    args: argparse.Namespace,
    shape: tuple[int, int],
    pattern: str,
    compiled: dict[tuple[int, ...], Product],
) -> str:
    """A line for each number of rows."""
    n, m = map(int, pattern.split(":"))
    weight = nm_project(torch.randn(shape, device="cuda").bfloat16(), pattern, 1)
    packed = pack(weight, (n, m))
    found = []
    for rows in args.rows:
        x = torch.randn(rows, shape[1], device="cuda").bfloat16()
        expected, why = F.linear(x, weight), []
        calls = forms(weight, packed, x, n, m)
        dense = compile_dense(args, x, weight, compiled)
        if dense is not None:
            calls["compiled"] = copies(weight, lambda w, x=x, f=dense: lambda: f(x, w))
        for name, (call, *_) in list(calls.items()):
            try:
                error = relative_error(expected, call())
            except (RuntimeError, NMError) as refused:
                why.append(f"{name}: {str(refused).splitlines()[0]}")
                del calls[name]
                continue
            if error > TOLERANCE[torch.bfloat16]:
                why.append(f"{name}: differs by {error:.0e}")
                del calls[name]
        times = interleave_graphs(calls, args.rounds)
        best = min(times[k].median for k in ("eager", "compiled") if k in times)
        ratios = [f"{best / times[k].median:.2f}" if k in times else "" for k in FORMS]
        moved = 2 * (x.numel() + expected.numel())
        limit = (weight.nbytes + moved) / (sum(t.nbytes for t in packed) + moved)
        both = "both" if "compiled" in times else "eager"
        line = [str(rows), f"{best * 1e3:.1f}", both, *ratios, f"{limit:.2f}", "; ".join(why)]
        found.append(line)
    return records.table(["rows", "dense us", "of", *FORMS, "limit", "why"], found)


_spent = 0.0


def compile_dense(
    args: argparse.Namespace, x: Tensor, weight: Tensor, compiled: dict[tuple[int, ...], Product]
) -> Product | None:
    """torch.compile's product of these shapes, within a budget of seconds."""
    global _spent
    key = (*x.shape, len(weight))
    if key not in compiled and _spent < args.compile_s:
        begun = time.perf_counter()
        torch.compiler.reset()
        function = torch.compile(F.linear, mode="max-autotune-no-cudagraphs", dynamic=False)
        function(x, weight)
        compiled[key] = function
        _spent += time.perf_counter() - begun
    return compiled.get(key)


Calls = list[Callable[[], Tensor]]
_CACHED = 150e6  # bytes: more than twice the L2 of an H200


def copies(weight: Tensor, make: Callable[[Tensor], Callable[[], Tensor]]) -> Calls:
    """The same call on so many copies of a weight that the cache does not hold them."""
    count = max(2, min(24, int(_CACHED / weight.nbytes)))
    return [make(weight.clone()) for _ in range(count)]


def forms(
    weight: Tensor, packed: tuple[Tensor, Tensor], x: Tensor, n: int, m: int
) -> dict[str, Calls]:
    """All ways to multiply by the weight; those that cannot be made are left out."""
    out, into = weight.shape
    values, index = packed
    calls: dict[str, Calls] = {
        "eager": copies(weight, lambda w: lambda: F.linear(x, w)),
        "packed": copies(
            values,
            lambda v: functools.partial(linear_nm, x, v, index.clone(), None, out, into, n, m),
        ),
    }
    backend = semi.backend_of(weight.device)
    if not isinstance(backend, str):
        compressed, meta = semi.compress(weight, backend)
        dense = F.linear(x, weight)
        number = fastest_algorithm(x, compressed, meta, None, dense)
        chosen = () if number is None else (1, number)
        calls["semi-structured"] = copies(
            compressed,
            lambda c: (
                lambda: linear_semi_structured(x, c, meta, None, out, into, weight.dtype, chosen)
            ),
        )
        tutorial = torch.sparse.to_sparse_semi_structured(weight)
        calls["torch's 2:4"] = [lambda: F.linear(x, tutorial)] * 2
    return calls


if __name__ == "__main__":
    main()
