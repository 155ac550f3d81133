"""What a planned run sets up before its first step: attention, head, cost model, groups, planners."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, default_data_collator
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_hetero import exactness, lm_head, sharding
from hf_hetero.activations import Activations
from hf_hetero.attention import interface, kernels
from hf_hetero.attention.context import AttentionContext
from hf_hetero.callbacks import PlanMetricsCallback, StepReportCallback
from hf_hetero.collators import PackedCollator
from hf_hetero.config import HeteroConfig
from hf_hetero.cost_model import CostModel
from hf_hetero.expert_load import ExpertLoad
from hf_hetero.groups import GroupPool
from hf_hetero.lm_head import LeanHead
from hf_hetero.loss import token_loss
from hf_hetero.machine import Machine, set_up
from hf_hetero.plan_ahead import PlanSource
from hf_hetero.planning import Planners
from hf_hetero.step import RankMicroBatch

logger = logging.getLogger(__name__)


class PreparedTrainer(Trainer):
    """A Trainer whose model attends across ranks, with what it takes to plan. Its steps are still Trainer's."""

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *others: Any,
        hetero: HeteroConfig | None = None,
        **kwargs: Any,
    ) -> None:
        exactness.check_trainer_class(type(self))
        self.hetero = hetero or HeteroConfig()
        self._accumulation = 1
        if args is not None:
            exactness.check_arguments(args)
            self._accumulation = args.gradient_accumulation_steps
            args = copy.copy(args)
            args.gradient_accumulation_steps = 1
        super().__init__(model, args, *others, **kwargs)
        exactness.check_arguments(self.args)
        exactness.check_num_ranks(self.hetero.num_ranks, self.args.world_size)
        exactness.check_model(self)

        self._packer = self._make_packer()
        self._kernel = self._set_attention()
        self._experts = ExpertLoad(exactness.base_model(self.model))
        self._machine: Machine | None = None
        self._sharding = sharding.Sharding()
        self.cost_model: CostModel | None = None
        self._resumed_from: str | None = None
        if not any(isinstance(callback, PlanMetricsCallback) for callback in self._step_callbacks()):
            self.add_callback(PlanMetricsCallback())

    def _make_packer(self) -> PackedCollator:
        collator: Any = self.data_collator
        if isinstance(collator, PackedCollator):
            return collator
        if collator is default_data_collator or type(collator) is DataCollatorWithPadding:
            pad = getattr(self.processing_class, "pad_token_id", None)
            self.data_collator = PackedCollator(pad_token_id=pad if pad is not None else 0)
            return self.data_collator
        # theirs keeps serving evaluation; in training it makes the labels of one sample at a time
        return PackedCollator(example_collator=collator)

    def _set_attention(self) -> kernels.Kernel:
        base: Any = exactness.base_model(self.model)
        kernel = kernels.choose_kernel(
            self.args.device.type,
            self._compute_dtype(),
            kernels.features_of(base.config),
            base.config._attn_implementation,
        )
        interface.register()
        base.set_attn_implementation(interface.ATTENTION_NAME)
        if base.loss_function is ForCausalLMLoss:
            base.loss_function = token_loss
        self._head = self._set_head(base)
        logger.info("Attention %r with kernel %r.", interface.ATTENTION_NAME, kernel.name)
        return kernel

    def _set_head(self, base: Any) -> LeanHead | None:
        """Its output embedding, if it can do without whole logits."""
        if not self.hetero.chunked_loss or self.args.use_liger_kernel or self.args.torch_compile:
            return None  # Liger brings a loss of its own; a compiler sees through no lazy tensor
        head = lm_head.install(base)
        if isinstance(head, LeanHead):
            return head
        logger.warning("Whole logits are computed for the loss: %s.", head)
        return None

    def _compute_dtype(self) -> torch.dtype:
        if self.args.bf16 or self.args.fp16:
            return torch.bfloat16 if self.args.bf16 else torch.float16
        return exactness.base_model(self.model).dtype

    def _set_up_planning(self) -> Machine:
        """Made when it is first needed, and kept for later runs; but a checkpoint brings its own cost model."""
        if self._machine is not None and not self._machine.serves(self._resumed_from):
            self._machine.groups.close()
            self._machine = None
        if self._machine is None:
            assert isinstance(self.model, torch.nn.Module)
            self._sharding = sharding.sharding_of(self, self.hetero.sync_each_micro_batch)
            self._activations = Activations(
                exactness.base_model(self.model),
                recomputes=self._sharding.checkpointing,
                in_chunks=self.hetero.chunked_mlp,
                compiled=self.args.torch_compile,
            )
            self._machine = set_up(
                self.model,
                self.args,
                self.hetero,
                self._compute_dtype(),
                self._sharding,
                self._activations,
                self._resumed_from,
            )
            self.cost_model = self._machine.cost_model
        return self._machine

    @property
    def groups(self) -> GroupPool:
        """Process groups of the run."""
        return self._set_up_planning().groups

    def _plan_source(self) -> PlanSource:
        return self._planners().for_training(reproducible=self.args.full_determinism)

    def _planners(self) -> Planners:
        methods = [m for m in self.hetero.methods if self._kernel.has_lse or not m.endswith("ring")]
        return Planners(self.hetero, self.args.world_size, self._cost_model_of_now, methods or ["ulysses"])

    def _cost_model_of_now(self) -> CostModel:
        assert self.cost_model is not None
        return self.cost_model

    def _context(self, micro_batch: RankMicroBatch, index: int) -> AttentionContext:
        group = micro_batch.group
        rank = self.args.process_index if self.args.world_size > 1 else 0
        inner = micro_batch.layout.inner
        first = rank - rank % inner
        num_tokens = micro_batch.inputs["input_ids"].shape[1]
        hidden = exactness.base_model(self.model).config.get_text_config().hidden_size
        recomputed = self._activations.recomputed(group.activations) and torch.is_grad_enabled()
        policy = group.activations if recomputed else None
        return AttentionContext(
            micro_batch.layout,
            group.ranks,
            rank,
            self.groups.get(group.ranks),
            group.method,
            self._kernel,
            self.args.device,
            step=self.state.global_step + 1,
            micro_batch=index,
            inner_group=self.groups.get(tuple(range(first, first + inner))),
            keeps=self.hetero.keep_exchanged and recomputed,
            store=self._activations.store(policy, self.args.device, num_tokens, hidden),
        )

    def _step_callbacks(self) -> list[StepReportCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, StepReportCallback)]
