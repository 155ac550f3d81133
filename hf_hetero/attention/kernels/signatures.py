"""Signatures tell, when a kernel is chosen, whether a library's function takes the call that each step makes of it.

Libraries rename and add arguments between versions. A function that does not take the call is then left alone, or
named in an error, before the first step; not met by a `TypeError` in the middle of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any


def misfit(function: Any, call: Mapping[str, Any]) -> str | None:
    """Return in words why a function does not take these keywords; None if it does.

    Args:
        function: a Python function, or an operator of torch.library, whose schema is its signature.
        call: keywords; their values do not matter.
    """
    try:
        signature_of(function).bind(**call)
    except (TypeError, ValueError) as error:  # ValueError: it has no signature, as some functions of extensions
        return str(error)
    return None


def signature_of(function: Any) -> inspect.Signature:
    """Return the signature of a function, or of an operator of torch.library.

    Raises:
        TypeError: it cannot be called.
        ValueError: it has no signature.
    """
    schema = schema_of(function)
    if schema is None:
        return inspect.signature(function)
    return inspect.Signature(
        [
            inspect.Parameter(
                argument.name,
                inspect.Parameter.KEYWORD_ONLY if argument.kwarg_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=argument.default_value if argument.has_default_value() else inspect.Parameter.empty,
            )
            for argument in schema.arguments
        ]
    )


def schema_of(function: Any) -> Any:
    """Return the schema of an operator, or of what `torch.library.custom_op` makes; None of another function."""
    return getattr(getattr(function, "_opoverload", function), "_schema", None)
