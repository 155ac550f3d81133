"""Tensors that wait in host memory from the forward pass until backward asks for them, copied beside the computation.

What a layer puts away is a bundle. Backward asks for bundles in reverse; with the first tensor of one, the bundle
before it starts on its way back, so that it is there when its layer's turn comes. Each tensor comes back once, and its
next owner is who asked for it: nothing of a layer stays on the device when its turn is over. Copies run on a stream of
their own, to and from page-locked memory. On a device other than a GPU a copy is made and given back, so that the same
is learned.

Layers' inputs on the host: Unsloth, and ALST (arXiv:2506.13996); what sets the size: MEMO (arXiv:2407.12117).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from weakref import ref

import torch


class Parcel:
    """A tensor on its way to the host, there, or on its way back.

    Args:
        bundle: number of the bundle it belongs to.
        host: the copy.
        device: where it came from.
        done: on a GPU, when the host's copy is whole.
    """

    def __init__(self, bundle: int, host: torch.Tensor, device: torch.device) -> None:
        self.bundle, self.host, self.device = bundle, host, device
        self.back: torch.Tensor | None = None
        self.arrived: Any = None
        self.was_given = False


class HostStore:
    """Tensors of one micro-batch.

    Who may ask for a tensor, autograd or a layer's context, owns its parcel; the store only knows of it. So what nobody
    can ask for any more is not brought back, and its memory is free on both sides.

    Args:
        device: where they are computed.
        num_tokens: of this rank; only tensors of (1, num_tokens, hidden) are worth the way.
        hidden: width of a hidden state.
        stream: for copies, of `stream_for`.
    """

    def __init__(self, device: torch.device, num_tokens: int, hidden: int, stream: Any = None) -> None:
        self._device, self._shape, self._stream = device, (1, num_tokens, hidden), stream
        self._bundles: list[list[ref[Parcel]]] = []

    def hooks(self) -> AbstractContextManager[Any]:
        """A context for the forward pass: hidden states that autograd keeps are put away, each in a new bundle."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def put(self, tensor: torch.Tensor, opens: bool = False) -> Parcel:
        """Start copying a tensor to the host.

        Args:
            opens: it is the first of a new bundle.
        """
        if opens or not self._bundles:
            self._bundles.append([])
        parcel = Parcel(len(self._bundles) - 1, self._sent(tensor), tensor.device)
        self._bundles[-1].append(ref(parcel))
        return parcel

    def get(self, parcel: Parcel) -> torch.Tensor:
        """The tensor, on its device; may be asked for again, and then comes again."""
        for number in (parcel.bundle, parcel.bundle - 1):
            for known in self._bundles[number] if number >= 0 else ():
                wanted = known()
                if wanted is not None and wanted.back is None and not wanted.was_given:
                    self._bring(wanted)
        if parcel.back is None:
            self._bring(parcel)
        back, parcel.back, parcel.was_given = parcel.back, None, True
        assert back is not None
        if parcel.arrived is not None:
            now: Any = torch.cuda.current_stream(self._device)
            now.wait_event(parcel.arrived)
            back.record_stream(now)
        return back

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | Parcel:
        if type(tensor) is not torch.Tensor or tuple(tensor.shape) != self._shape:
            return tensor  # what stands for logits, say, has the shape of hidden states
        return self.put(tensor, opens=True)

    def _unpack(self, kept: torch.Tensor | Parcel) -> torch.Tensor:
        return self.get(kept) if isinstance(kept, Parcel) else kept

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._stream is None:
            return tensor.detach().clone()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(self._stream)  # its memory is taken again only when it is copied
        return host

    def _bring(self, parcel: Parcel) -> None:
        if self._stream is None:
            parcel.back = parcel.host.clone()
            return
        with torch.cuda.stream(self._stream):
            parcel.back = parcel.host.to(parcel.device, non_blocking=True)
            parcel.arrived = self._stream.record_event()


def stream_for(device: torch.device) -> Any:
    """A stream for copies; None where there are no streams."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None
