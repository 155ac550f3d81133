"""A model whose ranks go over whole samples gives, and learns, what it does of each sample alone, in fp64.

The reference is independent of the package: one process, transformers' own model, one sample a call.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from helpers import ScriptedPlanner, run_ranks, samples
from hybrids import InFloat64
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.kernels.plain import PLAIN
from hf_hetero.collators import PackedCollator
from hf_hetero.collators.sample import Sample
from hf_hetero.collators.spans import pack_spans
from hf_hetero.layout import Layout, contiguous, two_level, zigzag
from hf_hetero.manners.whole_samples import WholeBackbone, WholeSamples, backbone_of, passing_together
from hf_hetero.samples.samples import Drawn
from hf_hetero.step import Step, StepBatch, StepExamples, StepShare

LENGTHS = [3, 1, 41, 2, 18, 1, 7]
TOLERANCE = 1e-12
LAYOUTS = {"contiguous": contiguous, "zigzag": zigzag, "two_level": lambda lengths, d: two_level(lengths, d, d // 2)}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 128, **NO_DROPOUT}
MODELS: dict[str, dict[str, Any]] = {
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0},
    "GPTJ": GPT,
    "Mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "Falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    "CodeGen": GPT,
    "GPTNeo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": 128,
    },
    "Rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2},
    "XLNet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "dropout": 0.0},  # sees tokens after its own
    "Doge": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "keep_window_size": 8,
    },
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=97, initializer_range=0.3, **MODELS[name])
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.double().train()


def rows(lengths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (n,), generator=generator) for n in lengths]


def num_targets(lengths: list[int]) -> int:
    return sum(n - 1 for n in lengths)


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def expected_of(name: str, lengths: list[int] = LENGTHS) -> dict[str, Any]:
    """Logits by sample, and the gradients of the mean cross-entropy of all samples."""
    model, logits = model_of(name), list[torch.Tensor]()
    with InFloat64():
        for row in rows(lengths):
            found = model(row[None], use_cache=False).logits[0]
            (F.cross_entropy(found[:-1], row[1:], reduction="sum") / num_targets(lengths)).backward()
            logits.append(found.detach())
    return {"logits": logits, "gradients": gradients_of(model)}


def shared(name: str, layout: Layout, rank: int, planned: bool = True) -> dict[str, Any]:
    """What a rank has of it all when it holds its part of the pack; gradients summed over ranks."""
    model = model_of(name)
    samples = [Sample(row, row) for row in rows(list(layout.lengths))]
    inputs = pack_spans(layout.spans[rank], samples)
    group = dist.group.WORLD if dist.is_initialized() else None
    ranks = tuple(range(layout.degree))
    context = AttentionContext(layout, ranks, rank, group, "gather", PLAIN, torch.device("cpu"))
    given = {"input_ids": inputs["input_ids"], "use_cache": False}
    with InFloat64():
        if planned:
            with WholeSamples(model).planned(context):
                logits = model(**given, attention_mask=inputs["attention_mask"]).logits[0]
        else:
            logits = model(**given).logits[0]
        total = num_targets(list(layout.lengths))
        (F.cross_entropy(logits, inputs["shift_labels"][0], reduction="sum") / total).backward()
    gradients = gradients_of(model)
    if dist.is_initialized():
        for gradient in gradients.values():
            dist.all_reduce(gradient)
    assert not any(isinstance(module, WholeBackbone) for module in model.modules())
    return {"logits": logits.detach()[: context.num_tokens], "gradients": gradients, "reached": context.reached}


def largest_error(found: dict[str, Any], expected: dict[str, Any], layout: Layout, rank: int) -> float:
    """Of logits and gradients, relative to the largest value of each."""
    assert found["gradients"].keys() == expected["gradients"].keys()
    pairs = [(found["gradients"][name], x) for name, x in expected["gradients"].items()]
    if spans := layout.spans[rank]:
        pairs.append((found["logits"], torch.cat([expected["logits"][s.sample][s.start : s.end] for s in spans])))
    largest = max(float(y.abs().max()) for _, y in pairs)
    return max(float((x - y).abs().max()) / largest for x, y in pairs)


def on_ranks(names: list[str]) -> dict[tuple[str, str], float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {}
    for name in names:
        expected = expected_of(name)
        for how, make in LAYOUTS.items():
            if world == 2 and how == "two_level":
                continue
            layout = make(LENGTHS, world)
            found[name, how] = largest_error(shared(name, layout, rank), expected, layout, rank)
    return found


@pytest.mark.parametrize(
    ("num_ranks", "names"),
    [
        (2, ["Bloom", "XLNet"]),
        pytest.param(2, list(MODELS), marks=pytest.mark.slow),
        pytest.param(4, list(MODELS), marks=pytest.mark.slow),
    ],
    ids=["few", "all-2", "all-4"],
)
def test_ranks_give_and_learn_what_each_sample_does_alone(num_ranks: int, names: list[str]) -> None:
    """Logits and all gradients, in every layout."""
    for errors in run_ranks(on_ranks, num_ranks, names):
        assert {case: error for case, error in errors.items() if not error <= TOLERANCE} == {}


@pytest.mark.parametrize("name", list(MODELS))
def test_a_pack_on_one_rank(name: str) -> None:
    """Samples of a pack do not see each other; without their borders they do, and are caught."""
    layout, expected = contiguous(LENGTHS, 1), expected_of(name)
    found = shared(name, layout, 0)
    assert largest_error(found, expected, layout, 0) <= TOLERANCE
    assert found["reached"] == {0}
    assert largest_error(shared(name, layout, 0, planned=False), expected, layout, 0) > 1e-3


@pytest.mark.parametrize("name", ["Bloom", "XLNet"])
def test_a_sample_that_is_split_is_caught(name: str) -> None:
    """The comparison can fail: parts of a sample that do not see each other are far off."""
    layout, parts = contiguous([12], 1), contiguous([5, 7], 1)
    [row] = rows([12])
    model = model_of(name)
    context = AttentionContext(parts, (0,), 0, None, "gather", PLAIN, torch.device("cpu"))
    with InFloat64(), WholeSamples(model).planned(context):
        logits = model(row[None], use_cache=False).logits[0].detach()
    expected = expected_of(name, [12])
    found = {"logits": logits, "gradients": expected["gradients"]}
    assert largest_error(found, expected, layout, 0) > 1e-3


def with_empty_ranks() -> float:
    layout, rank = contiguous([3], 4), dist.get_rank()
    assert layout.rank_tokens == (1, 1, 1, 0)
    return largest_error(shared("Bloom", layout, rank), expected_of("Bloom", [3]), layout, rank)


def test_ranks_without_tokens() -> None:
    """A rank that holds no token joins every exchange, has a gradient for each weight, and changes nothing."""
    assert max(run_ranks(with_empty_ranks, 4)) <= TOLERANCE


def embedded(dtype: torch.dtype = torch.float64) -> float:
    """Gradients of embeddings that are given in the place of tokens, on ranks that share one sample."""
    layout, rank = contiguous([11, 2], 2), dist.get_rank()
    generator = torch.Generator().manual_seed(3)
    samples = [torch.randn(n, 32, generator=generator, dtype=dtype) for n in layout.lengths]
    model = model_of("Bloom")
    whole = [x.clone().requires_grad_() for x in samples]
    for x in whole:
        model(inputs_embeds=x[None], use_cache=False).logits.square().sum().backward()
    context = AttentionContext(layout, (0, 1), rank, dist.group.WORLD, "gather", PLAIN, torch.device("cpu"))
    spans = layout.spans[rank]
    mine = torch.cat([samples[s.sample][s.start : s.end] for s in spans]).requires_grad_()
    with WholeSamples(model).planned(context):
        model(inputs_embeds=mine[None], use_cache=False).logits.square().sum().backward()
    expected = torch.cat([whole[s.sample].grad[s.start : s.end] for s in spans])  # pyright: ignore
    assert mine.grad is not None
    return float((mine.grad - expected).abs().max() / expected.abs().max())


def test_embeddings_of_other_ranks_get_their_gradients() -> None:
    """Where a model is given embeddings, what a rank has fetched sends its gradients back."""
    assert max(run_ranks(embedded, 2)) < 1e-6  # Bloom's softmax is of fp32


def test_the_backbone_is_what_begins_with_the_embedding() -> None:
    """The innermost model: of BART's decoder, which is called past what wraps it, too."""
    bart = transformers.BartConfig(vocab_size=97, d_model=32, decoder_layers=1, decoder_attention_heads=4)
    assert type(backbone_of(transformers.BartForCausalLM(bart))).__name__ == "BartDecoder"
    assert type(backbone_of(model_of("Bloom"))).__name__ == "BloomModel"


