"""hf-hetero: the command line. One function a verb; it only formats what the library returns.

hf-hetero plan LENGTHS --cost COST.json --ranks N           plan one global batch: table, --json, --plot
hf-hetero simulate LENGTHS --cost COST.json --ranks N --batch-size K [--steps T]    compare ways to share many
hf-hetero report plans.jsonl                                picture of a finished run
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_hetero.cost_model import CostModel
from hf_hetero.errors import BadSample, HeteroError
from hf_hetero.plan import Plan, describe_groups
from hf_hetero.planner import Planner
from hf_hetero.simulate import simulate


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; 0 on success, 1 with one line on stderr if something is wrong with what was given."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except HeteroError as error:
        print(f"hf-hetero: {error}", file=sys.stderr)
        return 1
    return 0


def read_numbers(path: str) -> list[int]:
    """Lengths from a text file, one a line; empty lines are left out.

    Raises:
        BadSample: no such file, or a line that is not a whole number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BadSample(f"Cannot read the lengths {path!r}: {error.strerror}.") from error
    numbers: list[int] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                numbers.append(int(line))
            except ValueError:
                raise BadSample(f"{path}, line {number}: {line.strip()!r} is not a whole number of tokens.") from None
    return numbers


def _plan(args: argparse.Namespace) -> None:
    lengths = read_numbers(args.lengths)
    cost = CostModel.load(args.cost)
    plan = Planner(cost, num_ranks=args.ranks, max_degree=args.max_degree, solver=args.solver).plan(lengths)
    if args.plot:
        from hf_hetero.report import draw_plan

        draw_plan(plan, lengths, cost, args.plot)
    print(json.dumps(plan.to_dict()) if args.json else plan_table(plan, lengths, cost))


def plan_table(plan: Plan, lengths: Sequence[int], cost: CostModel) -> str:
    """A plan for people: a line a micro-batch, then what it comes to."""
    rows: list[str] = []
    for number, micro_batch in enumerate(plan.micro_batches):
        seconds = [cost.group_seconds(group, lengths) for group in micro_batch.groups]
        tokens = sum(lengths[sample] for group in micro_batch.groups for sample in group.samples)
        samples = sum(len(group.samples) for group in micro_batch.groups)
        degrees = describe_groups(micro_batch)
        rows.append(f"{number:>11}  {degrees:<24}  {samples:>7,}  {tokens:>11,}  {max(seconds):>8.3f}")
    head = f"{'micro-batch':>11}  {'degrees':<24}  {'samples':>7}  {'tokens':>11}  {'seconds':>8}"
    total = (
        f"{plan.seconds:.3f} s predicted, within {plan.gap:.1%} of optimal "
        f"(no plan is faster than {plan.lower_bound_s:.3f} s); {plan.solver}, {1000 * plan.planning_s:.1f} ms"
    )
    return "\n".join([head, *rows, total])


def _simulate(args: argparse.Namespace) -> None:
    from tqdm.auto import tqdm

    lengths, cost = read_numbers(args.lengths), CostModel.load(args.cost)
    if args.batch_size < 1 or (args.steps is not None and args.steps < 1):
        raise BadSample(f"--batch-size {args.batch_size} --steps {args.steps}: both must be at least 1.")
    random.Random(args.seed).shuffle(lengths)
    full = [lengths[i : i + args.batch_size] for i in range(0, len(lengths), args.batch_size)][: args.steps]
    result = simulate(
        full, cost, args.ranks, args.solver, lambda batches: tqdm(batches, desc="Planning", unit=" steps", leave=False)
    ).to_dict()
    print(json.dumps(result) if args.json else simulation_table(result))


def simulation_table(result: Mapping[str, Any]) -> str:
    """A simulation for people: a line a way, then what it comes to."""
    head = f"{'way':<13}{'s a step':>10}{'adaptive is':>13}{'to bound':>10}{'micro-batches':>15}{'idle':>7}"
    rows: list[str] = []
    for name, way in result["ways"].items():
        rows.append(
            f"{name:<13}{way['seconds'] / result['num_steps']:>10.3f}{way['speedup_of_adaptive']:>12.2f}x"
            f"{way['ratio_to_bound']:>10.3f}{way['micro_batches'] / result['num_steps']:>15.1f}"
            f"{way['idle_share']:>7.0%}  {way['note']}".rstrip()
        )
    planning = sorted(result["planning_s"])
    total = (
        f"{result['num_steps']} steps of {result['num_samples'] // result['num_steps']} samples on "
        f"{result['num_ranks']} ranks; planning {1000 * planning[len(planning) // 2]:.1f} ms a step, "
        f"{1000 * planning[-1]:.1f} ms at worst. Seconds are predicted by the cost model."
    )
    return "\n".join([head, *rows, total])


def _report(args: argparse.Namespace) -> None:
    from hf_hetero.report import read_records, write_report

    output = args.output or str(Path(args.records).with_name("report.html"))
    write_report(read_records(args.records), output)
    print(f"Wrote {output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-hetero", description="Plan long-tailed batches over groups of ranks.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    plan = verbs.add_parser("plan", help="plan one global batch; needs no GPU and no model")
    plan.add_argument("lengths", help="text file with the tokens of each sample, one a line")
    plan.add_argument("--cost", required=True, help="cost model (hf-hetero-cost/1)")
    plan.add_argument("--ranks", type=int, required=True, help="number of ranks")
    plan.add_argument("--max-degree", type=int, help="most ranks that may share one sample")
    plan.add_argument("--solver", default="auto", choices=("auto", "fast", "mip"))
    plan.add_argument("--json", action="store_true", help="print the plan as JSON (hf-hetero-plan/1)")
    plan.add_argument("--plot", help="draw the plan into this .svg or .png")
    plan.set_defaults(run=_plan)

    simulated = verbs.add_parser("simulate", help="compare ways to share many batches; needs no GPU and no model")
    simulated.add_argument("lengths", help="text file with the tokens of each sample, one a line")
    simulated.add_argument("--cost", required=True, help="cost model (hf-hetero-cost/1)")
    simulated.add_argument("--ranks", type=int, required=True, help="number of ranks")
    simulated.add_argument("--batch-size", type=int, required=True, help="samples of a step, over all ranks")
    simulated.add_argument("--steps", type=int, help="steps to simulate; default: as many as there are samples for")
    simulated.add_argument("--seed", type=int, default=0, help="of the shuffle")
    simulated.add_argument("--solver", default="auto", choices=("auto", "fast", "mip"))
    simulated.add_argument("--json", action="store_true", help="print the totals as JSON")
    simulated.set_defaults(run=_simulate)

    report = verbs.add_parser("report", help="draw a finished run from its plans.jsonl")
    report.add_argument("records", help="plans.jsonl of a run with PlanMetricsCallback(record=True)")
    report.add_argument("-o", "--output", help="default: report.html beside the records")
    report.set_defaults(run=_report)
    return parser


if __name__ == "__main__":
    sys.exit(main())
