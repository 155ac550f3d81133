"""Mixed-integer linear programs: the one place that imports `mip`, and the choice between its solvers."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from hf_hetero.config import Backend
from hf_hetero.errors import HeteroError

Terms = Iterable[tuple[int, float]]
TOLERANCE = 1 - 1e-5
"""What is left of a solver's bound when it satisfies rows to 1e-6 only."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a solver found within its limit.

    Args:
        values: of the columns, by number; None where no solution was found.
        bound: no solution's objective is below it; -inf where the solver cannot say, inf where there is no solution.
    """

    values: list[float] | None
    bound: float


def is_installed() -> bool:
    """Whether integer programs can be solved here."""
    return importlib.util.find_spec("mip") is not None


class Program:
    """Minimise the sum of the columns' costs under rows; one thread, one seed.

    Args:
        backend: "highs" or "cbc".

    Raises:
        HeteroError: the solver, or `mip` itself, is not installed.
    """

    def __init__(self, backend: Backend = "highs") -> None:
        try:
            import mip as untyped  # here, so that the planner works where the solver is not installed
        except ImportError as error:
            raise HeteroError(
                f"Integer programs need the package 'mip' ({error}). Install it, with highsbox, or plan with "
                "solver='fast'."
            ) from error
        self._mip = cast("Any", untyped)  # its hints ask for `Real`, which int and float are not to a type checker
        try:
            self._model = self._mip.Model(sense="MIN", solver_name={"highs": "HiGHS", "cbc": "CBC"}[backend])
        except (FileNotFoundError, NameError) as error:  # what mip raises for a missing library
            raise HeteroError(
                f"The solver {backend!r} cannot be loaded ({error}). Install the package "
                f"{'highsbox' if backend == 'highs' else 'cbcbox'}, or plan with solver='fast'."
            ) from error
        self._model.verbose, self._model.threads, self._model.seed = 0, 1, 0
        if backend == "highs":
            # The presolve of HiGHS 1.15 removes optimal solutions now and then (as 1.7 and 1.14 did, its issues 1725
            # and 2995), and calls the next best one optimal. `mip` has no public switch for it.
            self._model.solver._set_string_option_value("presolve", "off")
        self._columns: list[Any] = []
        self._integer = False

    def column(self, cost: float = 0.0, lower: float = 0.0, upper: float = math.inf, integer: bool = False) -> int:
        """A new column; returns its number."""
        kind = self._mip.INTEGER if integer else self._mip.CONTINUOUS
        self._columns.append(self._model.add_var(lb=lower, ub=upper, obj=cost, var_type=kind))
        self._integer = self._integer or integer
        return len(self._columns) - 1

    def at_most(self, terms: Terms, limit: float) -> None:
        """A row: the sum of column times number is at most the limit."""
        self._add(terms, limit, self._mip.LESS_OR_EQUAL)

    def equal(self, terms: Terms, value: float) -> None:
        """A row: the sum of column times number is this value."""
        self._add(terms, value, self._mip.EQUAL)

    def _add(self, terms: Terms, value: float, sense: str) -> None:
        total: dict[int, float] = {}
        for column, number in terms:
            total[column] = total.get(column, 0.0) + number
        variables = [self._columns[column] for column in total]
        self._model += self._mip.LinExpr(variables, list(total.values()), -value, sense)

    def solve(self, time_limit_s: float, start: Mapping[int, float] | None = None) -> Answer:
        """Solve within so many wall seconds.

        Args:
            start: a known solution by column; 0 where absent.
        """
        if start is not None:
            self._model.start = [(self._columns[column], value) for column, value in start.items()]
        try:
            status = self._model.optimize(max_seconds=time_limit_s)
        except self._mip.exceptions.MipBaseException:  # numbers that the solver cannot work with
            return Answer(None, -math.inf)
        values = [float(column.x) for column in self._columns] if self._model.num_solutions else None
        if status in (self._mip.OptimizationStatus.INFEASIBLE, self._mip.OptimizationStatus.INT_INFEASIBLE):
            return Answer(None, math.inf)
        if self._integer:
            bound = self._model.objective_bound
        else:
            bound = self._model.objective_value if status == self._mip.OptimizationStatus.OPTIMAL else None
        return Answer(values, -math.inf if bound is None or not math.isfinite(bound) else float(bound))
