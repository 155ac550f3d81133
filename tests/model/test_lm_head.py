"""A model whose head hands out lazy logits learns what it learns with whole ones; and what it cannot do it says."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FAMILIES, gradients_of, largest_difference, tiny_model, with_lora

from benchmarks.model.measure_lm_head import compare
from hf_hetero.model.lm_head import LazyLogits, LeanHead, as_written, install, uninstall
from hf_hetero.model.loss import token_loss

NUM_TARGETS = 17


def batch(masked: int = 11) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :masked] = -100
    return {"input_ids": ids, "labels": labels}


def loss_of(model: Any, inputs: dict[str, Any], lean: bool, device_type: str | None = None) -> torch.Tensor:
    """The model's own loss, with whole logits or without; both by `token_loss`."""
    model.train()
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    base.loss_function = token_loss
    with torch.autocast(device_type or "cpu", torch.bfloat16, enabled=device_type is not None):
        if not lean:
            return model(**inputs, num_items_in_batch=torch.tensor(NUM_TARGETS)).loss
        head = install(base)
        assert isinstance(head, LeanHead)
        with head.lazy():
            return model(**inputs, num_items_in_batch=torch.tensor(NUM_TARGETS)).loss


def both(make: Any, inputs: dict[str, Any]) -> list[tuple[float, dict[str, torch.Tensor]]]:
    found = []
    for lean in (False, True):
        model = make()
        loss = loss_of(model, inputs, lean)
        (3 * loss).backward()  # a factor, as of a loss scaler
        found.append((loss.item(), gradients_of(model)))
    return found


NOT_IN_FP64 = ("gemma2", "gemma3", "qwen3-moe", "deepseek-v3", "gpt-oss")


@pytest.mark.parametrize("family", FAMILIES)
def test_same_gradients(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """For every family, those that scale or cap their logits among them, and without ever computing them whole."""
    changes = {"logits_scaling": 3.0} if family == "granite" else {}
    dtype, tolerance = (torch.float32, 1e-6) if family in NOT_IN_FP64 else (torch.float64, 1e-12)
    (plain, expected), (lean, found) = both(lambda: tiny_model(family, "eager", dtype, **changes), batch())
    assert lean == pytest.approx(plain, rel=tolerance)
    assert largest_difference(found, expected) < tolerance
    assert "All logits are computed" not in caplog.text


def test_the_comparison_can_fail() -> None:
    """If a soft cap were forgotten, it would be seen."""
    plain = tiny_model("gemma3", "eager", final_logit_softcapping=None)
    loss_of(plain, batch(), lean=False).backward()
    capped = tiny_model("gemma3", "eager", final_logit_softcapping=0.5)
    loss_of(capped, batch(), lean=True).backward()
    assert largest_difference(gradients_of(capped), gradients_of(plain)) > 1e-3


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights(tied: bool) -> None:
    """A head that shares the embedding's weight adds to the same gradient."""
    (_, expected), (_, found) = both(lambda: tiny_model(dtype=torch.float64, tie_word_embeddings=tied), batch())
    assert largest_difference(found, expected) < 1e-12


def test_frozen_head() -> None:
    """With LoRA the head is frozen: it gets no gradient, the adapters get theirs."""
    (_, expected), (_, found) = both(lambda: with_lora(tiny_model(dtype=torch.float64)), batch())
    assert all("lora" in name for name in found)
    assert largest_difference(found, expected) < 1e-12


def test_no_target() -> None:
    """Without any target the loss is zero, and so are the gradients; they are there, for a wrapper to synchronise."""
    model = tiny_model()
    loss = loss_of(model, batch(masked=40), lean=True)
    loss.backward()
    assert loss.item() == 0.0
    assert gradients_of(model).keys() == dict(model.named_parameters()).keys()
    assert all(float(g.abs().max()) == 0.0 for g in gradients_of(model).values())


@pytest.mark.parametrize("autocast", [True, False])
def test_low_precision(autocast: bool) -> None:
    """In bf16, many chunks are as near to the fp64 gradients as the plain loss is."""
    exact = tiny_model(dtype=torch.float64)
    loss_of(exact, batch(), lean=False).backward()
    errors = []
    for lean in (False, True):
        model = tiny_model(dtype=torch.float32 if autocast else torch.bfloat16)
        loss_of(model, batch(), lean, "cpu" if autocast else None).backward()
        found = {name: g.double() for name, g in gradients_of(model).items()}
        errors.append(largest_difference(found, gradients_of(exact)))
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())
    assert errors[1] < 1.2 * errors[0]


