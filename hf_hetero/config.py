"""This module has `HeteroConfig`: what a user may set. Every default is right for most."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Literal, cast, get_args, get_type_hints

from hf_hetero.errors import ConfigError
from hf_hetero.plan import ACTIVATIONS, METHODS

Solver = Literal["auto", "fast", "mip"]
Backend = Literal["highs", "cbc"]
SOLVERS: tuple[str, ...] = get_args(Solver)
MIP_BACKENDS: tuple[str, ...] = get_args(Backend)
DEFAULT_METHODS = tuple(method for method in METHODS if method != "token_ring")
"""Methods that plans choose from unless more are asked for. A token ring may pay off on links that carry both ways at
once, for models with as many heads of keys as of queries; that has not been measured on such links."""
KINDS: dict[object, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
    list[str]: (Sequence, "a list of names"),
}
"""A field's annotation -> what it may be, and that in words."""
LEAST = {
    "max_degree": 1,
    "max_tokens_per_rank": 1,
    "max_sample_tokens": 2,  # a sample of one token has nothing to predict
    "num_ranks": 1,
    "plan_ahead_steps": 0,
    "global_batch_size": 1,
}
MOST = {"plan_ahead_steps": 1000, "group_timeout_s": 604_800, "planning_timeout_s": 604_800}
"""Plans wait in memory; and who waits for more than a week waits for ever."""
MOST_COUNTED = 1 << 40
CHOICES = {
    "solver": SOLVERS,
    "mip_backend": MIP_BACKENDS,
    "longer_samples": ("error", "truncate", "split"),
    "router_loss": ("exact", "last_step"),
}


