"""A model's own code in float64 throughout: what it would compute if it rounded nothing to float32."""
import sys
from contextlib import contextmanager

import torch


class _Torch:
    "torch, in which float32 is float64."
    float32 = float = torch.float64
    def __getattr__(self, name): return getattr(torch, name)


@contextmanager
def float64(hf):
    "Within it, the files of the model's modules and `Tensor.float` know no float32; the model is to be in float64 itself."
    names, single = {type(m).__module__ for m in hf.modules() if '.models.' in type(m).__module__}, torch.Tensor.float
    files = [m for n in names if getattr(m := sys.modules[n], 'torch', None) is torch]
    try:
        for m in files: m.torch = _Torch()
        torch.Tensor.float = torch.Tensor.double
        yield
    finally:
        for m in files: m.torch = torch
        torch.Tensor.float = single
