"""This is the command line, `hf-hetero`: one function a verb, which only formats what the library returns.

hf-hetero plan SOURCE --cost COST --ranks N                    plan one global batch: table, --json, --plot
hf-hetero simulate SOURCE --cost COST --ranks N --batch-size K --steps T    compare ways to share many
hf-hetero costs [NAME]                                         cost models that come with the package
hf-hetero check MODEL                                          can this model be trained under changing plans?
hf-hetero estimate MODEL --gpus 8xH100                         what it would cost on GPUs that one does not have
hf-hetero profile MODEL -o cost.json                           measure a cost model on this machine
hf-hetero report RUN                                           page of a run, finished or not
hf-hetero advise SOURCE MODEL --gpus 16xH100                   what fits, how fast, how to start, what to change next
hf-hetero recipes list | show | copy | check                   settings to start from, and whether they are right

SOURCE: a text file with a length a line, a dataset, or a synthetic mix; COST: a file, or a name from `costs`.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_hetero.advice.command import add_advise
from hf_hetero.config import DEFAULT_METHODS, MIP_BACKENDS, SOLVERS
from hf_hetero.cookbook.command import add_recipes
from hf_hetero.costs import CostModel
from hf_hetero.errors import ConfigError, HeteroError
from hf_hetero.forecast.arguments import add_setting
from hf_hetero.plan import METHODS
from hf_hetero.planner import Planner
from hf_hetero.profile.command import add_profile
from hf_hetero.terminal.show import show, show_error
from hf_hetero.what_if.arguments import add_source, source_of
from hf_hetero.what_if.mixes import MIXES
from hf_hetero.what_if.sources import Source, global_batches

MANY_OBJECTS = 200_000
"""After so many new objects garbage is looked for; importing transformers leaves half a million, nearly all in use."""

STEPS = 20  # of a simulation, unless the user says otherwise or the source has fewer


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; 0 on success, 1 with one line on stderr if something is wrong with what was given.

    `check` also ends with 1 if the model cannot be trained.
    """
    args = _parser().parse_args(argv)
    with suppress(AttributeError):  # a name may hold what the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    thresholds = gc.get_threshold()
    gc.set_threshold(MANY_OBJECTS, *thresholds[1:])
    try:
        status = args.run(args) or 0
        sys.stdout.flush()
        return status
    except HeteroError as error:
        show_error(f"hf-hetero: {' '.join(str(error).split())}")
    except BrokenPipeError:  # whoever read the output has seen enough; Python would complain when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        show_error(f"hf-hetero: Cannot write the output: {error.strerror or error}.")
    finally:
        gc.set_threshold(*thresholds)
    return 1


# ----------------------------------------------------------------------------------------------------------- the verbs


def _plan(args: argparse.Namespace) -> None:
    """Plan one global batch and print it."""
    from hf_hetero.report.tables import plan_table  # with pictures and pages, which nobody needs who asks for help

    planner = _planner(args)
    if args.batch_size is None and args.source in MIXES:
        raise ConfigError(f"The mix {args.source!r} has no end: say how many samples to plan (--batch-size).")
    source = _source(args, args.batch_size)
    if args.batch_size is None:
        lengths: list[int] = source.lengths.tolist()
    else:
        (lengths,) = global_batches(source, args.batch_size, 1, args.seed)
    plan = planner.plan(lengths)
    if args.plot:
        from hf_hetero.report import draw_plan

        draw_plan(plan, lengths, planner.cost_model, args.plot)
    as_json = {**plan.to_dict(), "lengths": lengths}
    if args.json:
        print(json.dumps(as_json))
    else:
        show(plan_table(plan, lengths, planner.cost_model))


