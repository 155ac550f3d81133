"""How often a compiled model is compiled anew: `python benchmarks/gpu/measure_compiling.py --device cpu`.

`HeteroTrainer` with `torch_compile=True` over steps whose packs all differ in length: graphs that were compiled by the
first step, by a fifth of the steps, and by the last; if the last two are the same, lengths no longer matter. As torch
does it by itself, which takes a size for fixed until it changes, and with sizes that may change from the start.
"""

from __future__ import annotations

import statistics
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from shapes import MINIATURES, SHAPES, make_model, mix_lengths, samples
from short_runs import Stamps, run
from stage import Stage, begin
from torch._dynamo.utils import counters

from hf_hetero import HeteroConfig


class Graphs(Stamps):
    """Notes how many graphs there are when a step is over."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.compiled: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count."""
        super().on_step_end(args, state, control, **kwargs)
        self.compiled.append(counters["stats"]["unique_graphs"])


def variants() -> dict[str, tuple[bool, AbstractContextManager[Any]]]:
    """Whether a run is compiled, and under which setting of the compiler."""
    dynamic = torch._dynamo.config.patch(assume_static_by_default=False, automatic_dynamic_shapes=True)
    return {
        "not compiled": (False, nullcontext()),
        "compiled": (True, nullcontext()),
        "compiled, sizes free from the start": (True, dynamic),
    }


def measure(stage: Stage, num_steps: int, rows: int, most: int) -> None:
    """All variants on the same steps."""
    shape = MINIATURES["tiny-qwen3"] if stage.is_miniature else SHAPES["qwen3-0.6b"]
    lengths = mix_lengths("github", num_steps * rows, most)
    data = samples(lengths, shape.sizes["vocab_size"])
    for title, (compiles, setting) in variants().items():
        if stage.left_s < stage.pick(25, 3):
            stage.note(f"No time left for {title!r}.")
            continue
        with stage.alone(title), setting:
            torch._dynamo.reset()
            counters.clear()
            graphs = Graphs(stage.device)
            changes: dict[str, Any] = {"num_train_epochs": 1}
            if compiles:
                # a CPU has no need of fast code here, and graphs are the same
                changes |= {"torch_compile": True, "torch_compile_backend": stage.pick("inductor", "eager")}
            model = make_model(shape, stage.device, num_hidden_layers=stage.pick(28, 2))
            run(model, stage.device, data, rows, 1, HeteroConfig(), callbacks=[graphs], **changes)
            model.to("meta")
            stage.row("Compiled graphs", run=title, **as_row(graphs))


def as_row(graphs: Graphs) -> dict[str, Any]:
    """Counts, and the time of a step once they no longer grow."""
    ends = graphs.ends_s
    steps = [end - start for start, end in pairwise(ends)]
    later = steps[len(steps) // 2 :]
    a_fifth = max(1, len(graphs.compiled) // 5)
    return {
        "steps": len(graphs.compiled),
        "after the first": graphs.compiled[0],
        "after a fifth": graphs.compiled[a_fifth - 1],
        "after the last": graphs.compiled[-1],
        "median of later steps (ms)": round(1e3 * statistics.median(later), 1),
        "slowest of later steps (ms)": round(1e3 * max(later), 1),
    }


def main() -> None:
    """Measure, and write as it comes."""
    stage = begin(__doc__)
    measure(stage, num_steps=stage.pick(50, 10), rows=stage.pick(4, 2), most=stage.pick(4096, 60))
    stage.done()


if __name__ == "__main__":
    main()
