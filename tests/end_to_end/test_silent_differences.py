"""What a script may do that would be learned otherwise without a word: the outcome is Trainer's, or it is refused.

Steps have one to four micro-batches here, which no cost model would choose for so few tokens.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from behaviours import make, pad, rows, trained
from conformance import Behaviour, Table, compare, learned, subclass
from helpers import ScriptedTrainer, tiny_model
from torch.nn.functional import pad as fill
from torch.utils.data import DataLoader, WeightedRandomSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LabelSmoother

behaviour = Table()


class Here(ScriptedTrainer):
    """Plans evaluations as it plans training."""

    def _planners(self) -> Any:
        return SimpleNamespace(for_evaluation=self._plan_source)


# ------------------------------------------------------------------------------------------------------------- steps


@behaviour()
def rows_drawn_again_and_again(kind: Any, folder: str) -> Any:
    def sampler(self: Any, data: Any = None) -> Any:
        return WeightedRandomSampler([1.0, 2.0, 3.0], 24, generator=torch.Generator().manual_seed(3))

    own = subclass(kind, _get_train_sampler=sampler)
    return trained(own, folder, rows(3), gradient_accumulation_steps=3, num_train_epochs=2)


@behaviour("changed while training")
def accumulation_changed_by_a_callback(kind: Any, folder: str) -> Any:
    class More(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            args.gradient_accumulation_steps = 1 + state.global_step // 2

    return trained(kind, folder, callbacks=[More()])


@behaviour("label_smoother")
def label_smoother_set_later(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder)
    trainer.label_smoother = LabelSmoother(epsilon=0.1)
    trainer.train()
    return learned(trainer)


@behaviour("neftune_noise_alpha")
def noise_set_later(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder)
    trainer.neftune_noise_alpha = 5.0
    trainer.train()
    return learned(trainer)


@behaviour("average_tokens_across_devices")
def argument_set_later(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder)
    trainer.args.average_tokens_across_devices = False
    trainer.train()
    return learned(trainer)


# ----------------------------------------------------------------------------------------------------------- loaders


@behaviour("_get_dataloader is its own")
def own_dataloader(kind: Any, folder: str) -> Any:
    def dataloader(self: Any, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return DataLoader(dataset[::-1], batch_size=4, collate_fn=self.data_collator)

    return trained(subclass(kind, _get_dataloader=dataloader), folder)


@behaviour("_get_collator_with_removed_columns is its own")
def own_collator_of_columns(kind: Any, folder: str) -> Any:
    def collator(self: Any, inner: Any, description: Any = None) -> Any:
        def collate(examples: list[Any]) -> Any:
            batch = inner(examples)
            return {**batch, "labels": batch["labels"].where(batch["labels"] % 3 != 0, -100)}

        return collate

    return trained(subclass(kind, _get_collator_with_removed_columns=collator), folder)


@behaviour()
def targets_made_by_the_collator(kind: Any, folder: str) -> Any:
    def collate(examples: list[Any]) -> Any:
        batch = pad(examples)
        targets = fill(batch["labels"], (0, 1), value=-100)[:, 1:]
        return {**batch, "shift_labels": targets.where(targets % 2 == 0, -100)}

    return trained(kind, folder, data_collator=collate, gradient_accumulation_steps=2)


@behaviour("makes 3 rows of 4")
def collator_that_leaves_rows_out(kind: Any, folder: str) -> Any:
    return trained(kind, folder, data_collator=lambda examples: pad(examples[:3]))


@behaviour("which it makes of it alone")
def collator_that_cuts_to_the_shortest(kind: Any, folder: str) -> Any:
    def collate(examples: list[Any]) -> Any:
        shortest = min(len(example["input_ids"]) for example in examples)
        return pad([{name: values[:shortest] for name, values in example.items()} for example in examples])

    return trained(kind, folder, data_collator=collate)


@behaviour("makes 1 rows of 4")
def collator_that_joins_rows(kind: Any, folder: str) -> Any:
    def collate(examples: list[Any]) -> Any:
        ids = torch.tensor([[token for example in examples for token in example["input_ids"]]])
        return {"input_ids": ids, "labels": ids.clone()}

    return trained(kind, folder, data_collator=collate)


# ------------------------------------------------------------------------------------------------------------- hooks


@behaviour()
def gradients_halved_by_hooks(kind: Any, folder: str) -> Any:
    model = tiny_model()
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient / 2)
    return trained(kind, folder, model=model)


@behaviour("adds up otherwise")
def gradients_clipped_by_hooks(kind: Any, folder: str) -> Any:
    model = tiny_model()
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    return trained(kind, folder, model=model)


@behaviour("register_post_accumulate_grad_hook")
def step_taken_by_hooks(kind: Any, folder: str) -> Any:
    model = tiny_model()

    def step(parameter: Any) -> None:
        parameter.data -= 0.1 * parameter.grad
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    return trained(kind, folder, model=model)


# ------------------------------------------------------------------------------------------------------------- parts


class Mixed(torch.nn.Module):
    """Adds the token before to each token's output, as some papers do; across samples, where they are packed."""

    def __init__(self, inner: Any, mixes: bool = True) -> None:
        super().__init__()
        self.inner, self.mixes = inner, mixes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + (fill(x, (0, 0, 1, 0))[:, :-1] if self.mixes else x)