@dataclass
class HeteroConfig:
    """`HeteroConfig` is the settings of `HeteroTrainer`; `HfArgumentParser` reads it beside `TrainingArguments`.

    Raises:
        ConfigError: a value of another kind, or out of range, with the values allowed.
    """

    cost_model: str | None = field(
        default=None,
        metadata={"help": "Path of a cost model (hf-hetero-cost/1). Without one, an analytic estimate is used."},
    )
    calibrate: bool | None = field(
        default=None,
        metadata={
            "help": "Refit the cost model to measured steps (CalibrationCallback). Default: where it is an estimate, "
            "and full_determinism does not ask that two runs be planned alike."
        },
    )
    max_degree: int | None = field(
        default=None,
        metadata={"help": "Most ranks that may share one sample. Default: all; 1 where all of them would do its work."},
    )
    methods: list[str] = field(
        default_factory=lambda: list(DEFAULT_METHODS),
        metadata={"help": f"Attention exchanges the planner may choose from, of {', '.join(METHODS)}."},
    )
    solver: str = field(
        default="auto",
        metadata={
            "help": "fast: search. mip: improve each plan before its step. auto: improve plans while there is time."
        },
    )
    mip_backend: str = field(default="highs", metadata={"help": "Who solves integer programs: highs or cbc."})
    plan_ahead_steps: int = field(default=4, metadata={"help": "Plans kept ready before their step."})
    max_tokens_per_rank: int | None = field(
        default=None,
        metadata={"help": "Tokens one rank may hold in a micro-batch; overrides memory and activation_policies."},
    )
    keep_exchanged: bool = field(
        default=True,
        metadata={
            "help": "With gradient checkpointing, keep what ranks exchanged in attention until backward, instead of "
            "exchanging it again. Costs about two hidden states a token and layer; turn it off to save them."
        },
    )
    sync_each_micro_batch: bool | None = field(
        default=None,
        metadata={
            "help": "Synchronise gradients after every micro-batch instead of once a step: more communication, but "
            "where weights are sharded no rank ever holds whole gradients. Default: where weights are sharded, among "
            "the ranks that share them; replicas add up theirs once a step, but for gradients in 16 bits."
        },
    )
    chunked_loss: bool = field(
        default=True,
        metadata={
            "help": "Compute loss and logits' gradients for a few tokens at a time, so that the logits of a "
            "micro-batch, often its largest tensor, never exist as a whole."
        },
    )
    activation_policies: list[str] = field(
        default_factory=lambda: ["recompute"],
        metadata={
            "help": "What groups may do to hold more tokens, where a plan gains by it. recompute: compute layers again "
            "in backward. offload: the same, with what is kept for that in host memory."
        },
    )
    chunked_mlp: bool = field(
        default=True,
        metadata={
            "help": "Where layers are recomputed, let their MLPs go a few tokens at a time, so that inner tensors of a "
            "micro-batch never exist as a whole."
        },
    )
    router_loss: str = field(
        default="exact",
        metadata={
            "help": "Where a mixture of experts adds the loss of its routers (config.output_router_logits), which is a "
            "product of two means over a step's tokens, what the choices of experts are those of. exact: of this step; "
            "micro-batches after the first are run forward once more. last_step: of the step before, an approximation."
        },
    )
    plan_evaluation: bool = field(
        default=True,
        metadata={"help": "Plan evaluation and prediction, too; otherwise they are stock, each sample on one rank."},
    )
    max_sample_tokens: int | None = field(default=None, metadata={"help": "Most tokens of a sample. Default: any."})
    longer_samples: str = field(
        default="error",
        metadata={
            "help": "What to do with samples of more than max_sample_tokens. error: refuse to start. truncate: drop "
            "the rest of each. split: make several samples of each. What was done is said."
        },
    )
    length_column: str = field(
        default="length", metadata={"help": "Dataset column with each sample's tokens; counted once if absent."}
    )
    weight_column: str | None = field(
        default=None,
        metadata={
            "help": "Dataset column with what losses are multiplied by: a number for the row, or one for each of its "
            "tokens, of any sign. The loss is still divided by the step's target tokens. Default: all weigh 1."
        },
    )
    source_column: str | None = field(
        default=None,
        metadata={
            "help": "Dataset column that says where a row is from. The loss of each source is logged, over all of its "
            "target tokens. Default: none is."
        },
    )
    group_timeout_s: float = field(
        default=600.0,
        metadata={
            "help": "Seconds that ranks may wait for each other within a step; while some save or evaluate, "
            "TrainingArguments.ddp_timeout counts."
        },
    )
    save_in_background: bool = field(
        default=False,
        metadata={
            "help": "Copy what a checkpoint holds into host memory, and write it while training goes on; on_save and a "
            "push to the hub come when it is whole. Takes host memory for a second copy of what is trained."
        },
    )
    planning_timeout_s: float = field(
        default=60.0, metadata={"help": "Seconds a plan may take; after them its step has a simpler plan."}
    )
    num_ranks: int | None = field(
        default=None, metadata={"help": "Ranks this run was written for; another number is refused."}
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Samples of an optimizer step, over all ranks, however many there are. Default: "
            "per_device_train_batch_size x gradient_accumulation_steps x ranks."
        },
    )
    auto_resume: bool = field(
        default=False,
        metadata={
            "help": "Go on from the newest whole checkpoint in output_dir, if there is one, where train() is not told "
            "from which: for a job that is started again. A checkpoint of another run is refused."
        },
    )

    def __post_init__(self) -> None:
        # a parser of arguments or YAML takes what it is given: kinds are checked before values, so that the checks of
        # values need not fear a TypeError
        if isinstance(self.cost_model, os.PathLike):
            self.cost_model = os.fspath(self.cost_model)
        for name, kind in get_type_hints(HeteroConfig).items():
            value = getattr(self, name)
            kind, *or_none = (kind,) if kind in KINDS else get_args(kind)
            if not (_is_a(kind, value) or (value is None and or_none)):
                raise ConfigError(f"HeteroConfig.{name}={value!r:.60}: it must be {KINDS[kind][1]}.")
        for name, least in LEAST.items():
            value, most = getattr(self, name), MOST.get(name, MOST_COUNTED)
            if value is not None and value < least:
                raise ConfigError(f"HeteroConfig.{name}={value}: it must be at least {least}.")
            if value is not None and value > most:
                raise ConfigError(f"HeteroConfig.{name}={value!s:.60}: it must be at most {most:,}.")
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ConfigError(f"HeteroConfig.{name}={value!r}: choose one of {', '.join(choices)}.")
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or not self.methods:
            raise ConfigError(f"HeteroConfig.methods={self.methods!r}: choose from {', '.join(METHODS)}.")
        if unknown := [policy for policy in self.activation_policies if policy not in ACTIVATIONS]:
            raise ConfigError(f"HeteroConfig.activation_policies={unknown!r}: choose from {', '.join(ACTIVATIONS)}.")
        for name in ("group_timeout_s", "planning_timeout_s"):
            if not 0 < (seconds := getattr(self, name)) <= MOST[name]:
                raise ConfigError(
                    f"HeteroConfig.{name}={seconds!s:.60}: it must be above 0 seconds, and at most {MOST[name]:,}."
                )


def _is_a(kind: object, value: object) -> bool:
    """Return whether a value is of an annotated kind; True is no number, and text no list of names."""
    if not isinstance(value, KINDS[kind][0]):
        return False
    if kind == list[str]:
        return not isinstance(value, str) and all(isinstance(name, str) for name in cast("Sequence[object]", value))
    return kind is bool or not isinstance(value, bool)
