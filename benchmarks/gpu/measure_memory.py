"""What holds more tokens, in memory and time: `python benchmarks/gpu/measure_memory.py --device cpu`.

Forward and backward of one pack: whole logits or the loss in chunks; layers that keep everything, compute it again,
with their MLPs in chunks, or with their inputs in the host's memory. Memory is the peak above what was there before
the step, weights and gradients; on a CPU it is not counted.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from shapes import MINIATURES, SHAPES, make_model, mix_pack
from stage import Stage, begin, bf16, seconds, start_peak, wait

from hf_hetero.attention import interface
from hf_hetero.attention.context import AttentionContext, planned_mask
from hf_hetero.attention.kernels import choose_kernel
from hf_hetero.layout import contiguous
from hf_hetero.model import lm_head
from hf_hetero.model.activations import Activations
from hf_hetero.model.lm_head import LeanHead
from hf_hetero.model.loss import token_loss
from hf_hetero.model.offload import HostStore, SavedTensor, stream_for


@dataclass(frozen=True)
class Way:
    """How a step is computed.

    Args:
        policy: what layers do, of `plan.ACTIVATIONS`; None: keep everything.
        chunked_loss, chunked_mlp: as in `HeteroConfig`.
    """

    policy: str | None = None
    chunked_loss: bool = True
    chunked_mlp: bool = False


WAYS = {
    "kept, whole logits": Way(chunked_loss=False),
    "kept": Way(),
    "recompute": Way("recompute"),
    "recompute, MLPs in chunks": Way("recompute", chunked_mlp=True),
    "offload, MLPs in chunks": Way("offload", chunked_mlp=True),
}


class CountingStore(HostStore):
    """A `HostStore` that counts the bytes that leave."""

    num_bytes = 0

    def put(self, tensor: torch.Tensor, opens: bool = False) -> SavedTensor:
        """Count, and put away."""
        self.num_bytes += tensor.numel() * tensor.element_size()
        return super().put(tensor, opens)


class Step:
    """Forward and backward of one pack."""

    def __init__(self, stage: Stage, model: Any, lengths: list[int], way: Way) -> None:
        self._device, self._model, self._lengths, self._way = stage.device, model, lengths, way
        self._kernel = choose_kernel(stage.device.type, torch.bfloat16)
        self._activations = Activations(model, recomputes=False, in_chunks=way.chunked_mlp, compiled=False)
        tokens, vocab = sum(lengths), model.config.vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, vocab, (1, tokens), generator=generator).to(stage.device)
        positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0).to(stage.device)
        mask = planned_mask(tokens, tokens).to(stage.device)
        self._inputs = {"input_ids": ids, "labels": ids, "position_ids": positions, "attention_mask": mask}
        self._stream = stream_for(stage.device)
        self.num_bytes = 0

    def __call__(self) -> torch.Tensor:
        """The loss, once the gradients are there."""
        way, tokens = self._way, sum(self._lengths)
        store = None
        if way.policy == "offload":
            store = CountingStore(self._device, tokens, self._model.config.hidden_size, self._stream)
        context = AttentionContext(
            contiguous(self._lengths, 1),
            (0,),
            0,
            None,
            "ulysses",
            self._kernel,
            self._device,
            keeps=way.policy is not None,
            store=store,
        )
        head = lm_head.install(self._model) if way.chunked_loss else None
        lazy = head.lazy() if isinstance(head, LeanHead) else nullcontext()
        try:
            with self._activations.following(way.policy, store), lazy:
                with bf16(self._device):
                    loss = self._model(**self._inputs, hetero=context, num_items_in_batch=tokens).loss
                loss.backward()
        finally:
            if isinstance(head, LeanHead):
                lm_head.uninstall(self._model)
        self.num_bytes = store.num_bytes if store is not None else 0
        return loss.detach()

    def gradients(self) -> float:
        """The norm of all gradients of one step."""
        for p in self._model.parameters():
            if p.grad is not None:
                p.grad.zero_()
        self()
        norms = [p.grad.float().norm() for p in self._model.parameters() if p.grad is not None]
        return float(torch.stack(norms).norm())


def measure(stage: Stage, name: str, model: Any, lengths: list[int]) -> None:
    """All ways with one model and one pack."""
    first: tuple[float, float] | None = None
    recompute_s = 0.0
    for title, way in WAYS.items():
        with stage.alone(f"{title} with {name}"):
            step = Step(stage, model, lengths, way)
            loss, norm = float(step()), step.gradients()
            first = first or (loss, norm)
            wait(stage.device)
            before = torch.cuda.memory_allocated(stage.device) if stage.device.type == "cuda" else 0
            start_peak(stage.device)
            step()
            wait(stage.device)
            peak = torch.cuda.max_memory_allocated(stage.device) - before if stage.device.type == "cuda" else None
            taken = seconds(stage.device, step, stage.pick(3, 1), stage.pick(1, 0))
            stage.row(
                "Memory and time of a step",
                model=name,
                tokens=sum(lengths),
                way=title,
                **{"peak (GiB)": None if peak is None else round(peak / 2**30, 2), "ms": round(1e3 * taken, 1)},
                **{"loss differs by": f"{abs(loss / first[0] - 1):.1e}"},
                **{"gradient differs by": f"{abs(norm / first[1] - 1):.1e}"},
            )
            if title == "recompute, MLPs in chunks":
                recompute_s = taken
            if way.policy == "offload":
                hidden_time(stage, name, step.num_bytes, taken - recompute_s)


def hidden_time(stage: Stage, name: str, num_bytes: int, longer_s: float) -> None:
    """How much of the copies' own time a step does not see."""
    x = torch.empty(max(1, num_bytes // 8), dtype=torch.uint8, device=stage.device)
    host = torch.empty(x.shape, dtype=torch.uint8, pin_memory=stage.device.type == "cuda")
    out_s = 8 * seconds(stage.device, partial(host.copy_, x, non_blocking=True), 3)
    in_s = 8 * seconds(stage.device, partial(x.copy_, host, non_blocking=True), 3)
    stage.row(
        "Offload",
        model=name,
        **{"bytes that leave (MiB)": round(num_bytes / 2**20, 3)},
        **{"copies alone (ms)": round(1e3 * (out_s + in_s), 1), "the step is longer by (ms)": round(1e3 * longer_s, 1)},
        **{"hidden share": stage.pick(round(1 - max(0.0, longer_s) / (out_s + in_s), 2), None)},
    )


def main() -> None:
    """Measure, and write as it comes."""
    stage = begin(__doc__)
    interface.register()
    shapes = MINIATURES if stage.is_miniature else {name: SHAPES[name] for name in ("qwen3-0.6b", "llama-3.2-1b")}
    for name, shape in shapes.items():
        if stage.left_s < stage.pick(30, 3):
            stage.note(f"No time left for {name}.")
            continue
        with stage.alone(name):
            model = make_model(shape, stage.device, interface.ATTENTION_NAME).train()
            model.loss_function = token_loss
            measure(stage, name, model, mix_pack("github", stage.pick(16384, 128), stage.pick(16384, 64)))
            model.to("meta")
    stage.done()


if __name__ == "__main__":
    main()
