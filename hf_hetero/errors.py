"""This module defines everything that hf_hetero raises on purpose.

    HeteroError                     catches all of them
    |-- ConfigError                 a setting or a file that cannot be what was meant   (also a ValueError)
    |-- BadSample                   a sample that cannot be trained on                  (also a ValueError)
    |-- InfeasibleBatch             a sample that no group of ranks can hold            (also a ValueError)
    |-- UnsupportedModel            a model or option whose learning the plan would change
    |-- PlanMismatch                ranks that hold different plans for one step
    `-- CollectiveFailed            a group operation that failed or waited too long

Every message names the offending value and the remedy.
"""

from __future__ import annotations


class HeteroError(Exception):
    """`HeteroError` is the base of all errors of hf_hetero."""

    is_known_to_all = False
    """Whether every rank raises it, in the same words; nobody needs to be told of it any more."""


class ConfigError(HeteroError, ValueError):
    """A `ConfigError` tells of a setting or a file that cannot be what was meant."""


class BadSample(HeteroError, ValueError):
    """A `BadSample` cannot be trained on: it has no tokens, or labels that do not match them."""


class InfeasibleBatch(HeteroError, ValueError):
    """An `InfeasibleBatch` has a sample that no group of ranks can hold."""


class UnsupportedModel(HeteroError):
    """An `UnsupportedModel` is a model, or a training option, under which the plan would change the learning."""


class PlanMismatch(HeteroError):
    """A `PlanMismatch` tells that ranks hold different plans for the same step."""


class CollectiveFailed(HeteroError):
    """A `CollectiveFailed` tells that an operation of a group of ranks failed, or waited longer than its timeout."""