def _simulate(args: argparse.Namespace) -> None:
    """Compare ways to share many batches and print what they come to."""
    from hf_hetero.progress import each  # tqdm, which the other verbs do without
    from hf_hetero.report.tables import simulation_table
    from hf_hetero.what_if.simulate import simulate

    planner = _planner(args)
    asked = STEPS if args.steps is None else args.steps
    source = _source(args, args.batch_size * asked)
    fewer = max(1, source.lengths.size // max(args.batch_size, 1)) if args.steps is None else asked
    batches = global_batches(source, args.batch_size, min(asked, fewer), args.seed)
    context = args.context if args.context is not None else args.max_length or source.longest_tokens
    if context < source.longest_tokens:
        raise ConfigError(
            f"--context {context}: {source.name!r} has samples of up to {source.longest_tokens:,} tokens. "
            "Raise it, or leave longer samples out with --max-length."
        )
    simulation = simulate(batches, planner, context, lambda steps: each(steps, "Planning", "steps"))
    if args.plot:
        from hf_hetero.report.simulation_picture import draw_simulation

        name = planner.cost_model.name or Path(args.cost).stem
        title = f"{Path(source.name).stem}, {args.batch_size} samples a step, on {args.ranks} ranks of {name}"
        draw_simulation(simulation, args.plot, title)
    result = simulation.to_dict()
    if args.json:
        print(json.dumps(result))
    else:
        show(simulation_table(result))


def _costs(args: argparse.Namespace) -> None:
    """List the shipped cost models, or print one."""
    from hf_hetero.report.tables import costs_table

    if args.name is None:
        show(*costs_table())
    else:
        print(json.dumps(CostModel.load(args.name).to_dict(), indent=1))


def _check(args: argparse.Namespace) -> int:
    """Check a model and print the verdict; 1 where it cannot be trained."""
    from hf_hetero.checks.check import check  # torch and transformers, which planning does without
    from hf_hetero.report.tables import check_table

    result = check(args.model, args.max_degree, args.ranks, args.memory_gib * 2**30).to_dict()
    about = f"{args.memory_gib:g} GiB, weights sharded over {args.ranks} ranks"
    if args.json:
        print(json.dumps(result))
    else:
        show(*check_table(result, about))
    return 0 if result["ok"] else 1


def _estimate(args: argparse.Namespace) -> None:
    """Estimate a run's cost model; print it in words, and write it where the user says."""
    from hf_hetero.forecast.forecast import forecast  # torch and transformers, which planning does without
    from hf_hetero.forecast.setting import setting_of
    from hf_hetero.report.tables import estimate_table

    found = forecast(args.model, args.gpus, setting_of(args))
    show(*estimate_table(found.cost, found.machines.num_ranks, found.trained, found.machines.name))
    if args.output:
        found.cost.save(args.output)
        print(f"Wrote {args.output}")


def _report(args: argparse.Namespace) -> None:
    """Write the report of a run beside its records, or where the user says."""
    from hf_hetero.report import report_run

    folder = Path(args.records) if Path(args.records).is_dir() else Path(args.records).parent
    output = args.output or str(folder / "report.html")
    report_run(args.records, output, None if args.cost is None else CostModel.load(args.cost))
    print(f"Wrote {output}")


def _planner(args: argparse.Namespace) -> Planner:
    """Make the planner; refuse a largest degree that its cost model does not offer."""
    planner = Planner(
        CostModel.load(args.cost),
        args.ranks,
        solver=args.solver,
        mip_backend=args.mip_backend,
        methods=args.methods,
    )
    if args.prove is not None:
        if not 0 < args.prove < math.inf:
            raise ConfigError(f"--prove {args.prove}: say how many seconds a batch may take, above 0.")
        planner = replace(planner, solver="mip", mip_time_limit_s=args.prove)
    if args.max_degree is None:
        return planner
    if args.max_degree not in planner.degrees:
        raise ConfigError(
            f"--max-degree {args.max_degree}: the cost model {args.cost!r} offers degrees "
            f"{', '.join(map(str, planner.degrees))} on {args.ranks} ranks. Choose one of them."
        )
    return replace(planner, max_degree=args.max_degree)


def _source(args: argparse.Namespace, num_samples: int | None) -> Source:
    """Read the lengths; refuse first what could not be drawn."""
    if args.plot:
        from hf_hetero.report.drawing import picture_format

        picture_format(args.plot)  # a wrong name is said now, not after the planning
    return source_of(args, num_samples or 0)


# ------------------------------------------------------------------------------------------------------- the arguments


def _parser() -> argparse.ArgumentParser:
    """Describe all verbs and their arguments."""
    parser = argparse.ArgumentParser(prog="hf-hetero", description="Plan long-tailed batches over groups of ranks.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    plan = verbs.add_parser("plan", help="plan one global batch; needs no GPU and no model")
    add_source(plan)
    _add_machine(plan)
    plan.add_argument("--batch-size", type=int, help="samples to pick from the source; default: all, in its order")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON (hf-hetero-plan/1) with its lengths")
    plan.add_argument("--plot", metavar="FILE", help="draw the plan into this .svg or .png")
    plan.set_defaults(run=_plan)

    simulated = verbs.add_parser("simulate", help="compare ways to share many batches; needs no GPU and no model")
    add_source(simulated)
    _add_machine(simulated)
    simulated.add_argument("--batch-size", type=int, required=True, help="samples of a step, over all ranks")
    simulated.add_argument("--steps", type=int, help=f"steps to simulate; default: {STEPS}, or as many as there are")
    simulated.add_argument(
        "--context",
        type=int,
        help="longest sample the run must be able to take, which the one degree of a static run must hold although it "
        "is rarely needed; default: --max-length, else the longest sample of the whole source",
    )
    simulated.add_argument("--json", action="store_true", help="print the totals as JSON (hf-hetero-simulation/1)")
    simulated.add_argument("--plot", metavar="FILE", help="draw the comparison into this .svg or .png")
    simulated.set_defaults(run=_simulate)

    costs = verbs.add_parser("costs", help="cost models that come with the package: measured or estimated, from what")
    costs.add_argument("name", nargs="?", help="print this one as JSON, to start your own file from")
    costs.set_defaults(run=_costs)

    checked = verbs.add_parser("check", help="can this model be trained? Its config, and a tiny instance of it")
    checked.add_argument("model", help="name on the hub, folder, or config.json; no weights are loaded")
    checked.add_argument("--max-degree", type=int, default=64, help="largest degree to look at; default: 64")
    checked.add_argument("--ranks", type=int, default=8, help="ranks over which weights are sharded; default: 8")
    checked.add_argument("--memory-gib", type=float, default=80.0, help="memory of a card, in GiB; default: 80")
    checked.add_argument("--json", action="store_true", help="print it as JSON (hf-hetero-check/1)")
    checked.set_defaults(run=_check)

    _add_estimate(verbs)
    add_profile(verbs)
    add_recipes(verbs)
    add_advise(verbs)

    report = verbs.add_parser("report", help="draw a run, finished or not, from its plans.jsonl")
    report.add_argument("records", help="plans.jsonl of a run with PlanMetricsCallback(record=True), or its folder")
    report.add_argument("--cost", help="cost model to compare with static runs by; default: what the run noted")
    report.add_argument("-o", "--output", help="default: report.html beside the records")
    report.set_defaults(run=_report)
    return parser


def _add_estimate(verbs: Any) -> None:
    """Add the verb `estimate`."""
    estimated = verbs.add_parser("estimate", help="what a model would cost on GPUs that one does not have")
    estimated.add_argument("model", help="name on the hub, folder, or config.json; no weights are loaded")
    estimated.add_argument("--gpus", required=True, help="such as 8xH100, or 2x8xH100 for two nodes of eight")
    add_setting(estimated)
    estimated.add_argument("-o", "--output", metavar="FILE", help="write the cost model (hf-hetero-cost/1)")
    estimated.set_defaults(run=_estimate)


def _add_machine(verb: argparse.ArgumentParser) -> None:
    """Add the arguments that say on which machine to plan, and how."""
    verb.add_argument(
        "--cost", required=True, help="cost model: a file (hf-hetero-cost/1) or a name that `costs` lists"
    )
    verb.add_argument("--ranks", type=int, required=True, help="number of ranks")
    verb.add_argument("--max-degree", type=int, help="most ranks that may share one sample")
    verb.add_argument(
        "--solver",
        default="auto",
        choices=SOLVERS,
        help="mip takes seconds for each batch, to improve the plan and its bound; auto and fast take milliseconds",
    )
    verb.add_argument(
        "--methods",
        nargs="+",
        default=list(DEFAULT_METHODS),
        choices=METHODS,
        metavar="METHOD",
        help="how attention may cross the ranks of a group, where the cost model knows: "
        f"{', '.join(METHODS)}; default: all but token_ring",
    )
    verb.add_argument(
        "--prove",
        type=float,
        metavar="SECONDS",
        help="take so long for each batch, to improve its plan and to prove how far from optimal that is at most",
    )
    verb.add_argument("--mip-backend", default="highs", choices=MIP_BACKENDS, help="solves the integer programs")


if __name__ == "__main__":
    sys.exit(main())
