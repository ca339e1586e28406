"""The custom operators of nmfx, one file each: schema, fake, autograd, dispatch."""

from ..kernels import cpu
from . import (  # noqa: F401  (schemas come before native kernels)
    compiled,
    conv_nm,
    cuda,
    linear_nm,
    linear_semi_structured,
)

cpu.load()
