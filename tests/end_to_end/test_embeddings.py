"""Embeddings learn under plans what one batch that is the whole step teaches, whatever the plan."""

from __future__ import annotations

import math
from typing import Any

import datasets
import pytest
import torch
import transformers
from accelerate.parallelism_config import ParallelismConfig
from helpers import (
    FAMILIES,
    TINY,
    Recorder,
    ScriptedPlanner,
    arguments,
    gradients_of,
    keep_float64,
    largest_difference,
    plain_name,
    run_ranks,
    samples,
    scripted,
    shard_on_cpu,
    tiny_model,
    trainer_order,
    whole,
)

from hf_hetero import HeteroConfig, HeteroEmbeddingTrainer, HeteroError, UnsupportedModel
from hf_hetero.errors import BadSample, ConfigError

SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
LENGTHS = [7, 40, 3, 11, 2, 25, 1, 9, 33, 5, 17, 1, 6, 28, 8, 3, 50, 2, 12, 4, 19, 10, 22, 5, 1, 1, 1, 13, 30, 6]
SCALE = 5.0


class Scripted(HeteroEmbeddingTrainer):
    def _plan_source(self) -> Any:
        return scripted(ScriptedPlanner(self.args.world_size))


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def rows() -> list[dict[str, Any]]:
    """Ten rows of three texts each."""
    ids = [sample["input_ids"] for sample in samples(LENGTHS)]
    return [
        {"anchor": ids[n], "positive": ids[n + 1], "negative": ids[n + 2], "note": "x"} for n in range(0, len(ids), 3)
    ]


def model_of(adapters: bool = False, family: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    name, special = ("Bert", NO_DROPOUT) if family == "bert" else FAMILIES[family]
    shape = getattr(transformers, f"{name}Config")(**{**TINY, **special, **changes}, attn_implementation="sdpa")
    model = keep_float64(getattr(transformers, f"{name}Model")(shape).double())
    if not adapters:
        return model
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


def embedding(model: Any, ids: list[int], pooling: str) -> torch.Tensor:
    hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return {"last": hidden[-1], "first": hidden[0], "mean": hidden.mean(0)}[pooling]


def loss_of(model: Any, data: list[dict[str, Any]], pooling: str) -> torch.Tensor:
    """The mean over anchors of -log of the share that its own positive has of all candidates', by the definition."""
    texts = [[embedding(model, row[name], pooling) for name in ("anchor", "positive", "negative")] for row in data]
    terms = []
    for number, (anchor, _, _) in enumerate(texts):
        near = [
            SCALE * torch.dot(anchor, other) / (anchor.norm() * other.norm())
            for column in (1, 2)
            for other in (row[column] for row in texts)
        ]
        terms.append(torch.stack(near).logsumexp(0) - near[number])
    return torch.stack(terms).mean()


def reference(pooling: str, adapters: bool = False, num_steps: int = 4, family: str = "llama") -> dict[str, Any]:
    """Each text alone, all of a step's compared, plain gradient descent; the last batch of an epoch has two rows."""
    model, data = model_of(adapters, family).train(), rows()
    gradients, losses = [], []
    for step in trainer_order(len(data), 4, 7, num_steps):
        model.zero_grad()
        loss = loss_of(model, [data[row] for row in step], pooling)
        loss.backward()
        gradients.append(gradients_of(model))
        losses.append(loss.item())
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.05 * p.grad
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"gradients": gradients, "weights": weights, "losses": losses}


def learned(
    folder: str,
    pooling: str,
    adapters: bool = False,
    changes: dict[str, Any] | None = None,
    control: str = "",
    resume: str | None = None,
    family: str = "llama",
) -> dict[str, Any]:
    if (changes or {}).get("fsdp"):
        shard_on_cpu()
    if control:
        BROKEN[control]()
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    recorder = Recorder()
    # an encoder's samples are shared by one method only; one rank cannot hold its longest
    is_encoder = family == "bert"
    trainer = (HeteroEmbeddingTrainer if is_encoder else Scripted)(
        model_of(adapters, family),
        arguments(folder, world, global_batch=4, **{"remove_unused_columns": True, **(changes or {})}),
        train_dataset=datasets.Dataset.from_list(rows()),
        eval_dataset=rows()[:5],
        callbacks=[recorder],
        pooling=pooling,
        scale=SCALE,
        hetero=HeteroConfig(max_tokens_per_rank=30 if is_encoder else None),
    )
    trainer.train(resume_from_checkpoint=resume)
    return {
        "gradients": recorder.gradients,
        "weights": {plain_name(name): whole(p) for name, p in trainer.model.named_parameters()},
        "logs": trainer.state.log_history,
        "wrapper": type(trainer.model_wrapped).__name__,
        "evaluated": trainer.evaluate()["eval_loss"],
    }


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert largest_difference(ours, theirs) < 1e-12
    assert largest_difference(found["weights"], expected["weights"]) < 1e-12
    logged = [entry["loss"] for entry in found["logs"] if "loss" in entry]
    assert logged == pytest.approx(expected["losses"], rel=1e-5)


