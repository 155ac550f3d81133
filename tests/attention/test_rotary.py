"""Under a plan a sample's rotary table is the one it has when it is alone; without a plan nothing is changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from helpers import FAMILIES, TINY

from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.kernels.cpu import CPU
from hf_hetero.attention.rotary import TablesBySample, longest_exact, problems
from hf_hetero.layout import Layout, contiguous, zigzag

SWITCH = 16
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LONGROPE |= {"original_max_position_embeddings": SWITCH}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}


def model_of(family: str = "phi3", **changes: Any) -> Any:
    name, own = FAMILIES[family]
    options = {**TINY, **own, "max_position_embeddings": 128, **copy.deepcopy(changes)}
    config = getattr(transformers, f"{name}Config")(**options)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}Model")(config)


def context_of(layout: Layout, rank: int, **options: Any) -> Any:
    ranks = tuple(range(layout.degree))
    return AttentionContext(layout, ranks, rank, None, "ulysses", CPU, torch.device("cpu"), **options)


class Rotated(torch.nn.Module):
    """A caller that hands out what its tables give."""

    def __init__(self, table: torch.nn.Module) -> None:
        super().__init__()
        self.rotary_emb = table

    def forward(self, positions: torch.Tensor, *layer_type: str, **_: Any) -> Any:
        return self.rotary_emb(torch.zeros(1), positions, *layer_type)


def alone(table: Any, length: int, *layer_type: str) -> tuple[torch.Tensor, ...]:
    return copy.deepcopy(table)(torch.zeros(1), torch.arange(length)[None], *layer_type)


@pytest.mark.parametrize("lengths", [(11, 40, 16, 17, 1), (40, 5), (16, 3), (20, 30)], ids=str)
@pytest.mark.parametrize("layout", [contiguous, zigzag])
def test_each_sample_has_its_own_table(layout: Any, lengths: tuple[int, ...]) -> None:
    """On every rank, also where a rank holds the first tokens of a long sample, or the last ones."""
    table = model_of(rope_parameters=LONGROPE, original_max_position_embeddings=SWITCH).rotary_emb
    expected = [alone(table, length) for length in lengths]
    caller = Rotated(table)
    TablesBySample(caller)
    for degree in (1, 2, 4):
        shared = layout(list(lengths), degree)
        for rank, spans in enumerate(shared.spans):
            positions = torch.cat([torch.arange(0), *(torch.arange(s.start, s.end) for s in spans)])[None]
            positions = positions if spans else torch.zeros(1, 1, dtype=torch.long)
            found = caller(positions, hetero=context_of(shared, rank))
            for part, whole in enumerate(found):
                rows = [expected[s.sample][part][0, s.start : s.end] for s in spans] or [expected[0][part][0, :1]]
                assert torch.equal(whole[0], torch.cat(rows))


def test_positions_that_a_row_gives() -> None:
    """A sample is long if its positions are, not its tokens; a token that stands in at the end changes nothing."""
    table = model_of(rope_parameters=LONGROPE, original_max_position_embeddings=SWITCH).rotary_emb
    rows = [torch.tensor([0, 5, 30, 31]), torch.arange(SWITCH + 2) // 2]
    expected = [copy.deepcopy(table)(torch.zeros(1), row[None])[0][0] for row in rows]
    caller = Rotated(table)
    TablesBySample(caller)
    shared = contiguous([4, SWITCH + 2], 2)
    first = context_of(shared, 0, reaches=(32, 9))
    ends = [span.end for span in shared.spans[0]]
    positions = torch.cat([rows[0], rows[1][: ends[1]], torch.zeros(1, dtype=torch.long)])[None]
    found = caller(positions, hetero=first)[0][0]
    assert torch.equal(found[:-1], torch.cat([expected[0], expected[1][: ends[1]]]))


def test_tables_of_each_type_of_layer() -> None:
    """Where types of layers have tables of their own, only those that follow the longest sample are touched."""
    rope = {"full_attention": LONGROPE, "sliding_attention": DEFAULT}
    table = model_of("gemma3", rope_parameters=rope, head_dim=8).rotary_emb
    caller = Rotated(table)
    TablesBySample(caller)
    shared = contiguous([40, 5], 1)
    positions = torch.cat([torch.arange(40), torch.arange(5)])[None]
    for layer_type in rope:
        found = caller(positions, layer_type, hetero=context_of(shared, 0))
        for part, whole in enumerate(found):
            rows = [alone(table, length, layer_type)[part][0] for length in (40, 5)]
            assert torch.equal(whole[0], torch.cat(rows))


def test_without_a_plan_nothing_changes() -> None:
    """Nor after a pass under a plan that failed, nor once the hooks are gone."""
    model = model_of(rope_parameters=LONGROPE, original_max_position_embeddings=SWITCH)
    ids = torch.arange(3, 43)[None]
    expected = model(ids).last_hidden_state
    hooks = TablesBySample(model)
    assert torch.equal(model(ids).last_hidden_state, expected)
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model(hetero=context_of(contiguous([5, 35], 1), 0))
    assert torch.equal(model(ids).last_hidden_state, expected)
    hooks.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_copy_of_a_model_has_hooks_of_its_own() -> None:
    """As callbacks and averages of weights make them, in the midst of training."""
    model = model_of(rope_parameters=LONGROPE, original_max_position_embeddings=SWITCH)
    hooks = TablesBySample(model)
    other = copy.deepcopy(model)
    hooks.remove()
    assert other.rotary_emb._forward_hooks
    assert not any(hook.__self__ is hooks for hook in other.rotary_emb._forward_hooks.values())


def test_the_longest_sample_of_a_table_that_stays_grown() -> None:
    """Beyond it, samples of the same length differ by those before them; other tables know no such length."""
    model = model_of("llama", rope_parameters=DYNAMIC, max_position_embeddings=SWITCH)
    assert longest_exact(model) == (SWITCH, "dynamic")
    fresh = [alone(model.rotary_emb, length)[0] for length in (SWITCH, SWITCH + 4)]
    for length, same in ((SWITCH, True), (40, False)):
        table = copy.deepcopy(model.rotary_emb)
        table(torch.zeros(1), torch.arange(length)[None])
        after = [table(torch.zeros(1), torch.arange(n)[None])[0] for n in (SWITCH, SWITCH + 4)]
        assert all(torch.equal(x, y) for x, y in zip(after, fresh, strict=True)) == same
    for rope in (LONGROPE, DEFAULT, {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}):
        assert longest_exact(model_of("llama", rope_parameters=rope)) is None


def test_tables_inside_of_layers_are_a_problem() -> None:
    """They are made again in backward, where no context is."""
    model = model_of(rope_parameters=LONGROPE, original_max_position_embeddings=SWITCH)
    assert not list(problems(model))
    model.layers[1].rotary_emb = model.rotary_emb
    del model.rotary_emb
    [problem] = problems(model)
    assert "layers.1.rotary_emb (rope_type 'longrope')" in problem
