"""How far apart two computations of the same numbers may be: bounds that hold on every processor.

Processors add up in different orders, and every order rounds differently. So no bound here is a figure that some
machine printed: it counts roundings, or it is measured against what rounding costs on the same machine.
"""

import math

import torch
from torch import Tensor


def roundings_of(longest_sum: int, products: int) -> float:
    """How many roundings of the largest value two orders of the same sums may be apart.

    A sum of n terms is off by about sqrt(n) roundings (Higham and Mary 2019, doi:10.1137/18M1226312). Errors of random
    signs grow with the square root of how many products follow each other. Three times that is for layers that amplify.
    """
    return 3 * math.sqrt(longest_sum * products)


ROUNDINGS = roundings_of(256, 30)           # the small networks of most tests: some 260
SMOLLM2 = roundings_of(1536, 30 * 7)        # 30 layers of 7 products each: some 1,700


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding: 2^-24 in float32, 2^-53 in float64, 2^-8 in bfloat16."""
    return torch.finfo(dtype).eps / 2


def tolerated(scale: float, roundings: float = ROUNDINGS) -> float:
    """How far apart numbers may be that float32 computes from values of this size."""
    return roundings * rounding(torch.float32) * scale


def assert_same(actual: Tensor, expected: Tensor, roundings: float = ROUNDINGS) -> None:
    """One formula, computed twice in different orders. In float64 hardly anything but the same formula passes."""
    assert actual.shape == expected.shape, f"{list(actual.shape)} is not {list(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{actual.dtype} is not {expected.dtype}"
    apart = (actual - expected).abs().max()
    allowed = roundings * rounding(actual.dtype) * expected.abs().max()
    assert apart <= allowed, f"{apart:.3g} apart, and {allowed:.3g} is allowed"         # NaN fails, too


def distance(actual: Tensor, exact: Tensor) -> float:
    """How far a tensor is from the exact one, as a share of its norm."""
    return float((actual.float() - exact).norm() / exact.norm())


def assert_rounds_no_worse(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Half precision is as near to the same weights in float32 as another program's half precision.

    Errors of two programs that round equally often differ by chance only: of many values, by much less than a half.
    """
    assert distance(actual, exact) <= 1.5 * distance(plain, exact)
