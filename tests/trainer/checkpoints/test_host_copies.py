"""Copies are of what was, share memory where it was shared, and leave out what does not change."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from hf_hetero.trainer.checkpoints.host_copies import HostCopies


def model_of(frozen: bool = False) -> Any:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(not frozen)
    return model


def copies_of(model: Any) -> HostCopies:
    return HostCopies(model, [weight for weight in model.parameters() if weight.requires_grad])


def test_later_changes_are_not_in_them() -> None:
    """Weights, buffers and optimizer states that change after the copy are in it as they were."""
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(4, 3)).pow(2).sum().backward()
        optimizer.step()
        expected = {name: value.clone() for name, value in model.state_dict().items()}
        moments = {key: state["exp_avg"].clone() for key, state in optimizer.state_dict()["state"].items()}
        copies = copies_of(model)
        weights, state = copies.of(model.state_dict()), copies.of(optimizer.state_dict())
        copies.asked_for()
        model(torch.randn(4, 3)).pow(2).sum().backward()
        optimizer.step()
        copies.wait()
        assert list(weights) == list(expected)
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert all(torch.equal(state["state"][key]["exp_avg"], moment) for key, moment in moments.items())
        assert not torch.equal(model.state_dict()["0.weight"], expected["0.weight"])
        assert not torch.equal(model.state_dict()["2.running_mean"], expected["2.running_mean"])


def test_shared_memory_stays_shared() -> None:
    """Tied weights are copied once, also when they are asked for again, so that formats know them for tied."""
    model = model_of()
    copies = copies_of(model)
    weights = copies.of(model.state_dict())
    again = copies.of({"head": model[1].weight})
    pointer = weights["0.weight"].data_ptr()
    assert pointer == weights["1.weight"].data_ptr() == again["head"].data_ptr()
    assert pointer != model[0].weight.data_ptr()
    assert weights["0.bias"].data_ptr() != weights["1.bias"].data_ptr()


def test_frozen_weights_are_not_copied() -> None:
    """What the optimizer does not have is not copied; what it has is, even if its gradient is off for now."""
    model = model_of(frozen=True)
    weights = copies_of(model).of(model.state_dict())
    assert weights["0.bias"].data_ptr() == model[0].bias.data_ptr()
    assert weights["1.bias"].data_ptr() != model[1].bias.data_ptr()
    assert weights["2.running_mean"].data_ptr() != model[2].running_mean.data_ptr()
    weights = HostCopies(model, model.parameters()).of(model.state_dict())
    assert weights["0.bias"].data_ptr() != model[0].bias.data_ptr()


def test_other_things_are_copied_too() -> None:
    """Lists, tuples, numbers and objects of any kind; strides and types are kept; views of the same memory are two."""
    matrix = torch.arange(6.0).reshape(2, 3).to(torch.bfloat16)
    tree: dict[str, Any] = {"list": [matrix.T, 1], "tuple": (0.9, None), "object": OrderedDict(a={1}), "row": matrix[1]}
    found = HostCopies(torch.nn.Linear(1, 1), []).of(tree)
    matrix.zero_()
    tree["object"]["a"].add(2)
    assert found["list"][0].stride() == (1, 3)
    assert found["list"][0].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found["row"].dtype == torch.bfloat16
    assert found["row"].tolist() == [3, 4, 5]
    assert (found["list"][1], found["tuple"], found["object"]["a"]) == (1, (0.9, None), {1})


def test_empty_tensors() -> None:
    """Tensors without memory are copied by their shapes."""
    found = HostCopies(torch.nn.Linear(1, 1), []).of([torch.empty(0, 3), torch.empty(0), torch.tensor(2)])
    assert [tuple(x.shape) for x in found] == [(0, 3), (0,), ()]