def test_anything_else_makes_logits_real(caplog: pytest.LogCaptureFixture) -> None:
    """What is not known to be elementwise gets the logits as they are, and a line in the log."""
    torch.manual_seed(0)
    head = torch.nn.Linear(5, 13, dtype=torch.float64)
    hidden = torch.randn(1, 10, 5, dtype=torch.float64, requires_grad=True)
    expected = head(hidden) * 2
    lazy = LazyLogits.of(hidden, head.weight, head.bias, ()) * 2
    assert isinstance(lazy, LazyLogits)
    assert lazy.shape == expected.shape == lazy.size()
    assert (lazy.size(-1), lazy.dim(), lazy.ndim, lazy.numel()) == (13, 3, 3, 130)
    assert not caplog.text
    torch.testing.assert_close(lazy[0, 2:4], expected[0, 2:4])
    assert "__getitem__" in caplog.text
    torch.testing.assert_close(lazy.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(torch.cat([expected, lazy]), torch.cat([expected, expected]))
    torch.testing.assert_close(lazy + torch.ones(13), expected + 1)
    torch.testing.assert_close(lazy * torch.ones(13), expected)
    lazy.sum().backward()
    assert hidden.grad is not None


WRITERS = {
    "setitem": lambda logits: logits.__setitem__((slice(None), slice(None), [5, 6]), -1e4),
    "in place": lambda logits: logits.mul_(torch.linspace(0.5, 2.0, 97)),
    "iadd": lambda logits: logits.__iadd__(torch.linspace(0.0, 3.0, 97)),
    "select": lambda logits: logits[..., 5].fill_(3.0),
    "view": lambda logits: logits.view(-1, 97).__setitem__((slice(None), slice(5, 9)), -1e4),
    "view of a view": lambda logits: logits.flatten(0, 1)[:, 3:7].mul_(3.0),
    "two views": lambda logits: (logits[..., 5].fill_(4.0), logits.transpose(0, 1)[..., 7].fill_(5.0)),
    "transposed": lambda logits: logits.mT[:, 5].fill_(3.0),
    "data": lambda logits: logits.data[..., 5].fill_(2.0),
}


@pytest.mark.parametrize("write", WRITERS)
def test_what_is_written_into_logits_counts(write: str) -> None:
    """A model that forbids some tokens, as Chameleon does those of images, learns by its own logits, lean or not."""
    found: list[Any] = []
    for lean, written in ((False, True), (True, True), (False, False)):
        model, inputs = tiny_model().double(), batch()
        head = install(model)
        assert isinstance(head, LeanHead)
        model.train()
        with head.lazy() if lean else contextlib.nullcontext():
            logits = model(input_ids=inputs["input_ids"]).logits
            if written:
                WRITERS[write](logits)
            loss = token_loss(logits, inputs["labels"], 97, num_items_in_batch=torch.tensor(NUM_TARGETS))
        loss.backward()
        found.append((loss.item(), gradients_of(model)))
    whole, lean, other = found
    assert lean[0] == pytest.approx(whole[0], rel=1e-12)
    assert largest_difference(lean[1], whole[1]) < 1e-12
    assert abs(other[0] - whole[0]) > 1e-3


def test_what_is_only_looked_at_changes_nothing() -> None:
    """A view that nobody writes into leaves the loss without whole logits; so does what only has the same numbers."""
    model, inputs = tiny_model().double(), batch()
    head = install(model)
    assert isinstance(head, LeanHead)
    with head.lazy():
        logits = model.train()(input_ids=inputs["input_ids"]).logits
        best, last = logits.argmax(-1), logits[:, -1]
        logits.detach().clone().zero_()
        assert isinstance(as_written(logits), LazyLogits)
        assert torch.equal(best[:, -1], last.argmax(-1))
        last.detach().zero_()
        assert not isinstance(as_written(logits), LazyLogits)
        assert not as_written(logits)[:, -1].any()


def test_wrappers_may_ask(caplog: pytest.LogCaptureFixture) -> None:
    """Device, dtype, gradient edge, hooks and conversion to fp32 leave them lazy."""
    head = torch.nn.Linear(5, 13, dtype=torch.bfloat16)
    lazy = LazyLogits.of(torch.ones(1, 2, 5, dtype=torch.bfloat16, requires_grad=True), head.weight, None, ())
    assert (lazy.device.type, lazy.dtype, lazy.requires_grad) == ("cpu", torch.bfloat16, True)
    assert lazy.grad_fn is not None
    assert lazy.is_floating_point()
    lazy.register_hook(lambda gradient: gradient)
    assert isinstance(lazy.float(), LazyLogits)
    assert isinstance(lazy.to(torch.float32), LazyLogits)
    assert not caplog.text


def test_the_weights_can_be_reached() -> None:
    """DistributedDataParallel takes a weight that it cannot reach from the model's outputs for unused."""
    model = tiny_model().train()
    head = install(model)
    assert isinstance(head, LeanHead)
    with head.lazy():
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert isinstance(logits, LazyLogits)
    seen, coming = set(), [logits.grad_fn]
    while coming:
        node = coming.pop()
        seen.add(getattr(node, "variable", None))
        coming += [after for after, _ in node.next_functions if after is not None]
    assert head.weight in seen


def test_only_where_asked() -> None:
    """Outside `lazy`, in evaluation and without gradients, logits are what they always are."""
    model = tiny_model()
    inputs = {"input_ids": batch()["input_ids"]}
    expected = model(**inputs).logits
    head = install(model)
    assert isinstance(head, LeanHead)
    assert install(model) is head
    with head.lazy():
        assert type(model.eval()(**inputs).logits) is torch.Tensor
        with torch.no_grad():
            assert type(model.train()(**inputs).logits) is torch.Tensor
        assert type(model(**inputs).logits) is LazyLogits
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)