def test_embeddings_are_learned_the_same(tmp_path: Any) -> None:
    """On two ranks, in one micro-batch or several, gradients, weights and losses are those of whole batches."""
    changes = {"per_device_eval_batch_size": 4}
    expected, model = reference("last"), model_of()
    for rank in run_ranks(learned, 2, str(tmp_path), "last", False, changes):
        compare(rank, expected)
        model.load_state_dict(rank["weights"])
        with torch.no_grad():
            loss = loss_of(model.eval(), rows()[:5], "last").item()
        assert rank["evaluated"] == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_each_pooling_is_learned_the_same(pooling: str, tmp_path: Any) -> None:
    """So they are where an embedding is a mean over tokens, or a first token's; on one rank, in accumulated batches."""
    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    compare(learned(str(tmp_path), pooling, changes=changes), reference(pooling))


def test_encoders_learn_embeddings(tmp_path: Any) -> None:
    """So they are of a model whose tokens see those after them, too, also where ranks share a text."""
    found = run_ranks(learned, 2, str(tmp_path), "mean", False, None, "", None, "bert")[0]
    compare(found, reference("mean", family="bert"))


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["last", "mean", "first"])
def test_each_pooling_on_four_ranks(pooling: str, tmp_path: Any) -> None:
    """And on four, by every method and degree, texts of a row anywhere."""
    for rank in run_ranks(learned, 4, str(tmp_path), pooling):
        compare(rank, reference(pooling))


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True], ids=["weights", "adapters"])
@pytest.mark.parametrize("changes", [{}, SHARDED, {"gradient_checkpointing": True}], ids=["whole", "sharded", "again"])
def test_however_the_model_is_held(adapters: bool, changes: dict[str, Any], tmp_path: Any) -> None:
    """So they are of adapters, of sharded weights, and where layers run again."""
    found = run_ranks(learned, 2, str(tmp_path), "mean", adapters, changes)[0]
    assert found["wrapper"].startswith("FSDP") == bool(changes.get("fsdp"))
    compare(found, reference("mean", adapters))


@pytest.mark.slow
def test_in_replicas_of_shards(tmp_path: Any) -> None:
    """So they are where weights lie in parts over two ranks each: embeddings pass between all four."""
    mesh = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
    for rank in run_ranks(learned, 4, str(tmp_path), "mean", False, {**SHARDED, "parallelism_config": mesh}):
        assert rank["wrapper"].startswith("FSDP")
        compare(rank, reference("mean"))


@pytest.mark.slow
def test_a_resumed_run_ends_the_same(tmp_path: Any) -> None:
    """A run that goes on from its second step ends with the weights of one that was not interrupted."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    run_ranks(learned, 2, str(tmp_path), "last", False, saving)
    found = run_ranks(learned, 2, str(tmp_path), "last", False, {}, "", str(tmp_path / "checkpoint-2"))[0]
    assert largest_difference(found["weights"], reference("last")["weights"]) < 1e-12


# -------------------------------------------------------------------------------------------------- negative controls


def keep_to_the_rank() -> None:
    """Let each rank have its own texts only; the others' are zeros."""
    from hf_hetero.trainer.embeddings import embedding

    embedding.over_ranks = lambda parts, group, where: parts + 1e-9


def pool_each_span() -> None:
    """Take the last token that a rank holds of a text for the text's."""
    from hf_hetero.trainer.embeddings import embedding, pooling

    def last_of_spans(hidden: Any, spans: Any, texts: Any, lengths: Any, how: str) -> Any:
        ends = {texts[span.sample]: span.end for span in spans}
        return pooling.pooled(hidden, spans, texts, [ends.get(text, n) for text, n in enumerate(lengths)], how)

    embedding.pooled = last_of_spans


