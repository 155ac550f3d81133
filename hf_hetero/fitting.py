"""A user's model fitted for planned steps, and given back as it was.

What is set: the attention that crosses ranks, rotary tables that follow each sample, a loss that stays in fp64 where
weights are, an output embedding that does without whole logits. None of it touches a weight.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_hetero import lm_head, loss
from hf_hetero.attention import interface, kernels
from hf_hetero.attention.rotary import TablesBySample
from hf_hetero.checks.exactness import base_model
from hf_hetero.expert_load import ExpertLoad
from hf_hetero.lm_head import LeanHead

logger = logging.getLogger(__name__)


class Fitted:
    """A model while planned steps run on it.

    Args:
        model: of transformers, wrapped by peft or not.
        args: device and kernels.
        dtype: what attention computes in.
        chunked_loss: let logits be lazy in training.

    Attributes:
        kernel: what computes attention on one rank.
        head: its output embedding, if it can do without whole logits.
        experts: how evenly they are used; false where there are none.
    """

    def __init__(
        self, model: torch.nn.Module | None, args: TrainingArguments, dtype: torch.dtype, chunked_loss: bool
    ) -> None:
        base = base_model(model)
        self.model = base
        self.kernel = choose_kernel(base, args.device.type, dtype)
        self._undone = ExitStack()
        interface.register()
        self._undone.callback(_give_back_attention, base, base.config._attn_implementation)
        base.set_attn_implementation(interface.ATTENTION_NAME)
        self._undone.callback(TablesBySample(base).remove)
        loss.install(base, ForCausalLMLoss)
        self._undone.callback(loss.uninstall, base)
        self.head = self._set_head() if chunked_loss else None
        self.experts = ExpertLoad(base)
        logger.info("Attention %r with kernel %r.", interface.ATTENTION_NAME, self.kernel.name)

    def _set_head(self) -> LeanHead | None:
        head = lm_head.install(self.model)
        if isinstance(head, str):
            logger.warning("Whole logits are computed for the loss: %s.", head)
            return None
        self._undone.callback(lm_head.uninstall, self.model)
        return head

    def give_back(self) -> None:
        """The model as it was."""
        self._undone.close()


def choose_kernel(base: Any, device_type: str, dtype: torch.dtype) -> kernels.Kernel:
    """What computes this model's attention on one rank.

    Raises:
        HeteroError: no kernel can.
    """
    asked = base.config._attn_implementation
    return kernels.choose_kernel(device_type, dtype, kernels.features_of(base.config), asked)


def _give_back_attention(base: Any, name: str) -> None:
    base.set_attn_implementation(name)
