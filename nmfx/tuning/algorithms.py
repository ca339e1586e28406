"""Which algorithm of cuSPARSELt is fastest for a product; `timer` then compares it with dense."""

from __future__ import annotations

import functools

from torch import Tensor

from ..calls import relative_error, tolerance
from ..errors import NMError
from ..kernels import semi_structured
from . import timer

_BUDGET_S = 0.1  # for all algorithms together; they differ by much more than a run from the next


def fastest_algorithm(
    input: Tensor,
    compressed: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    expected: Tensor,
) -> int | None:
    """The fastest of the algorithms that compute `expected`; arguments as for `multiply`.

    Returns:
        Its number, or None where the library leaves no choice.

    Raises:
        NMError: none computes it.
        RuntimeError: the library refuses the product.
    """
    if meta.numel():  # CUTLASS
        return None
    out = expected.shape[-1]
    product = functools.partial(semi_structured.multiply, input, compressed, meta, bias, out)
    numbers = list(semi_structured.algorithms(input, compressed, meta, out))
    runs = {str(number): functools.partial(product, number) for number in numbers}
    ms = timer.measure(runs, budget_s=_BUDGET_S, device=input.device)
    errors = []
    for name in sorted(ms, key=lambda name: ms[name]):
        errors.append(relative_error(expected, product(int(name))))
        if errors[-1] <= tolerance(expected):
            return int(name)
    raise NMError(
        f"cuSPARSELt: all {len(numbers)} algorithms differ from dense, the nearest by "
        f"{min(errors):.1e}"
    )
