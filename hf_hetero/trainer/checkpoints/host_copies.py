"""What is trained is copied into host memory, so that training can go on while the copy is written."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor

Key = tuple[torch.device, int, torch.dtype, torch.Size, tuple[int, ...]]


class HostCopies:
    """`HostCopies` makes copies of tensors as they are at this point of training, of each tensor once.

    On a GPU they are asked for in the stream that training computes in, and go into pinned memory: the host goes on at
    once, and whatever it asks the device for afterwards comes after them, so that no step, hook or callback can change
    what is copied. Elsewhere they are made at once.

    Args:
        model: that is trained.
        trained: weights that its optimizer has. Others do not change, so they are not copied.
    """

    def __init__(self, model: torch.nn.Module, trained: Iterable[torch.Tensor]) -> None:
        changing = {_storage_of(weight) for weight in trained}
        self._frozen = {_storage_of(weight) for weight in model.parameters()} - changing
        self._made: dict[Key, torch.Tensor] = {}
        self._devices: set[torch.device] = set()
        self._events: list[Any] = []

    def of(self, tree: Any) -> Any:
        """Return a copy of dicts, lists and tuples, with all that they hold; tensors that share memory share it there.

        Sharded tensors stay sharded: of each the part of this rank is copied.
        """
        if isinstance(tree, torch.Tensor):
            return self._of_tensor(tree)
        if isinstance(tree, Mapping):
            named = cast("Mapping[Any, Any]", tree)
            return {name: self.of(value) for name, value in named.items()}
        if type(tree) in (list, tuple):
            return type(tree)(self.of(value) for value in tree)
        return copy.deepcopy(tree)

    def asked_for(self) -> None:
        """Note that no more is asked for."""
        self._events = [torch.cuda.current_stream(device).record_event() for device in self._devices]

    def wait(self) -> None:
        """Wait until all copies are made."""
        for event in self._events:
            event.synchronize()

    def _of_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            local = self._of_tensor(tensor.to_local())
            # not from_local, which would bring the copy to the mesh's device
            return DTensor(local, tensor._spec, requires_grad=False)  # pyright: ignore
        if type(tensor) is not torch.Tensor:  # such as of a quantised weight
            return tensor.clone().cpu()
        if _storage_of(tensor) in self._frozen:
            return tensor
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if (found := self._made.get(key)) is None:
            found = self._made[key] = self._copied(tensor)
        return found

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu":
            return tensor.clone()
        if tensor.device.type != "cuda":
            return tensor.to("cpu", copy=True)
        self._devices.add(tensor.device)
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _storage_of(tensor: torch.Tensor) -> int:
    """Return where the memory of a tensor begins; of a sharded one, that of this rank's part."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    try:
        return local.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a wrapper of others, without memory of its own
        return 0
