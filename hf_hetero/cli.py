"""hf-hetero: the command line. One function a verb; it only formats what the library returns.

hf-hetero plan LENGTHS --cost COST.json --ranks N [--json] [--plot OUT.svg]    plan one global batch
hf-hetero report plans.jsonl -o report.html                                    picture of a finished run
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_hetero.cost_model import CostModel
from hf_hetero.errors import BadSample, HeteroError
from hf_hetero.plan import Plan, describe_groups
from hf_hetero.planner import Planner


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

    report = verbs.add_parser("report", help="draw a finished run from its plans.jsonl")
    report.add_argument("records", help="plans.jsonl of a run with PlanMetricsCallback(record=True)")
    report.add_argument("-o", "--output", help="default: report.html beside the records")
    report.set_defaults(run=_report)
    return parser


if __name__ == "__main__":
    sys.exit(main())
