"""`from simple_knn._C import distCUDA2`, the import path of Gaussian-splatting code."""

from . import distCUDA2

__all__ = ["distCUDA2"]