def test_the_model_is_as_before(tmp_path: Path) -> None:
    """Names, parameters, saving, loading and generation do not notice."""
    model = tiny_model(tie_word_embeddings=True)
    names, parameters = list(model.state_dict()), list(model.parameters())
    ids = batch()["input_ids"]
    expected = model.eval().generate(ids, max_new_tokens=5, do_sample=False)
    install(model)
    assert list(model.state_dict()) == names
    assert all(mine is theirs for mine, theirs in zip(model.parameters(), parameters, strict=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert type(again.lm_head) is torch.nn.Linear
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_head_is_given_back() -> None:
    """The very module, of its own class and with nothing left on it, when the last of those who used it is done."""
    model = tiny_model()
    head, state = model.lm_head, dict(vars(model.lm_head))
    for orders in ("A first", "B first"):  # two users of one model: undone in either order
        lean = [install(model), install(model)]
        assert lean == [head, head], orders
        assert type(model.lm_head) is LeanHead
        uninstall(model)
        with head.lazy():
            assert type(model.train()(**batch()).logits) is LazyLogits
        uninstall(model)
        assert model.lm_head is head
        assert type(head) is torch.nn.Linear
        assert vars(head) == state
    uninstall(model)
    assert type(head) is torch.nn.Linear


def test_a_sharded_head_is_left_to_its_owner() -> None:
    """What FSDP derives from the class stays derived from it, works without being asked for more, and serves again."""
    model = tiny_model()
    expected = model(**batch()).logits
    head = install(model)
    model.lm_head.__class__ = sharded = type("FSDPLeanHead", (LeanHead,), {})
    uninstall(model)
    assert type(model.lm_head) is sharded
    assert torch.equal(model(**batch()).logits, expected)
    assert install(model) is head


def test_where_it_cannot_be() -> None:
    """A head that is not a plain one, or that somebody listens to, is left alone, with the reason."""
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda *_: None)
    assert install(model) == "its output embedding has hooks"
    model = tiny_model()
    model.lm_head = type("Quantised", (torch.nn.Linear,), {})(32, 97)
    assert install(model) == "its output embedding is a Quantised"


def test_hidden_states_may_be_frozen(caplog: pytest.LogCaptureFixture) -> None:
    """If only the head trains, only it gets a gradient."""
    caplog.set_level(logging.INFO)
    model = tiny_model(dtype=torch.float64)
    model.model.requires_grad_(False)
    loss_of(model, batch(), lean=True).backward()
    assert list(gradients_of(model)) == ["lm_head.weight"]


@pytest.mark.slow
def test_memory() -> None:
    """8192 tokens of a 128K vocabulary, forward and backward: at most a third of the memory of whole logits."""
    found = compare(8192, 131072, 64)
    assert found["chunked"]["bytes"] <= found["whole"]["bytes"] / 3
    assert found["chunked"]["loss"] == pytest.approx(found["whole"]["loss"], rel=1e-6)
    assert found["chunked"]["gradient"] == pytest.approx(found["whole"]["gradient"], rel=1e-5)
