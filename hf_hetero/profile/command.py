"""This is the verb `hf-hetero profile`."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_hetero.errors import ConfigError
from hf_hetero.plan import METHODS
from hf_hetero.terminal.show import show

DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_profile(verbs: Any) -> None:
    """Add the verb to those of the command line."""
    verb: argparse.ArgumentParser = verbs.add_parser(
        "profile",
        help="measure a cost model on this machine; alone, or under accelerate launch for the exchanges",
        description="Measure a cost model on this machine. Alone it times one rank, and estimates what ranks exchange; "
        "`accelerate launch -m hf_hetero.cli profile ...`, as the run will be launched, times that, too.",
    )
    verb.add_argument(
        "model", help="name on the hub, folder, config.json, or a recipe's train.yaml; weights are random"
    )
    verb.add_argument(
        "-o", "--output", required=True, help="the cost model (hf-hetero-cost/1), for --cost or cost_model"
    )
    verb.add_argument("--max-length", type=int, help="longest sample to time; default: the recipe's, else by device")
    verb.add_argument(
        "--max-tokens-per-rank", type=int, help="most tokens of a rank to time; default: what memory holds"
    )
    verb.add_argument(
        "--lora-r", type=int, help="rank of LoRA adapters on all linear layers; default: all weights train"
    )
    verb.add_argument("--checkpointing", action="store_true", help="recompute all layers (gradient_checkpointing)")
    verb.add_argument("--dtype", choices=DTYPES, help="of the weights; default: float32")
    verb.add_argument("--bf16", action="store_true", help="compute in bf16, as `bf16: true` of a run does")
    verb.add_argument("--cpu", action="store_true", help="on the CPU, although there is a GPU")
    verb.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="METHOD",
        help=f"that the run may use, of {', '.join(METHODS)}; default: the recipe's, else all but token_ring",
    )
    verb.add_argument("--seconds", type=float, default=75.0, help="to time for, after warming up; default: 75")
    verb.add_argument("--ranks", type=int, default=8, help="of the run to come, if this is not one of many; default: 8")
    verb.set_defaults(run=_profile)


def _profile(args: argparse.Namespace) -> None:
    """Measure, write the file, say how well it fits."""
    for name in ("max_length", "max_tokens_per_rank", "lora_r", "ranks"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: it must be at least 1.")
    if not 0 < args.seconds <= 86_400:
        raise ConfigError(f"--seconds {args.seconds:g}: say how many seconds to time for, above 0 and within a day.")
    if not Path(args.output).resolve().parent.is_dir():
        raise ConfigError(f"--output {args.output}: there is no such folder.")  # said now, not after the timing
    from hf_hetero.profile.models import subject_named  # torch and transformers, which planning does without
    from hf_hetero.profile.profile import profile
    from hf_hetero.profile.report import profile_blocks

    subject = subject_named(args.model)
    arguments: dict[str, Any] = dict(subject.arguments)
    arguments |= {"gradient_checkpointing": True} if args.checkpointing else {}
    arguments |= {"bf16": True} if args.bf16 else {}
    arguments |= {"use_cpu": True} if args.cpu else {}
    limits = {"max_tokens_per_rank": args.max_tokens_per_rank, "methods": args.methods}
    subject = replace(
        subject,
        arguments=arguments,
        dtype=args.dtype or subject.dtype,
        lora_r=args.lora_r or subject.lora_r,
        max_length=args.max_length or subject.max_length,
        hetero={**subject.hetero, **{name: limit for name, limit in limits.items() if limit}},
    )
    command = (
        f"hf-hetero {shlex.join(sys.argv[1:])}" if sys.argv[1:2] == ["profile"] else f"hf-hetero profile {args.model}"
    )
    found = profile(subject, args.seconds, args.ranks, command)
    if found.is_first:
        found.cost_model.save(args.output)
        show(*profile_blocks(found, args.output))
