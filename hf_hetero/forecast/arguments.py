"""These are the arguments of the command line that say how a model would be trained. No torch."""

from __future__ import annotations

import argparse


def add_setting(verb: argparse.ArgumentParser) -> None:
    """Add the arguments that `forecast.setting_of` reads."""
    verb.add_argument("--lora-r", type=int, help="train adapters of this rank on all linear layers")
    verb.add_argument("--checkpointing", action="store_true", help="every group recomputes its layers")
    verb.add_argument("--offload", action="store_true", help="groups may also offload to the host")
    verb.add_argument("--dtype", default="bfloat16", help="computed in; default: bfloat16")
    where = verb.add_mutually_exclusive_group()
    where.add_argument("--fsdp", dest="sharded", action="store_const", const=True, help="weights over all ranks")
    where.add_argument(
        "--shards", type=int, metavar="N", help="weights over every N ranks, which hold them all (HSDP): a node's, say"
    )
    where.add_argument("--ddp", dest="sharded", action="store_const", const=False, help="all weights on each rank")
    verb.add_argument("--network", type=float, metavar="GBPS", help="line rate of a node, in gigabits a second")
    verb.add_argument("--attention", default="fa2", help="fa2 (torch's own kernel, too), fa3 or fa4; default: fa2")
