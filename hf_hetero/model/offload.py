"""Saved tensors wait in host memory from the forward pass until backward asks for them, copied beside computation.

What a layer saves is a bundle: its input, which autograd saves, and what attention exchanged in it, which the context
keeps. Backward asks for bundles in reverse. With the first tensor of one, all of it and the bundle before it start on
their way back, so that the latter is there when its layer's turn comes. Of three layers:

    computing stream   | forward 1 | forward 2 | forward 3 | loss | backward 3 | backward 2 | backward 1 |
    copy stream        |   1 out   |   2 out   |   3 out   |      | 3 in, 2 in |    1 in    |            |
    bundles on device  |     1     |   1   2   |   2   3   |      |   3   2    |   2   1    |     1      |

Only `3 in` is waited for: no layer's computation covers it. Each tensor comes back once, and then belongs to who asked
for it: nothing of a layer stays on the device when its turn is over (`activations` compares the policies).

Copies run on a stream of their own, to and from pinned memory, and are the bits that were there:
    - out: the copy stream waits for what has been computed so far, which includes the tensor; and the allocator is told
      that the copy reads it (`record_stream`), so its memory is taken again only when it is copied;
    - in: one stream does both, so nothing comes back before it is there; the computing stream waits for the copy's
      event, and the allocator is told that it reads the copy.
On a device other than a GPU a copy is cloned and given back, so that the same is learned.

Layers' inputs on the host: Unsloth, and ALST (arXiv:2506.13996); what sets the size: MEMO (arXiv:2407.12117).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from weakref import ref

import torch


class SavedTensor:
    """A `SavedTensor` is on its way to the host, there, or on its way back.

    Args:
        bundle: number of the bundle it belongs to.
        host: the copy.
        device: where it came from.

    Attributes:
        on_device: the copy that came back, until somebody asks for it.
        copied: on a GPU, the event after which that copy is whole.
        was_given: somebody has asked for it.
    """

    def __init__(self, bundle: int, host: torch.Tensor, device: torch.device) -> None:
        self.bundle, self.host, self.device = bundle, host, device
        self.on_device: torch.Tensor | None = None
        self.copied: Any = None
        self.was_given = False


class HostStore:
    """A `HostStore` keeps tensors of one micro-batch in host memory.

    Who may ask for a tensor, autograd or a layer's context, owns its record; the store only knows of it. So what nobody
    can ask for any more is not brought back, and its memory is free on both sides.

    Args:
        device: where they are computed.
        num_tokens: of this rank; only tensors of (1, num_tokens, hidden) are worth the way.
        hidden: width of a hidden state.
        stream: for copies, of `stream_for`.
    """

    def __init__(self, device: torch.device, num_tokens: int, hidden: int, stream: Any = None) -> None:
        self._device, self._shape, self._stream = device, (1, num_tokens, hidden), stream
        self._bundles: list[list[ref[SavedTensor]]] = []

    def hooks(self) -> AbstractContextManager[Any]:
        """Return a context for the forward pass: hidden states that autograd saves are put away, each in a bundle."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def put(self, tensor: torch.Tensor, opens: bool = False) -> SavedTensor:
        """Start to copy a tensor to the host.

        Args:
            opens: it is the first of a new bundle.
        """
        if opens or not self._bundles:
            self._bundles.append([])
        saved = SavedTensor(len(self._bundles) - 1, self._copy_out(tensor), tensor.device)
        self._bundles[-1].append(ref(saved))
        return saved

    def get(self, saved: SavedTensor) -> torch.Tensor:
        """Return the tensor, on its device; it may be asked for again, and then comes again."""
        # with the bundle before it, which backward asks for next: its copies run while this one's layer computes
        for number in (saved.bundle, saved.bundle - 1):
            for reference in self._bundles[number] if number >= 0 else ():
                other = reference()
                if other is not None and other.on_device is None and not other.was_given:
                    self._copy_back(other)
        if saved.on_device is None:
            self._copy_back(saved)
        tensor, saved.on_device, saved.was_given = saved.on_device, None, True
        assert tensor is not None
        if saved.copied is not None:
            computing: Any = torch.cuda.current_stream(self._device)
            computing.wait_event(saved.copied)
            tensor.record_stream(computing)
        return tensor

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | SavedTensor:
        if type(tensor) is not torch.Tensor or tuple(tensor.shape) != self._shape:
            return tensor  # what stands for logits, say, has the shape of hidden states
        return self.put(tensor, opens=True)

    def _unpack(self, packed: torch.Tensor | SavedTensor) -> torch.Tensor:
        return self.get(packed) if isinstance(packed, SavedTensor) else packed

    def _copy_out(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._stream is None:
            return tensor.detach().clone()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(self._stream)  # its memory is taken again only when it is copied
        return host

    def _copy_back(self, saved: SavedTensor) -> None:
        if self._stream is None:
            saved.on_device = saved.host.clone()
            return
        with torch.cuda.stream(self._stream):
            saved.on_device = saved.host.to(saved.device, non_blocking=True)
            saved.copied = self._stream.record_event()


def stream_for(device: torch.device) -> Any:
    """Make a stream for copies; None where there are no streams."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None
