"""The custom operators of nmfx, one file each: schema, fake, autograd, dispatch."""

from ..kernels import cpu
from . import conv_nm, linear_nm  # noqa: F401  (their schemas come before the native kernels)

cpu.load()
