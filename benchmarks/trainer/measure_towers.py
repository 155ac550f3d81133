"""What it is worth to plan what towers compute: `python benchmarks/trainer/measure_towers.py`.

Two gloo ranks under DDP, one thread each, on this machine's CPU, train a small Qwen2.5-VL on rows of which half have
one to three images and the others as many tokens of text. By turns, in one run, the same steps are planned by tokens
and tower tokens, and by tokens alone. Seconds are those of a rank's processor, not of a clock, so that whatever else
the machine does counts little. A step lasts as long as its busier rank; what the other one has less, it waits.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from helpers import run_ranks
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, TrainingArguments

from hf_hetero import HeteroConfig, HeteroTrainer
from hf_hetero.data.plan_sources import PlanSource
from hf_hetero.planner import Planner

IMAGE, MERGED, PATCH = 990, 2, 4
TEXT = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}}
TOWER = {"hidden_size": 128, "intermediate_size": 384, "depth": 6, "num_heads": 4, "out_hidden_size": 256}
TOWER |= {"patch_size": PATCH, "spatial_merge_size": MERGED, "temporal_patch_size": 1}
TOWER |= {"window_size": 32, "fullatt_block_indexes": [2, 5]}
TOKENS = {"image_token_id": IMAGE, "video_token_id": 991, "vision_start_token_id": 992, "vision_end_token_id": 993}
SIDES = (16, 24, 32)
"""Patches along a side of an image."""
WARMING = 2
"""First steps, which are not counted."""


class OfTokens:
    """A source of plans that asks the same planner, and knows no towers."""

    def __init__(self, planner: Planner) -> None:
        self.plan, self.static = planner.plan, planner.static

    def improve(self, plan: Any, lengths: Any) -> Any:
        """Leave a plan as it is."""
        return plan


class Timed(HeteroTrainer):
    """Counts the seconds that this rank's processor takes for the passes of each step."""

    knows_towers = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seconds: list[float] = []

    def _plan_source(self) -> PlanSource:
        return super()._plan_source() if self.knows_towers else OfTokens(self._run.planners.planner())

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a step's passes."""
        begin = time.process_time()
        loss = super().training_step(*args, **kwargs)
        self.seconds.append(time.process_time() - begin)
        return loss


def rows_of(num: int) -> list[dict[str, Any]]:
    """Half of the rows with images, the others with as many tokens of text."""
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for _ in range(num // 2):
        num_images = int(torch.randint(1, 4, (1,), generator=generator))
        sides = [SIDES[n] for n in torch.randint(len(SIDES), (num_images,), generator=generator).tolist()]
        num_text = int(torch.randint(50, 400, (1,), generator=generator))
        ids = torch.randint(3, 900, (num_text,), generator=generator).tolist()
        for side in sides:
            ids = [992, *[IMAGE] * (side // MERGED) ** 2, 993, *ids]
        grids = torch.tensor([[1, side, side] for side in sides])
        pixels = torch.randn(int(grids.prod(-1).sum()), 3 * PATCH**2, generator=generator)
        text = torch.randint(3, 900, (len(ids),), generator=generator).tolist()
        rows.append({**row_of(ids), "pixel_values": pixels, "image_grid_thw": grids})
        rows.append(row_of(text))
    return rows


def row_of(ids: list[int]) -> dict[str, Any]:
    """Return tokens, their labels, and which are of images."""
    labels = [-100 if token >= IMAGE else token for token in ids]
    return {"input_ids": ids, "labels": labels, "mm_token_type_ids": [int(token == IMAGE) for token in ids]}


def run(knows_towers: bool, steps: int, frozen: bool) -> tuple[list[float], float]:
    """Train on a rank; processor seconds of each step, and the tower tokens of an image by its tokens."""
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config={**TEXT, **ROPE}, vision_config=TOWER, **TOKENS)  # pyright: ignore
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.model.visual.requires_grad_(not frozen)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"use_cpu": True, "dataloader_pin_memory": False, "report_to": []}
        options |= {"logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-4}
        args = TrainingArguments(folder, per_device_train_batch_size=8, max_steps=WARMING + steps, **options)
        hetero = HeteroConfig(max_tokens_per_rank=16384, calibrate=False, solver="fast", max_degree=1)
        trainer = Timed(model=model, args=args, train_dataset=rows_of(96), hetero=hetero)
        trainer.knows_towers = knows_towers
        ratios: list[float] = []
        begin = trainer.training_step

        def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
            if (towers := trainer._run.packer.towers) is not None:
                ratios.append(towers.tokens({"image_grid_thw": [[1, 24, 24]]}) / 144)
            return begin(*args, **kwargs)

        trainer.training_step = watched
        trainer.train()
        return trainer.seconds[WARMING:], ratios[0]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="that are counted, in each turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--frozen", action="store_true", help="the tower learns nothing")
    asked = parser.parse_args()
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    ratio = 0.0
    for turn in range(2 * asked.turns):
        knows = turn % 2 == 1
        (one, ratio), (other, _) = run_ranks(run, 2, knows, asked.steps, asked.frozen, timeout_s=3600)
        found[knows] += zip(one, other, strict=True)
    print(f"An image has {ratio:.2f} tower tokens for each of its tokens.")
    print("| planned by | busier rank, s a step | both, mean | waits |")
    print("|---|---|---|---|")
    for knows, steps in found.items():
        most, means = [max(pair) for pair in steps], [mean(pair) for pair in steps]
        name = "tokens and tower tokens" if knows else "tokens"
        waits = 1 - sum(means) / sum(most)
        print(f"| {name} | {mean(most):.3f} ± {stdev(most):.3f} | {mean(means):.3f} | {waits:.1%} |")


if __name__ == "__main__":
    main()
