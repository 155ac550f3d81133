"""This module says in words which model a cost model is for, so that it is noticed where it serves another one."""

from __future__ import annotations

import torch

from hf_hetero.estimate.model_shape import ModelShape


def subject_of(shape: ModelShape, model_type: str, dtype: torch.dtype) -> str:
    """Describe a model, and how it is trained, by all that decides its cost; the same words where the cost is the same.

    Args:
        shape: of the model.
        model_type: of its config.
        dtype: in which it computes.
    """
    beside = ", beside a reference" if shape.reference_passes else ""
    trained = "all" if shape.trainable_params == shape.num_params else f"{shape.trainable_params:,}"
    return (
        f"{model_type}, {shape.num_layers} layers of {shape.hidden}, heads {shape.heads}/{shape.kv_heads} of "
        f"{shape.head_dim}, MLP {shape.intermediate}, vocabulary {shape.vocab}, {shape.num_params:,} weights, "
        f"{trained} trained, {str(dtype).removeprefix('torch.')}{', layers recomputed' if shape.checkpointing else ''}"
        f"{beside}"
    )
