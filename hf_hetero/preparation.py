"""What a planned run sets up before its first step: the model's fitting, cost model, groups, planners."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, default_data_collator

from hf_hetero import exactness, overrides, own_loss, sharding
from hf_hetero.activations import Activations
from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.kernels import Kernel
from hf_hetero.callbacks import PlanMetricsCallback, StepReportCallback
from hf_hetero.collators import PackedCollator
from hf_hetero.collators.sample import Sample
from hf_hetero.collators.spans import pack_spans
from hf_hetero.config import HeteroConfig
from hf_hetero.cost_model import CostModel
from hf_hetero.errors import HeteroError
from hf_hetero.fitting import Fitted, choose_kernel
from hf_hetero.groups import GroupPool
from hf_hetero.layout import contiguous
from hf_hetero.limits import limits_of
from hf_hetero.logged_means import uncounted
from hf_hetero.machine import Machine, set_up
from hf_hetero.plan_ahead import PlanSource
from hf_hetero.planning import Planners
from hf_hetero.probe import check_untested
from hf_hetero.rows import PACKED_COLUMN
from hf_hetero.step import RankMicroBatch

logger = logging.getLogger(__name__)

PLANNED_INPUTS = frozenset(
    {"input_ids", "labels", "attention_mask", "position_ids", "label", "label_ids", PACKED_COLUMN}
)
"""What every batch of a causal language model has; of these, each plan makes its own."""
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}  # fp8 is for linear layers only


class PreparedTrainer(Trainer):
    """A Trainer that can fit its model for planned steps, with what it takes to plan. Its steps are still Trainer's."""

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *others: Any,
        hetero: HeteroConfig | None = None,
        **kwargs: Any,
    ) -> None:
        overrides.check(type(self))
        self.hetero = hetero or HeteroConfig()
        self._fitted: Fitted | None = None
        if args is not None:
            exactness.check_arguments(args)
        super().__init__(model, args, *others, **kwargs)
        exactness.check_arguments(self.args)
        exactness.check_num_ranks(self.hetero.num_ranks, self.args.world_size)
        exactness.check_model(self)
        if self.data_collator is default_data_collator:
            # transformers' takes rows of one length only
            self.data_collator = PackedCollator(makes_labels=False, says_so=True)
        choose_kernel(exactness.base_model(self.model), self.args.device.type, self._compute_dtype())
        self._tried: Any = None
        self._try_untested()

        self._machine: Machine | None = None
        self._num_running = 0
        self._sharding = sharding.Sharding()
        self.cost_model: CostModel | None = None
        self._resumed_from: str | None = None
        if not any(isinstance(callback, PlanMetricsCallback) for callback in self._step_callbacks()):
            self.add_callback(PlanMetricsCallback())

    def _try_untested(self) -> None:
        """A second's trial of a tiny instance, where nobody has compared such models yet; once for each model."""
        base = exactness.base_model(self.model)
        if exactness.is_tested(base) or (what := (type(base), base.config.to_dict())) == self._tried:
            return
        messengers = GroupPool((), self.hetero.group_timeout_s, self.args.ddp_timeout)
        try:
            check_untested(base, messengers.control)
        finally:
            messengers.close()
        self._tried = what

    # ------------------------------------------------------------------------------------------------- the model

    def _fit(self) -> bool:
        """Fit the model of now for planned steps; False if it is already.

        Raises:
            UnsupportedModel: the model, or a loss of one's own, is not exact under plans.
        """
        if self._fitted is not None:
            return False
        exactness.check_model(self)
        self._try_untested()
        # Liger brings a loss of its own; a compiler sees through no lazy tensor
        chunked = self.hetero.chunked_loss and not self.args.use_liger_kernel and not self.args.torch_compile
        self._fitted = Fitted(self.model, self.args, self._dtype_of_now(), chunked)
        try:
            self._check_own_loss()
            self._sharding = sharding.sharding_of(self, self.hetero.sync_each_micro_batch)
            self._activations = Activations(
                self._fitted.model,
                recomputes=self._sharding.checkpointing,
                in_chunks=self.hetero.chunked_mlp,
                compiled=self.args.torch_compile,
            )
        except BaseException:
            self._give_back()
            raise
        return True

    def _give_back(self) -> None:
        """The user's model as it was."""
        if self._fitted is not None:
            self._fitted.give_back()
        self._fitted = None

    @property
    def _kernel(self) -> Kernel:
        assert self._fitted is not None
        return self._fitted.kernel

    def _counts_first_label(self) -> bool:
        """Trainer divides by all labels where it does not know that the model's loss shifts them: GPT-2, for one."""
        masks_first = getattr(self, "padding_free", False)  # TRL's collator does
        return not getattr(self, "_loss_shifts_labels", True) and not masks_first

    def _compute_dtype(self) -> torch.dtype:
        """What attention computes in, whoever asked for it: the arguments or the launcher."""
        own: torch.dtype = exactness.base_model(self.model).dtype
        return AUTOCAST.get(self.accelerator.mixed_precision, own)

    def _dtype_of_now(self) -> torch.dtype:
        """The same, but outside of training evaluation may be in half precision altogether."""
        if not self.is_in_train and (self.args.fp16_full_eval or self.args.bf16_full_eval):
            return torch.float16 if self.args.fp16_full_eval else torch.bfloat16
        return self._compute_dtype()

    # ------------------------------------------------------------------------------------------ tensors and loss

    def _make_packer(self) -> PackedCollator:
        """Packs as the trainer's collator of now makes rows."""
        collator: Any = self.data_collator
        if isinstance(collator, PackedCollator):
            return collator
        if type(collator) is DataCollatorWithPadding:  # transformers' choice where there is a tokenizer
            pad = getattr(self.processing_class, "pad_token_id", None)
            return PackedCollator(pad_token_id=pad if pad is not None else 0, makes_labels=False, says_so=True)
        # theirs keeps serving stock batches; here it makes the labels of one sample at a time
        return PackedCollator(example_collator=collator, makes_labels=False)

    def _packer(self, needs_labels: bool) -> PackedCollator:
        self._set_signature_columns_if_needed()
        taken = frozenset(self._signature_columns or ())
        packer = self._make_packer()
        return replace(
            packer,
            makes_labels=packer.makes_labels or (needs_labels and packer.says_so),
            needs_labels=needs_labels,
            model_inputs=taken - PLANNED_INPUTS,
            columns=taken if self.args.remove_unused_columns else None,
            keeps_labels_unshifted=bool(self._own_loss()),
            limits=limits_of(exactness.base_model(self.model)),
            counts_first_label=self._counts_first_label(),
        )

    def _own_loss(self) -> str:
        """Whose loss stands in the place of the model's; "" where none does."""
        named = [f"{owner}.{name}" for name, owner in overrides.own(self, overrides.LOSS).items()]
        return " and ".join([*named, *(["compute_loss_func"] if self.compute_loss_func is not None else [])])

    def _check_own_loss(self) -> None:
        what, base = self._own_loss(), exactness.base_model(self.model)
        if not what:
            return
        has_methods = bool(overrides.own(self, overrides.LOSS))

        def compute(model: torch.nn.Module, inputs: dict[str, Any], total: torch.Tensor) -> torch.Tensor:
            if has_methods:
                inputs = self._prepare_inputs(inputs)
                return self.compute_loss(model, inputs, num_items_in_batch=total)  # pyright: ignore
            inputs = super(PreparedTrainer, self)._prepare_inputs(inputs)
            labels = inputs.pop("labels")
            assert self.compute_loss_func is not None
            return self.compute_loss_func(model(**inputs), labels, num_items_in_batch=total)

        with uncounted(self):
            own_loss.check(compute, self._tiny_pack, base.config, self.args.device, what)

    def _tiny_pack(self, numbers: Sequence[int]) -> dict[str, Any]:
        ids = [torch.arange(3, 3 + own_loss.TOKENS), torch.arange(11, 11 + own_loss.TOKENS)]
        most = exactness.base_model(self.model).config.get_text_config().vocab_size
        samples = [Sample(ids[number] % most, ids[number] % most) for number in numbers]
        layout = contiguous([own_loss.TOKENS] * len(samples), 1)
        context = AttentionContext(layout, (0,), 0, None, "ulysses", self._kernel, self.args.device)
        return {**pack_spans(layout.spans[0], samples, unshifted=True), "hetero": context}

    # -------------------------------------------------------------------------------------------------- planning

    def _set_up_planning(self) -> Machine:
        """Made when it is first needed, and kept for later runs; but a checkpoint brings its own cost model.

        The groups are open afterwards. A collective of all ranks where they were not.
        """
        if self._machine is not None and not self._machine.serves(self._resumed_from):
            self._machine.groups.close()
            self._machine = None
        if self._machine is None:
            assert isinstance(self.model, torch.nn.Module)
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
        self._machine.groups.open()
        return self._machine

    @contextmanager
    def _running(self) -> Iterator[None]:
        """A run, or one within it: where the outermost ends, so do the groups. The next may be of another trainer.

        Groups are closed on all ranks or on none: after an error that others may not know of, they may be in them.
        """
        self._num_running += 1
        ends_everywhere = False
        try:
            yield
            ends_everywhere = True
        except HeteroError as error:
            ends_everywhere = error.is_known_to_all
            raise
        finally:
            self._num_running -= 1
            if ends_everywhere and not self._num_running and self._machine is not None:
                self._machine.groups.close()

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
            reaches=micro_batch.reaches,
            waits=self.groups.waits,
        )

    def _step_callbacks(self) -> list[StepReportCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, StepReportCallback)]
