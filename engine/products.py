"""Wide linear layers in fp32 on AMD's chips: oneDNN's product in place of MKL's, which was measured half as fast.

Which one is taken depends on the chip's maker alone, so that a run can be repeated. The two differ by rounding.
"""
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

WIDE = 4_000_000   # weights of a layer; below, MKL's is as fast


@cache
def mkl_is_slow(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether PyTorch multiplies float32 by MKL on a chip of AMD, and has oneDNN."""
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return libraries and cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text(errors="replace")


class WideLinear(torch.autograd.Function):
    """``x @ weight.T + bias``; gradients are PyTorch's own, whose operands lie as oneDNN would not have them."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        context.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        (x, weight), (gradient,) = context.saved_tensors, gradients
        return (gradient @ weight if context.needs_input_grad[0] else None), gradient.T @ x, gradient.sum(0)


class OneDnnProducts(TorchFunctionMode):
    """Let wide linear layers of float32 use ``WideLinear``."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function is F.linear and not kwargs and len(args) == 3 and args[0].dim() == 2 \
                and args[1].numel() >= WIDE and args[0].dtype == args[1].dtype == torch.float32:
            return WideLinear.apply(*args)
        return function(*args, **kwargs or {})
