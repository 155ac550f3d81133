"""Laws of the door to the solvers."""

from __future__ import annotations

import math

import pytest

from hf_hetero.errors import HeteroError
from hf_hetero.planner.improve.program import Backend, Program

mip = pytest.importorskip("mip")

BACKENDS = pytest.mark.parametrize("backend", ["highs", "cbc"])


def textbook(backend: Backend, integer: bool) -> Program:
    """Maximise 5x + 4y with 6x + 4y <= 24 and x + 2y <= 6: (3, 1.5) as fractions, (4, 0) in whole numbers."""
    program = Program(backend)
    x, y = (program.column(cost=cost, integer=integer) for cost in (-5.0, -4.0))
    program.at_most([(x, 6.0), (y, 3.0), (y, 1.0)], 24.0)  # terms of the same column add up
    program.at_most([(x, 1.0), (y, 2.0)], 6.0)
    return program


@BACKENDS
def test_fractions_and_whole_numbers(backend: Backend) -> None:
    """Both solvers find the solution and prove it."""
    for integer, values, best in ((False, [3, 1.5], -21), (True, [4, 0], -20)):
        answer = textbook(backend, integer).solve(10.0)
        assert answer.values == pytest.approx(values)
        assert answer.bound == pytest.approx(best)


@BACKENDS
def test_no_solution(backend: Backend) -> None:
    """Rows that contradict each other give no values, and a bound that says so."""
    program = Program(backend)
    x = program.column(cost=1.0, upper=1.0, integer=True)
    program.equal([(x, 1.0)], 2.0)
    answer = program.solve(10.0)
    assert answer.values is None
    assert answer.bound == math.inf


def test_a_start_is_a_solution_already() -> None:
    """With no time to search, the known solution is there."""
    program = textbook("highs", integer=True)
    answer = program.solve(10.0, {0: 4.0, 1: 0.0})
    assert answer.values == pytest.approx([4, 0])


def test_missing_solver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without the library learns what to install."""

    def missing(**_: object) -> None:
        raise FileNotFoundError("HiGHS not found.")

    monkeypatch.setattr(mip, "Model", missing)
    with pytest.raises(HeteroError, match=r"'highs' cannot be loaded .*highsbox"):
        Program("highs")


def test_a_solver_that_fails_has_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers on which a solver gives up cost its answer, not the plan."""
    program = textbook("highs", integer=True)

    def gives_up(max_seconds: float) -> None:
        raise mip.exceptions.InterfacingError("Unknown error in call to HiGHS.")

    monkeypatch.setattr(program._model, "optimize", gives_up)
    answer = program.solve(1.0)
    assert (answer.values, answer.bound) == (None, -math.inf)
