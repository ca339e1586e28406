"""The custom operators of nmfx, one file each: schema, fake, autograd, dispatch."""

from ..kernels import cpu
from . import compiled, conv_nm, cuda, linear_nm  # noqa: F401  (schemas come before native kernels)

cpu.load()
