"""This is the verb `hf-hetero advise`."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from hf_hetero.forecast.arguments import add_setting
from hf_hetero.terminal.plain import plain
from hf_hetero.terminal.show import show
from hf_hetero.what_if.arguments import add_source, source_of
from hf_hetero.what_if.mixes import MIXES


def add_advise(verbs: Any) -> None:
    """Add the verb to those of the command line."""
    verb: argparse.ArgumentParser = verbs.add_parser(
        "advise",
        help="what fits, how fast, what to start from and to change next, before GPUs are paid for",
        description="What fits, how fast, what to start from, what to change next: by estimate, in seconds, on no GPU.",
    )
    add_source(verb)
    verb.add_argument("model", help="name on the hub, folder, or config.json; no weights are loaded")
    verb.add_argument("--gpus", required=True, help="such as 8xH100; 16xH100 means two nodes of eight (2x8xH100)")
    verb.add_argument("--batch-size", type=int, help="samples of a step, over all ranks; default: 8 a rank")
    verb.add_argument("--epochs", type=float, default=1.0, help="over the dataset, for the days; default: 1")
    verb.add_argument("--max-degree", type=int, help="most ranks that may share one sample")
    add_setting(verb)
    verb.add_argument("-o", "--output", metavar="DIR", help="write settings, script and launch file to start from")
    verb.add_argument("--json", action="store_true", help="print it as JSON (hf-hetero-advice/1)")
    verb.set_defaults(run=_advise)


def _advise(args: argparse.Namespace) -> None:
    """Advise, in words; write what to start from where the user says."""
    from hf_hetero.advice.advise import advise, machines_of, num_drawn  # torch, which planning does without
    from hf_hetero.advice.levers import Run
    from hf_hetero.advice.report import advice_blocks
    from hf_hetero.advice.start import start_of, write_start
    from hf_hetero.forecast.forecast import model_named
    from hf_hetero.forecast.setting import setting_of

    run = Run(machines_of(args.gpus), setting_of(args), args.max_degree)
    model = model_named(args.model)
    source = source_of(args, num_drawn(run.machines, args.batch_size), usual_tokenizer=args.model)
    advice = advise(source, model, run, args.batch_size, args.seed, args.epochs)
    start = start_of(advice, args.model, None if args.source in MIXES else args.source)
    said = advice_blocks(advice, start)
    words = write_start(start, advice, plain(said), Path(args.output)) if args.output else None
    if args.json:
        print(json.dumps({**advice.to_dict(), "recipe": start.recipe.name, "command": words}))
        return
    show(*said)
    if words is not None:
        print(f"Wrote {args.output}. Check it, then start it:")
        print(f"  hf-hetero recipes check {shlex.quote(args.output)} --gpus {run.machines.name}")
        print(f"  {shlex.join(words)}")