def forget_the_factors() -> None:
    """Learn from each embedding alike, whatever the loss says."""
    from hf_hetero.trainer.embeddings import embedding

    grad = torch.autograd.grad
    embedding.torch.autograd.grad = lambda *args, **kwargs: tuple(map(torch.ones_like, grad(*args, **kwargs)))


BROKEN = {"rank": keep_to_the_rank, "span": pool_each_span, "factors": forget_the_factors}


@pytest.mark.parametrize("control", ["rank", pytest.param("span", marks=pytest.mark.slow), "factors"])
def test_what_is_broken_is_caught(control: str, tmp_path: Any) -> None:
    """The comparison fails with negatives of one rank, ends of spans, and factors that are none of the loss."""
    found = run_ranks(learned, 2, str(tmp_path), "last", False, {"max_steps": 2}, control)[0]
    expected = reference("last", num_steps=2)
    differences = [
        largest_difference(ours, theirs) for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True)
    ]
    assert max(differences) > 1e-3


# ------------------------------------------------------------------------------------------------------------ dropout


class Watched(Scripted):
    """Keeps each call's embeddings."""

    def _embeddings(self, model: Any, inputs: dict[str, Any], batch: Any) -> torch.Tensor:
        found = super()._embeddings(model, inputs, batch)
        self.seen = [*getattr(self, "seen", []), (inputs["hetero"].micro_batch, found.detach())]
        return found


def test_dropout_leaves_out_the_same_twice(tmp_path: Any) -> None:
    """What is learned from is what the loss was of: a micro-batch's noise is the same both times, and another's not."""
    model = model_of()
    model.norm = torch.nn.Sequential(model.norm, torch.nn.Dropout(0.5))
    args = arguments(str(tmp_path), 1, global_batch=4, max_steps=3)
    trainer = Watched(model, args, train_dataset=rows(), scale=SCALE)
    trainer.train()
    twice = [n for n in range(1, len(trainer.seen)) if trainer.seen[n][0] == 0 and trainer.seen[n - 1][0] > 0]
    assert twice
    start = twice[0]
    num = trainer.seen[start - 1][0] + 1
    for first, second in zip(trainer.seen[start - num : start], trainer.seen[start : start + num], strict=True):
        assert first[0] == second[0]
        assert torch.equal(first[1] == 0, second[1] == 0)
        # other addresses may round otherwise
        assert torch.allclose(first[1], second[1], rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- what is said


def test_what_is_refused(tmp_path: Any) -> None:
    """Models with a head, poolings that there are not, texts that would be torn apart, and rows that are none."""
    args = arguments(str(tmp_path), 1, global_batch=4)
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM has a head"):
        HeteroEmbeddingTrainer(tiny_model(), args, train_dataset=rows())
    with pytest.raises(ConfigError, match="pooling='max': choose one of last, mean, first"):
        HeteroEmbeddingTrainer(model_of(), args, train_dataset=rows(), pooling="max")
    split = HeteroConfig(max_sample_tokens=8, longer_samples="split")
    with pytest.raises(ConfigError, match="several texts of one"):
        HeteroEmbeddingTrainer(model_of(), args, train_dataset=rows(), hetero=split)
    for data, message in (
        ([{"text": [5]}], "A row has the columns \\['text'\\]"),
        ([{"query": [5], "passage": []}], "no tokens in its column 'passage'"),
        ([{"query": [5], "passage": "words"}], "text in its column 'passage'"),
    ):
        with pytest.raises(HeteroError, match=message):
            HeteroEmbeddingTrainer(model_of(), args, train_dataset=data * 4).train()
    unlike = [{"query": [5], "passage": [6], "negative": [7]}, {"query": [5], "passage": [6]}] * 4
    with pytest.raises(BadSample, match="Give each row as many"):
        HeteroEmbeddingTrainer(model_of(), args, train_dataset=unlike).train()
    with pytest.raises(UnsupportedModel, match="evaluates the loss"):
        HeteroEmbeddingTrainer(model_of(), args, train_dataset=rows()).predict(rows())


def test_chance(tmp_path: Any) -> None:
    """Embeddings that are all alike leave every candidate the same share."""
    from hf_hetero.trainer.embeddings.ranking import ranking_loss

    loss = ranking_loss(torch.ones(3, 4, 8), scale=20.0)
    assert loss.item() == pytest.approx(math.log(9))
