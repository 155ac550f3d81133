"""What transformers sees: under a plan packed attention, without one its own; and a lost context is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from hf_hetero.attention import interface
from hf_hetero.attention.context import AttentionContext, planned_mask
from hf_hetero.attention.kernels.cpu import CPU
from hf_hetero.errors import UnsupportedModel
from hf_hetero.layout import contiguous


def hetero_model(**changes: Any) -> Any:
    interface.register()
    model = tiny_model("qwen3", **changes).eval()
    model.set_attn_implementation(interface.ATTENTION_NAME)
    return model


def context_of(lengths: list[int]) -> AttentionContext:
    return AttentionContext(contiguous(lengths, 1), (0,), 0, None, "ulysses", CPU, torch.device("cpu"))


def packed(lengths: list[int]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    total = sum(lengths)
    return {
        "input_ids": torch.randint(3, 97, (1, total)),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "attention_mask": planned_mask(total, total),
    }


def test_packed_samples_are_as_if_alone() -> None:
    """Logits of a pack equal those of each sample alone under stock attention."""
    lengths = [7, 1, 12]
    inputs = packed(lengths)
    context = context_of(lengths)
    logits = hetero_model()(**inputs, hetero=context, use_cache=False).logits[0]
    stock = tiny_model("qwen3").eval()
    alone = [stock(input_ids=ids[None], use_cache=False).logits[0] for ids in inputs["input_ids"][0].split(lengths)]
    assert (logits - torch.cat(alone)).abs().max() < 1e-5
    assert context.reached == {0, 1}


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_without_a_plan_it_is_stock_attention(side: str) -> None:
    """Evaluation with padding on either side, or none, equals scaled-dot-product attention."""
    ids = torch.randint(3, 97, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    if side != "none":
        mask[0, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    arguments = {"input_ids": ids} if side == "none" else {"input_ids": ids, "attention_mask": mask}
    ours, theirs = hetero_model()(**arguments).logits, tiny_model("qwen3").eval()(**arguments).logits
    assert torch.equal(ours[mask.bool()], theirs[mask.bool()])


def test_generation_is_stock() -> None:
    """Greedy generation, with its cache, gives the same tokens."""
    ids = torch.randint(3, 97, (1, 6))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ours, theirs = (m.generate(ids, **options) for m in (hetero_model(), tiny_model("qwen3").eval()))
    assert torch.equal(ours, theirs)


def test_softcap_without_a_plan() -> None:
    """Models with softcap evaluate as with eager attention, with and without padding."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    interface.register()
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97, "head_dim": 8}
    config = Gemma2Config(**size, num_attention_heads=4, num_key_value_heads=2, sliding_window=4)
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    ids, mask = torch.randint(3, 97, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[1, 7:] = 0
    for arguments in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        logits = []
        for name in ("eager", interface.ATTENTION_NAME):
            model.set_attn_implementation(name)
            logits.append(model(**arguments).logits[mask.bool()])
        assert (logits[0] - logits[1]).abs().max() < 1e-5


def test_a_lost_context_is_an_error() -> None:
    """If a model does not hand the context down, attention says so instead of mixing samples."""
    with pytest.raises(UnsupportedModel, match="does not hand its keyword arguments to attention"):
        hetero_model()(**packed([5, 6]), use_cache=False)


def test_rank_without_tokens() -> None:
    """Its one token attends to nothing, and every weight still gets a gradient, of zero."""
    model = hetero_model()
    inputs = {"input_ids": torch.tensor([[0]]), "position_ids": torch.tensor([[0]])}
    out = model(**inputs, attention_mask=planned_mask(0, 1), hetero=context_of([]), use_cache=False)
    (0 * out.logits).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


class Counted(TorchDispatchMode):
    """Counts what copies, or fills, as much as an input of attention has."""

    def __init__(self, num_elements: int) -> None:
        super().__init__()
        self.num_elements, self.found = num_elements, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_whole = isinstance(result, torch.Tensor) and result.numel() >= self.num_elements
        if is_whole and name in {"constant_pad_nd", "slice_backward", "select_backward", "clone", "zeros", "copy_"}:
            self.found.append(name)
        return result


@pytest.mark.parametrize("lengths", [[4, 8], []])
def test_a_whole_pack_is_not_copied(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what attention gives, nor gradients on their way out of it: a slice of all, or padding by none, would."""
    context, num_tokens = context_of(lengths), max(sum(lengths), 1)
    x = torch.randn(1, num_tokens, 2, 4, requires_grad=True)  # as a layer's products leave it
    monkeypatch.setattr(interface, "attend", lambda q, k, v, *_: q + k + v)
    with Counted(x.numel()) as counted:
        heads = x.transpose(1, 2)
        out, _ = interface.hetero_attention(torch.nn.Identity(), heads, heads, heads, None, hetero=context)
        out.backward(torch.ones_like(out))
    assert out.shape == (1, num_tokens, 2, 4)
    assert bool(counted.found) is (not lengths)  # where a token stands in there is something to pad


def test_attention_in_both_directions() -> None:
    """A layer that is not causal is not quietly made so, whether module or call says it; a window is refused."""
    module, x = torch.nn.Identity(), torch.randn(1, 2, 5, 4)
    expected = [
        torch.nn.functional.scaled_dot_product_attention(*[x[:, :, tokens]] * 3)
        for tokens in (slice(0, 2), slice(2, 5))
    ]
    for changes in ({"is_causal": False}, {}):
        module.is_causal = bool(changes)  # type: ignore[assignment]
        context = context_of([2, 3])
        found, _ = interface.hetero_attention(module, x, x, x, None, hetero=context, **changes)
        torch.testing.assert_close(found, torch.cat(expected, dim=2).transpose(1, 2))
        assert context.looked_ahead
        with pytest.raises(UnsupportedModel, match="tokens after its own, in a window of 3"):
            interface.hetero_attention(module, x, x, x, None, sliding_window=3, hetero=context_of([5]), **changes)