def batches_of(lengths: list[int], num_ranks: int) -> list[StepBatch]:
    """A step's tensors on each rank, by a plan of mixed degrees with ranks that hold nothing."""
    plan = ScriptedPlanner(num_ranks).plan(lengths)
    drawn = Drawn(tuple(range(len(lengths))), (0,) * len(lengths), tuple(lengths), tuple(lengths))
    shares = [StepShare(Step(0, 0, drawn, plan), rank) for rank in range(num_ranks)]
    data = samples(lengths)
    found: Any = [PackedCollator()(StepExamples(s, {n: data[n] for n in s.samples()})) for s in shares]
    return found


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_pass_together(num_ranks: int) -> None:
    """Under FSDP2 each rank counts as many passes as the others, and as the one with the most samples; alone, not."""
    differs = list[bool]()
    for more in range(1, 7):  # so that some plans give the ranks of a micro-batch unequal numbers of samples
        needed, counted = list[Any](), list[Any]()
        for batch in batches_of([*LENGTHS, *(5, 9, 13, 2, 30, 4)[:more]], num_ranks):
            ours = passing_together(batch, unshifted=False)
            counted.append([m.num_passes for m in ours.micro_batches])
            needed.append([max(1, len({span.sample for span in m.spans})) for m in batch.micro_batches])
        assert counted == [counted[0]] * num_ranks
        assert counted[0] == [max(of_ranks) for of_ranks in zip(*needed, strict=True)]
        differs.append(needed != [needed[0]] * num_ranks)
    assert any(differs)


