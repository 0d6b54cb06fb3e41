"""Spherical harmonics of degree 0: the constant that ties a colour to its coefficient."""

from torch import Tensor

C0 = 0.28209479177387814


def rgb_to_sh(rgb: Tensor) -> Tensor:
    """Colour in [0, 1] -> f_dc."""
    return (rgb - 0.5) / C0
