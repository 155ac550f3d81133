"""What the tests share: ranks in processes of their own, tiny models, long-tailed batches, an independent reference."""

from __future__ import annotations

import gc
import io
import multiprocessing as mp
import os
import queue
import random
import runpy
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import TrainerCallback, TrainingArguments

from hf_hetero import Group, HeteroConfig, HeteroError, HeteroTrainer, MicroBatch, Plan
from hf_hetero.data.plan_ahead import PlanSource
from hf_hetero.estimate import devices
from hf_hetero.model.chunked_mlp import ChunkedMLP
from hf_hetero.plan import ACTIVATIONS, METHODS

IGNORE = -100
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED_LAYERS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
MLA |= {"head_dim": 4, "num_key_value_heads": 4}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FAMILIES: dict[
    str, tuple[str, dict[str, Any]]
] = {  # name of the transformers classes, and what makes the family itself
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "qwen3-windows": ("Qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "gemma2": ("Gemma2", {**MIXED_LAYERS, "attn_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3Text", {**MIXED_LAYERS, "final_logit_softcapping": 10.0}),
    "granite": ("Granite", {}),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {}),
    "qwen3-moe": ("Qwen3Moe", {**MOE, "num_experts": 4, "decoder_sparse_step": 1}),
    "deepseek-v3": ("DeepseekV3", {**MLA, **EXPERTS, "first_k_dense_replace": 1}),
    "gpt-oss": ("GptOss", {**MIXED_LAYERS, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": ROPE}),
}

CPU_FLOPS = 1e10
"""What a CPU is said to reach in tests: timed, it would depend on what else runs, and plans with it."""


def often(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """Parameters of a test that takes long: those chosen run each time, the others with the slow tests."""
    unused = [case for case in chosen if case not in (cases := list(cases))]
    assert not unused, unused
    return [case if case in chosen else pytest.param(*_tuple(case), marks=pytest.mark.slow) for case in cases]


def every_pair(first: Iterable[Any], second: Iterable[Any], third: Iterable[Any]) -> list[tuple[Any, Any, Any]]:
    """Choices of one of each, such that any two choices stand together in one: a Latin square, with repeated rows."""
    first, second, third = list(first), list(second), list(third)
    size = max(map(len, (first, second, third)))
    square = [(a, b, (a + b) % size) for a in range(size) for b in range(size)]
    return list(
        dict.fromkeys((first[a % len(first)], second[b % len(second)], third[c % len(third)]) for a, b, c in square)
    )


def _tuple(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)


# ----------------------------------------------------------------------------------------------------------- ranks


PRELOAD = [  # imported once, so that starting a rank takes a fork
    "hf_hetero.trainer.sft",
    "peft",
    "pytest",
    "torch.distributed.algorithms.ddp_comm_hooks",
    "torch.utils.serialization.config",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
]


def forked() -> Any:
    """A context of multiprocessing whose processes are forked from one that has imported what ranks need."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run_program(script: Path, *arguments: str) -> tuple[int, str]:
    """Run a script as a program of its own, in a process that was forked; return its status, and all that it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        process = forked().Process(target=_program, args=(str(script), arguments, str(log)))
        process.start()
        process.join()
        return process.exitcode, log.read_text(encoding="utf-8")


def _program(script: str, arguments: tuple[str, ...], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(descriptor, number)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def run_ranks(
    function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 240, expect_errors: bool = False
) -> list[Any]:
    """Call `function(*args)` on so many gloo ranks, one thread each; return the results in the order of the ranks.

    With `expect_errors` a rank's exception is its result, and a rank that dies gives None.
    """
    context = forked()
    results: Any = context.Queue()
    ports: Any = context.Queue()
    processes = [
        context.Process(target=_rank, args=(function, rank, num_ranks, ports, args, results))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        deadline = timeout_s
        while len(found) < num_ranks:
            try:
                rank, ok, data = results.get(timeout=1)
                value = torch.load(io.BytesIO(data), weights_only=False)
            except queue.Empty:
                deadline -= 1
                dead = [r for r, p in enumerate(processes) if p.exitcode is not None and r not in found]
                if expect_errors and dead and results.empty():
                    found.update(dict.fromkeys(dead))
                    continue
                assert not dead or not results.empty(), f"ranks {dead} died: {[processes[r].exitcode for r in dead]}"
                assert deadline > 0, f"only ranks {sorted(found)} of {num_ranks} gave a result in {timeout_s} s"
                continue
            if not ok and not expect_errors:
                raise AssertionError(f"rank {rank} failed:\n{value[1]}")
            found[rank] = value if ok else value[0]
    finally:
        for process in processes:
            process.join(timeout=10 if len(found) == num_ranks else 0)
            if process.is_alive():
                process.kill()
    return [found[rank] for rank in range(num_ranks)]


def free_port() -> int:
    """A port that is free, and that no connection of another program is given by chance: those lie above."""
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def store_of(rank: int, num_ranks: int, ports: Any) -> dist.TCPStore:
    """The store at which ranks meet, on rank 0, at whatever port was free when it began to listen there."""
    if rank:
        return dist.TCPStore("127.0.0.1", ports.get(timeout=120), num_ranks, timeout=timedelta(seconds=120))
    store = dist.TCPStore("127.0.0.1", 0, num_ranks, is_master=True, wait_for_workers=False)
    for _ in range(num_ranks - 1):
        ports.put(store.port)
    return store


def wait_for_all(store: dist.TCPStore, num_ranks: int, most_s: float = 30) -> None:
    """Keep the store, which ends with its rank, until all have joined: one may be done before another begins."""
    end = time.monotonic() + most_s
    while store.add("begun", 0) < num_ranks and time.monotonic() < end:
        time.sleep(0.01)


def _rank(function: Any, rank: int, num_ranks: int, ports: Any, args: tuple[Any, ...], results: Any) -> None:
    gc.freeze()  # what was imported before: no rank needs to look at it each time that a trainer collects garbage
    torch.set_num_threads(1)
    devices.cpu_flops = lambda *_: CPU_FLOPS
    mp.set_start_method("fork", force=True)  # a rank's own children start as they would in a user's script
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
    }
    store = None
    try:
        store = store_of(rank, num_ranks, ports)
        os.environ["MASTER_PORT"] = str(store.port)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=120))
        store.add("begun", 1)
        value, ok = function(*args), True
    except BaseException as error:
        # exceptions of other packages need not survive pickling
        kept = error if isinstance(error, HeteroError) else RuntimeError(repr(error))
        value, ok = (kept, traceback.format_exc()), False
    buffer = io.BytesIO()
    torch.save(value, buffer)  # tensors by value: the process is about to end
    results.put((rank, ok, buffer.getvalue()))
    results.close()
    results.join_thread()
    if store is not None and rank == 0:
        wait_for_all(store, num_ranks)
    os._exit(0 if ok else 1)


def come_late(num_others: int) -> None:
    """Be late, for however long it takes, until so many other ranks have given up waiting."""
    store = dist.distributed_c10d._get_default_store()
    while store.add("given up", 0) < num_others:
        time.sleep(0.05)
    store.set("all have given up", "")


def give_up() -> None:
    """Say that this rank no longer waits; rank 0, which has the store, stays until the late rank has heard it."""
    store = dist.distributed_c10d._get_default_store()
    store.add("given up", 1)
    if dist.get_rank() == 0:
        store.wait(["all have given up"], timedelta(seconds=120))


MARK = "HETERO_TEST_MARK"
"""A variable of the environment, by which a test knows the processes that its ranks have started."""


def processes_of(mark: str) -> dict[int, str]:
    """Numbers and command lines of the processes that carry a mark."""
    found: dict[int, str] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def shard_on_cpu() -> None:
    """Let accelerate run FSDP2 on this rank's CPU, which it otherwise ignores without a word."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    start = AcceleratorState.__init__

    def started(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = started


# ---------------------------------------------------------------------------------------------------------- models


def tiny_model(
    family: str = "llama", attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A two-layer model with random weights, the same for the same arguments."""
    torch.manual_seed(0)
    name, special = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**TINY, **special, **changes}, attn_implementation=attention)
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).to(torch.float32)
    return keep_float64(model.to(dtype)) if dtype == torch.float64 else model.to(dtype)


