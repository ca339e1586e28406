"""nmfx: N:M structured sparsity for PyTorch, as a torch.fx pass.

    model = nmfx.sparsify(model, "2:4")     # keep 2 of every 4 weights; train as before
    print(nmfx.report(model))               # every layer: pattern, state, or why it stays dense
    fast = nmfx.lower(model, (x,))          # packed weights for inference

N:M always means: keep N of every M.
"""

from .attach import Attachment, attach
from .audit import verify
from .errors import NMError
from .fold import fold
from .lower import lower
from .mask import is_nm, nm_mask
from .metrics import Sad, sad
from .ops.conv_nm import conv_nm
from .ops.keep import keep
from .ops.linear_nm import linear_nm
from .ops.sr_ste import sr_ste
from .pattern import Pattern
from .preview import preview
from .report import Report, report
from .schedule import freeze, masks, set_lambda, set_pattern, unfreeze
from .sparsify import sparsify, unsparsify
from .trace import trace

__version__ = "0.1.0.dev0"

__all__ = [
    "Attachment",
    "NMError",
    "Pattern",
    "Report",
    "Sad",
    "attach",
    "conv_nm",
    "fold",
    "freeze",
    "is_nm",
    "keep",
    "linear_nm",
    "lower",
    "masks",
    "nm_mask",
    "preview",
    "report",
    "sad",
    "set_lambda",
    "set_pattern",
    "sparsify",
    "sr_ste",
    "trace",
    "unfreeze",
    "unsparsify",
    "verify",
]
