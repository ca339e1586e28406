"""Forward-mode derivatives: `torch.func.jvp`, `jacfwd`, `torch.autograd.forward_ad`.

torch drops the tangents of an operator that has no rule for them without a word, and a custom
operator cannot be given one. So the formulas of our references, which torch differentiates, run in
place of our operators.
"""

from __future__ import annotations

from torch.autograd import forward_ad


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are being computed."""
    return forward_ad._current_level >= 0