def keep_float64(model: torch.nn.Module) -> torch.nn.Module:
    """Replace norms that compute in fp32 whatever they are given."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight.data.copy_(child.weight.data)
                setattr(parent, name, norm)
    return model


def with_lora(model: Any, targets: Sequence[str] = ("q_proj", "v_proj")) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=list(targets), task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, config)


# ------------------------------------------------------------------------------------------------------------ data


def samples(lengths: Sequence[int], seed: int = 0, vocab: int = 97) -> list[dict[str, list[int]]]:
    """Random samples; labels masked in part. A sample of 5 tokens has no target at all."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(3, vocab, (length,), generator=generator)
        labels = ids.clone()
        hidden = length if length == 5 else int(torch.randint(0, max(1, length // 2), (1,), generator=generator))
        labels[:hidden] = IGNORE
        found.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return found


# long tail; with a one-token sample, and one without targets (5)
LENGTHS = [40, 3, 17, 1, 9, 5, 28, 64, 2, 11, 7, 33, 21, 4, 13, 50, 6, 1, 19, 8, 5, 26, 3, 12]


# -------------------------------------------------------------------------------------------------------- training

SHAPES = {
    1: [[(0,)]],
    2: [[(0, 1)], [(0,), (1,)]],
    4: [[(0, 1), (2,), (3,)], [(0, 1, 2, 3)], [(0,), (1,), (2, 3)], [(0, 1), (2, 3)], [(0,), (1,), (2,), (3,)]],
}


class ScriptedPlanner:
    """Plans that no cost model would choose: mixed degrees and policies, 1 to 4 micro-batches, empty groups."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks

    def plan(self, lengths: Sequence[int]) -> Plan:
        key = sum(lengths)
        num_micro_batches = 1 + key % 4
        micro_batches = []
        for m in range(num_micro_batches):
            chunk = list(range(m, len(lengths), num_micro_batches))
            shape = SHAPES[self.num_ranks][(m + key) % len(SHAPES[self.num_ranks])]
            filled = shape[: max(1, len(shape) - m % 2)]  # every second micro-batch leaves a group empty
            groups = [
                Group(
                    ranks,
                    tuple(chunk[n :: len(filled)]) if ranks in filled else (),
                    *crossing(ranks, m + n + key),
                    activations=(None, *ACTIVATIONS)[(m + n + key) % 3],
                )
                for n, ranks in enumerate(shape)
            ]
            micro_batches.append(MicroBatch(tuple(groups)))
        return Plan(self.num_ranks, tuple(micro_batches), seconds=1.0, lower_bound_s=1.0)


def crossing(ranks: tuple[int, ...], key: int) -> tuple[str, int | None]:
    """A method for a group, each in turn; and the ranks of a block where there are blocks."""
    of_four = ("ulysses", "gather", "token_ring", "ulysses_ring", "ring", "ulysses")
    methods = of_four if len(ranks) == 4 else [method for method in METHODS if method != "ulysses_ring"]
    method = methods[key % len(methods)]
    return method, 2 if method == "ulysses_ring" else None


@dataclass(frozen=True)
class ScriptedSource:
    """A `PlanSource` by functions."""

    plan: Callable[[Sequence[int]], Plan]
    static: Callable[[Sequence[int]], Plan]
    improve: Callable[[Plan, Sequence[int]], Plan] = lambda plan, _: plan
    close: Callable[[], None] = lambda: None


def scripted(planner: Any) -> PlanSource:
    return ScriptedSource(plan=planner.plan, static=planner.plan)


class ScriptedTrainer(HeteroTrainer):
    def _plan_source(self) -> PlanSource:
        return scripted(ScriptedPlanner(self.args.world_size))


@dataclass
class Recorder(TrainerCallback):
    """Keeps the gradients of each step, before clipping has changed them when clipping is off."""

    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append(gradients_of(model))


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {plain_name(name): whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def kept_by_autograd(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps meanwhile for backward, weights aside."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if (pointer := x.untyped_storage().data_ptr()) not in weights:
            kept[pointer] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy; of a sharded tensor, of all its parts (a collective)."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def arguments(output: str, world: int, global_batch: int = 12, **changes: Any) -> TrainingArguments:
    """Settings under which a step is as bare as possible: SGD, no clipping, no schedule."""
    options: dict[str, Any] = {
        "output_dir": output,
        "use_cpu": True,
        "per_device_train_batch_size": global_batch // world,
        "max_steps": 4,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 7,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    return TrainingArguments(**{**options, **changes})


def trained(
    model: Any,
    data: Any,
    trainer_class: Any = ScriptedTrainer,
    hetero: HeteroConfig | None = None,
    resume: str | None = None,
    callbacks: Sequence[Any] = (),
    **changes: Any,
) -> dict[str, Any]:
    """Train on the ranks of this process group; gradients of each step, weights, logs."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    ChunkedMLP.chunk_bytes = 1 << 13  # a few tokens of a tiny model
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        options = {"output_dir": folder, **changes}
        extra = {"hetero": hetero} if issubclass(trainer_class, HeteroTrainer) else {}
        trainer = trainer_class(
            model=model,
            args=arguments(options.pop("output_dir"), world, **options),
            train_dataset=data,
            callbacks=[recorder, *callbacks],
            **extra,
        )
        trainer.train(resume_from_checkpoint=resume)
    weights = {plain_name(name): whole(p) for name, p in trainer.model.named_parameters()}
    return {
        "gradients": recorder.gradients,
        "weights": weights,
        "logs": trainer.state.log_history,
        "state": {"tokens": trainer.state.num_input_tokens_seen, "epoch": trainer.state.epoch},
        "wrapper": type(trainer.model_wrapped).__name__,
    }


def reference_steps(model: Any, data: Any, steps: Sequence[Sequence[int]], rate: float = 0.05) -> dict[str, Any]:
    """Independent of the package: each sample alone, token losses summed, divided once, plain gradient descent."""
    gradients = []
    losses = []
    model.train()
    for rows in steps:
        model.zero_grad()
        count = sum(label != IGNORE for row in rows for label in data[row]["labels"][1:])
        loss_sum = 0.0
        for row in rows:
            ids, labels = (torch.tensor(data[row][key]) for key in ("input_ids", "labels"))
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            loss = F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE, reduction="sum") / count
            (loss + 0 * logits.sum()).backward()
            loss_sum += loss.item()
        gradients.append(gradients_of(model))
        losses.append(loss_sum)
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= rate * p.grad
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"gradients": gradients, "weights": weights, "losses": losses}


def trainer_order(num_samples: int, batch: int, seed: int, num_steps: int) -> list[list[int]]:
    """The rows of each step as accelerate's SeedableRandomSampler deals them, epoch after epoch."""
    steps: list[list[int]] = []
    for epoch in range(num_steps):
        order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        steps += [order[start : start + batch] for start in range(0, num_samples, batch)]
    return steps[:num_steps]


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference, relative to the largest expected entry of all tensors."""
    assert found.keys() == expected.keys()
    scale = max(float(x.abs().max()) for x in expected.values())
    return max(float((found[name] - expected[name]).abs().max()) for name in expected) / scale
