"""nmfx: N:M structured sparsity for PyTorch, as a torch.fx pass.

    model = nmfx.sparsify(model, "2:4")     # keep 2 of every 4 weights; train as before
    print(nmfx.report(model))               # every layer: pattern, state, or why it stays dense
    fast = nmfx.lower(model, (x,))          # packed weights for inference

N:M always means: keep N of every M.
"""

from . import plot
from .attach import Attachment, attach
from .audit import verify
from .backend import backend
from .check_onnx import check_onnx
from .errors import NMError
from .fold import fold
from .load import load
from .lower import lower
from .mask import is_nm, nm_mask
from .metrics import Sad, sad
from .monitor import Monitor
from .ops.conv_nm import conv_nm
from .ops.conv_semi_structured import conv_semi_structured as conv_semi_structured
from .ops.keep import keep

# These three are not public: unpickled graphs look for their nodes' functions here.
from .ops.linear_by_rows import linear_by_rows as linear_by_rows
from .ops.linear_nm import linear_nm
from .ops.linear_semi_structured import linear_semi_structured as linear_semi_structured
from .ops.sr_ste import sr_ste
from .pattern import Pattern
from .preview import preview
from .report import report
from .report_table import Report
from .save import save
from .schedule import freeze, masks, set_lambda, set_pattern, unfreeze
from .sparsify import sparsify, unsparsify
from .state import load_state_dict, state_dict
from .trace import trace
from .version import NMFX

__version__ = NMFX

__all__ = [
    "Attachment",
    "Monitor",
    "NMError",
    "Pattern",
    "Report",
    "Sad",
    "attach",
    "backend",
    "check_onnx",
    "conv_nm",
    "fold",
    "freeze",
    "is_nm",
    "keep",
    "linear_nm",
    "load",
    "load_state_dict",
    "lower",
    "masks",
    "nm_mask",
    "plot",
    "preview",
    "report",
    "sad",
    "save",
    "set_lambda",
    "set_pattern",
    "sparsify",
    "sr_ste",
    "state_dict",
    "trace",
    "unfreeze",
    "unsparsify",
    "verify",
]