@behaviour("layers.0.mlp")
def part_that_mixes_tokens(kind: Any, folder: str) -> Any:
    model = tiny_model()
    model.model.layers[0].mlp = Mixed(model.model.layers[0].mlp)
    return trained(kind, folder, model=model)


@behaviour()
def part_that_goes_by_token(kind: Any, folder: str) -> Any:
    model = tiny_model()
    model.model.layers[0].mlp = Mixed(model.model.layers[0].mlp, mixes=False)
    return trained(kind, folder, model=model)


@behaviour("layers.1.mlp")
def method_that_mixes_tokens(kind: Any, folder: str) -> Any:
    model = tiny_model()
    mlp = model.model.layers[1].mlp
    stock = mlp.forward
    mlp.forward = lambda x: stock(x) - x.cumsum(1)
    return trained(kind, folder, model=model)


@behaviour("layers.0.self_attn.o_proj")
def hook_that_mixes_tokens(kind: Any, folder: str) -> Any:
    model = tiny_model()
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda part, inputs, out: out - out.mean(1, True))
    return trained(kind, folder, model=model)


@behaviour()
def hook_that_only_looks(kind: Any, folder: str) -> Any:
    model = tiny_model()
    seen: list[int] = []
    model.model.layers[0].register_forward_hook(lambda part, inputs, out: seen.append(1))
    return trained(kind, folder, model=model), bool(seen)


class Normed(torch.nn.Module):
    """Takes mean and variance of all tokens of a batch."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.norm = inner, torch.nn.BatchNorm1d(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.inner(x).transpose(1, 2)).transpose(1, 2)


@behaviour("BatchNorm1d")
def statistics_of_a_batch(kind: Any, folder: str) -> Any:
    model = tiny_model()
    model.model.layers[0].mlp = Normed(model.model.layers[0].mlp)
    return trained(kind, folder, model=model)


@behaviour("spectral_norm")
def weights_that_change_in_each_pass(kind: Any, folder: str) -> Any:
    model = tiny_model()
    torch.nn.utils.parametrizations.spectral_norm(model.model.layers[0].mlp.up_proj)
    return trained(kind, folder, model=model)


# ---------------------------------------------------------------------------------------------------------- adapters


def adapted(kind: Any, folder: str, name: str, **changes: Any) -> Any:
    import peft

    config = getattr(peft, name)(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **changes)
    torch.manual_seed(0)
    return trained(kind, folder, model=peft.get_peft_model(tiny_model(), config))


@behaviour("ADALORA")
def adapter_with_a_term_of_its_own(kind: Any, folder: str) -> Any:
    return adapted(kind, folder, "AdaLoraConfig", total_step=20, init_r=6, target_r=2)


@behaviour("LILY")
def adapter_that_looks_at_the_batch(kind: Any, folder: str) -> Any:
    return adapted(kind, folder, "LilyConfig")


@behaviour("alora_invocation_tokens")
def adapter_that_wakes_within_a_row(kind: Any, folder: str) -> Any:
    return adapted(kind, folder, "LoraConfig", alora_invocation_tokens=[7, 8])


@pytest.mark.parametrize("one", behaviour.all, ids=lambda one: one.name)
def test_as_trainer_or_refused(one: Behaviour, tmp_path: Path) -> None:
    """The outcome is Trainer's, or a refusal that names what it is about."""
    compare(one, Trainer, Here, tmp_path)


REFUSED = [one for one in behaviour.all if one.refused and one.name != "adapter_that_wakes_within_a_row"]


@pytest.mark.slow
@pytest.mark.parametrize("one", REFUSED, ids=lambda one: one.name)
def test_a_plain_trainer_takes_it(one: Behaviour, tmp_path: Path) -> None:
    """What is refused is nothing that Trainer would refuse itself."""
    one.run(Trainer, str(tmp_path))
