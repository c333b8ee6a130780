"""transformers' own code in float64 throughout: what it would compute if it rounded nothing to float32."""
import sys
from contextlib import contextmanager

import torch


class _Torch:
    "torch, in which float32 is float64."
    float32 = float = torch.float64
    def __getattr__(self, name): return getattr(torch, name)


@contextmanager
def float64(hf):
    "Within it, the model's file and `Tensor.float` know no float32; the model is to be in float64 itself."
    module, single = sys.modules[type(hf).__module__], torch.Tensor.float
    try:
        module.torch, torch.Tensor.float = _Torch(), torch.Tensor.double
        yield
    finally: module.torch, torch.Tensor.float = torch, single
