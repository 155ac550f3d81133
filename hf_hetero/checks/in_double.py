"""This computes in fp64 what models compute in fp32, so that rounding is told from an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class InDouble(TorchFunctionMode):
    """`InDouble` gives fp64 to whatever asks for fp32 meanwhile, as norms, routers and rotary tables do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch with its types changed."""
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def in_double(model: Any) -> Iterator[None]:
    """Make a model of transformers one of fp64, and have all that it asks for in fp32 computed so meanwhile."""
    for part in model.modules():
        if (config := getattr(part, "config", None)) is not None:
            config._experts_implementation = "eager"  # torch's grouped product knows no fp64
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with InDouble():
            model.double()
            yield
    finally:
        torch.set_default_dtype(default)