def test_passes_that_stand_in_teach_nothing() -> None:
    """However many there are, gradients and outputs are the same, and each is gone through forward and backward."""
    layout, expected = contiguous(LENGTHS, 1), expected_of("Bloom")
    calls = list[str]()
    for num_passes in (0, len(LENGTHS) + 3):
        model = model_of("Bloom")
        calls.clear()
        layer = model.transformer.h[0]
        layer.register_forward_hook(lambda *_: calls.append("forward"))
        layer.register_full_backward_hook(lambda *_: calls.append("backward"))
        context = AttentionContext(layout, (0,), 0, None, "gather", PLAIN, torch.device("cpu"), num_passes=num_passes)
        inputs = pack_spans(layout.spans[0], [Sample(row, row) for row in rows(LENGTHS)])
        with InFloat64(), WholeSamples(model).planned(context):
            logits = model(input_ids=inputs["input_ids"], use_cache=False).logits[0]
            loss = F.cross_entropy(logits, inputs["shift_labels"][0], reduction="sum") / num_targets(LENGTHS)
            loss.backward()
        assert [calls.count(way) for way in ("forward", "backward")] == [num_passes or len(LENGTHS)] * 2
        found = {"logits": logits.detach(), "gradients": gradients_of(model)}
        assert largest_error(found, expected, layout, 0) <= TOLERANCE
