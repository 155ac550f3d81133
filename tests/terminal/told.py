"""What commands say, for tests: a plan, a simulation, a check, an estimate, with every kind of table."""

from __future__ import annotations

from typing import Any

from hf_hetero.costs import CostModel
from hf_hetero.plan import METHODS, Group, MicroBatch, Plan

LENGTHS = [150_000, 20, 30, 40, 7, 90, 1]
PLAN = Plan(
    4,
    (
        MicroBatch((Group((0, 1, 2, 3), (0,)),)),
        MicroBatch((Group((0, 1), (1, 2)), Group((2,), (3, 4)), Group((3,), (5, 6)))),
    ),
    seconds=41.5,
    lower_bound_s=40.0,
    solver="fast",
    planning_s=0.0123,
)
COST = CostModel(
    attention_s_per_token2=1e-8,
    linear_s_per_token=1e-4,
    micro_batch_s=0.1,
    all_to_all_bytes_per_token=1000,
    all_to_all_bytes_per_s=dict.fromkeys((2, 4, 8, 16, 32, 64), 1e8),
    all_to_all_latency_s={},
    activation_bytes_per_token=2**20,
    model_state_bytes_per_rank=10 * 2**30,
    memory_bytes_per_rank=70 * 2**30,
    source="estimated, not measured: " + "a word, another word, " * 9,
)


def way(seconds: float, times: float, to_bound: float, idle: float, note: str = "") -> dict[str, Any]:
    numbers = {"seconds": seconds, "speedup_of_adaptive": times, "ratio_to_bound": to_bound}
    return {**numbers, "micro_batches": 3, "idle_share": idle, "note": note}


SIMULATION: dict[str, Any] = {
    "num_ranks": 64,
    "num_steps": 2,
    "num_samples": 128,
    "num_tokens": 167_294,
    "context_tokens": 196_608,
    "lower_bound_s": 2.114,
    "planning_s": [0.002, 0.0401],
    "ways": {
        "adaptive": way(2.25, 1.0, 1.064, 0.09),
        "static": way(2.918, 1.3, 1.38, 0.0, "degree 64"),
        "megatron": way(2.918, 1.3, 1.381, 0.35, "as released, 5,992 tokens a rank"),
        "padded-rows": way(82.216, 36.55, 38.894, 0.0, "degree 64"),
    },
}
CHECK: dict[str, Any] = {
    "ok": True,
    "name": "org/model",
    "model_type": "llama",
    "tested": True,
    "versions": {"torch": "2.13.0+cpu", "transformers": "5.23.0", "flash-attn": "not installed"},
    "kernel": "torch_varlen",
    "num_heads": 32,
    "num_kv_heads": 8,
    "methods": {
        2: dict(zip(METHODS, ("even", "any heads", "any heads", "needs 4 ranks or more", ""), strict=True)),
        16: dict.fromkeys(METHODS, "key-value heads are copied: 8 for 16 ranks"),
        32: {},
    },
    "tokens_a_rank": {"everything kept": 6_779, "chunked loss": 7_806, "offloaded": 1_319_602},
    "probe": {
        "loss_error": 9e-8,
        "gradient_error": 7e-7,
        "reached": 2,
        "num_layers": 2,
        "failure": "",
        "problem": "",
        "manner": {"whole": False},
    },
    "verdict": "can be trained, by whole samples, which ranks do not share, because " + "it has its reasons " * 6,
}
TRAINED, MACHINES = "org/model, 8.03B weights, all trained", "8x8xH200"
