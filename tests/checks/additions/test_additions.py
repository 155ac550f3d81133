"""What somebody adds to a model is refused where a plan would change it, and let be where none can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import arguments, samples, tiny_model
from torch.nn.functional import pad

from hf_hetero import HeteroTrainer, UnsupportedModel
from hf_hetero.checks.additions import adapters, hooks, strangers

LINEAR: list[Callable[[torch.Tensor], Any]] = [
    lambda g: g / 3,
    lambda g: g * (torch.arange(g.numel()).view_as(g) % 2),
    lambda g: None,
    lambda g: g - g.mean(),
]
OTHERS: list[Callable[[torch.Tensor], Any]] = [
    lambda g: g.clamp(-1e-3, 1e-3),
    lambda g: g.clamp(max=100.0),
    lambda g: g / g.norm(),
    lambda g: g.sign(),
    lambda g: g + 1,
]


@pytest.mark.parametrize("number", range(len(LINEAR)))
def test_hooks_that_add_up(number: int) -> None:
    """Of a sum they give the sum, so that it does not matter how often they are called; no random number is drawn."""
    model = tiny_model()
    model.model.norm.weight.register_hook(LINEAR[number])
    before = torch.random.get_rng_state()
    assert list(hooks.problems(model)) == []
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_hooks_that_do_not(number: int) -> None:
    """They are named with their weight."""
    model = tiny_model()
    model.model.norm.weight.register_hook(OTHERS[number])
    [problem] = hooks.problems(model)
    assert problem.startswith("model.norm.weight has a hook that changes its gradient")


def test_hooks_of_libraries() -> None:
    """A function of torch's own is none of somebody's; a lambda is."""
    assert not hooks.is_own(torch.nn.Linear.forward)
    assert hooks.is_own(lambda x: x)


def test_parts_of_ones_own() -> None:
    """Modules, methods and hooks are found by name; a model of transformers has none."""
    model = tiny_model()
    assert strangers.parts_of(model) == []
    model.lm_head.forward = lambda x: x
    model.model.norm.register_forward_pre_hook(lambda part, inputs: None)
    assert strangers.parts_of(model) == ["model.norm", "lm_head"]


def packed(mixes: bool, breaks: bool = False) -> Callable[[Any], torch.Tensor]:
    """Logits of samples of three tokens each, which see the token before, of another sample or not, if they mix."""

    def logits(numbers: Any) -> torch.Tensor:
        if breaks:
            raise RuntimeError("on purpose")
        rows = torch.cat([torch.arange(9.0).view(3, 3) + 10 * number for number in numbers])
        return rows + pad(rows, (0, 0, 1, 0))[:-1] if mixes else rows

    return logits


def strange_model() -> Any:
    model = tiny_model().train()
    model.model.norm.register_forward_hook(lambda part, inputs, out: None)
    return model


def test_what_mixes_samples_is_refused() -> None:
    """By what it computes, and with its name; what does not mix is taken. The model's mode stays."""
    model = strange_model()
    with pytest.raises(UnsupportedModel, match=r"no library's \(model\.norm\)"):
        strangers.check(model, packed(mixes=True), torch.float32)
    strangers.check(model, packed(mixes=False), torch.float32)
    strangers.check(tiny_model(), packed(mixes=True), torch.float32)  # nothing of anybody's own: not tried
    assert model.training


def test_what_cannot_be_tried_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """A trial that fails, or weights that are not there, are a warning and no refusal."""
    strangers.check(strange_model(), packed(mixes=True, breaks=True), torch.float32)
    assert "could not be tried: RuntimeError('on purpose')" in caplog.text
    strangers.check(strange_model().to("meta"), packed(mixes=True), torch.float32)
    assert "cannot be tried where weights are sharded" in caplog.text


def test_layers_that_are_repeated_by_an_adapter() -> None:
    """Named by the setting and with what to do; LoRA without is not refused."""
    model = peft.get_peft_model(
        tiny_model(), peft.LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2)] * 2)
    )
    [said] = adapters.problems(model)
    assert said.startswith("adapter 'default': layer_replication=[(0, 2), (0, 2)] makes layers with copies")
    assert not list(adapters.problems(peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))))


@pytest.mark.parametrize("kind", ["PveraConfig", "VeraConfig"])
def test_adapters_that_draw_noise(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are taken, with the warning that dropout has; those of the same kind that draw none have none."""
    model = peft.get_peft_model(tiny_model(), getattr(peft, kind)(r=4, target_modules=["q_proj"]))
    HeteroTrainer(model=model, args=arguments(str(tmp_path), 1), train_dataset=samples([5, 6]))
    assert ("'default' (PVERA) draws noise in each pass" in caplog.text) is (kind == "PveraConfig")
