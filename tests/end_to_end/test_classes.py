"""Models of classes and numbers learn under plans what one process learns of each sample alone, whatever the plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import (
    FAMILIES,
    IGNORE,
    LENGTHS,
    TINY,
    Recorder,
    ScriptedTrainer,
    arguments,
    gradients_of,
    keep_float64,
    largest_difference,
    run_ranks,
    samples,
    shard_on_cpu,
    tiny_model,
    trained,
    trainer_order,
)
from torch.nn import functional as F
from transformers import Trainer

from hf_hetero import HeteroConfig, HeteroTrainer, UnsupportedModel
from hf_hetero.errors import BadSample

SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
KINDS: dict[str, dict[str, Any]] = {  # what labels are -> what the config says of them
    "class": {"num_labels": 3},
    "classes": {"num_labels": 3},
    "number": {"num_labels": 1},
    "numbers": {"num_labels": 2, "problem_type": "regression"},
    "relevance": {"num_labels": 1, "problem_type": "multi_label_classification"},
    "tokens": {"num_labels": 4},
}


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def rows(kind: str, lengths: list[int] = LENGTHS) -> list[dict[str, Any]]:
    """Samples with labels of a kind; some end with tokens of padding, some classes are not to be learned."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for number, sample in enumerate(samples(lengths)):
        ids, draw = sample["input_ids"], torch.rand(3, generator=generator, dtype=torch.float64)
        if number % 3 == 1 and len(ids) > 2 and kind != "tokens":
            ids[-2:] = [0, 0]
        label: Any = {
            "class": IGNORE if number == 7 else int(3 * draw[0]),
            "classes": (draw > 0.5).double().tolist(),
            "number": draw[0].item(),
            "numbers": draw[:2].tolist(),
            "relevance": float(draw[0] > 0.5),
            "tokens": [IGNORE if (place + number) % 5 == 0 else token % 4 for place, token in enumerate(ids)],
        }[kind]
        made.append({"input_ids": ids, "labels": label})
    return made


def model_of(kind: str, adapters: bool = False, family: str = "llama") -> Any:
    torch.manual_seed(0)
    name, special = ("Bert", NO_DROPOUT) if family == "bert" else FAMILIES[family]
    shape = getattr(transformers, f"{name}Config")(
        **{**TINY, **special, **KINDS[kind]}, classifier_dropout=0.0, attn_implementation="sdpa"
    )
    ending = "ForTokenClassification" if kind == "tokens" else "ForSequenceClassification"
    model = keep_float64(getattr(transformers, f"{name}{ending}")(shape).double())
    if not adapters:
        return model
    from peft import LoraConfig, get_peft_model

    task = "TOKEN_CLS" if kind == "tokens" else "SEQ_CLS"
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task, init_lora_weights=False)
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


def loss_of(model: Any, kind: str, row: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """Transformers' own loss of one sequence, or plain cross-entropies of its tokens; and by how many it counts."""
    ids, dtype = torch.tensor([row["input_ids"]]), None if kind in ("class", "tokens") else torch.float64
    labels = torch.tensor([row["labels"]], dtype=dtype)
    if kind == "tokens":
        logits = model(input_ids=ids).logits[0]
        return F.cross_entropy(logits, labels[0], ignore_index=IGNORE, reduction="sum"), int((labels != IGNORE).sum())
    if row["labels"] == IGNORE:
        return 0 * model(input_ids=ids).logits.sum(), 0
    return model(input_ids=ids, labels=labels[:, None] if kind == "relevance" else labels).loss, 1


def reference(kind: str, adapters: bool = False, num_steps: int = 4, family: str = "llama") -> dict[str, Any]:
    """Each sample alone, losses summed and divided by the labels of the step, plain gradient descent."""
    model, data = model_of(kind, adapters, family).train(), rows(kind)
    gradients, losses = [], []
    for step in trainer_order(len(data), 12, 7, num_steps):
        model.zero_grad()
        found = [loss_of(model, kind, data[row]) for row in step]
        loss = sum(part for part, _ in found) / sum(count for _, count in found)
        loss.backward()
        gradients.append(gradients_of(model))
        losses.append(loss.item())
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.05 * p.grad
    return {
        "gradients": gradients,
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "losses": losses,
    }


def learned(
    kind: str,
    adapters: bool = False,
    changes: dict[str, Any] | None = None,
    control: str = "",
    resume: str | None = None,
    family: str = "llama",
) -> dict[str, Any]:
    """A run on the ranks of this process group, maybe with something broken on purpose."""
    if (changes or {}).get("fsdp"):
        shard_on_cpu()
    if control:
        BROKEN[control]()
    if family == "bert":  # whose longest samples one rank cannot hold
        hetero = HeteroConfig(max_tokens_per_rank=40)
        return trained(model_of(kind, adapters, family), rows(kind), HeteroTrainer, hetero, **(changes or {}))
    return trained(model_of(kind, adapters, family), rows(kind), resume=resume, **(changes or {}))


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert largest_difference(ours, theirs) < 1e-12
    assert largest_difference(found["weights"], expected["weights"]) < 1e-12
    logged = [entry["loss"] for entry in found["logs"] if "loss" in entry]
    assert logged == pytest.approx(expected["losses"], rel=1e-5)


@pytest.mark.parametrize("kind", ["class", "tokens"])
def test_classes_are_learned_the_same(kind: str) -> None:
    """On two ranks that share samples in changing ways, gradients, weights and losses are those of one process."""
    for rank in run_ranks(learned, 2, kind):
        compare(rank, reference(kind))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("class", "tokens")])
def test_each_kind_of_label_is_learned_the_same(kind: str) -> None:
    """So they are of several classes at once, of numbers, and of a reranker's relevance, in accumulated batches."""
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    compare(learned(kind, changes=changes), reference(kind))


def test_encoders_learn_classes_of_tokens() -> None:
    """So they are of a model whose tokens see those after them, too, also where ranks share a sample."""
    compare(run_ranks(learned, 2, "tokens", False, None, "", None, "bert")[0], reference("tokens", family="bert"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_each_kind_of_label_on_four_ranks(kind: str) -> None:
    """And on four, by every method and degree."""
    for rank in run_ranks(learned, 4, kind):
        compare(rank, reference(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classes", "tokens"])
@pytest.mark.parametrize("adapters", [False, True], ids=["weights", "adapters"])
@pytest.mark.parametrize("changes", [{}, SHARDED, {"gradient_checkpointing": True}], ids=["whole", "sharded", "again"])
def test_however_the_model_is_held(kind: str, adapters: bool, changes: dict[str, Any]) -> None:
    """So they are of adapters with a head that is trained whole, of sharded weights, and where layers run again."""
    found = run_ranks(learned, 2, kind, adapters, changes)[0]
    assert found["wrapper"].startswith("FSDP") == bool(changes.get("fsdp"))
    if adapters:
        assert any("modules_to_save" in name for name in found["weights"])
    compare(found, reference(kind, adapters))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3-windows", "mistral"])
def test_other_families(family: str) -> None:
    """Windows change nothing of it."""
    compare(run_ranks(learned, 2, "class", False, None, "", None, family)[0], reference("class", family=family))


@pytest.mark.slow
def test_a_resumed_run_ends_the_same(tmp_path: Any) -> None:
    """A run that goes on from its second step ends with the weights of one that was not interrupted."""
    saving = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    run_ranks(learned, 2, "classes", False, saving)
    resumed = {"output_dir": str(tmp_path)}
    found = run_ranks(learned, 2, "classes", False, resumed, "", str(tmp_path / "checkpoint-2"))[0]
    assert largest_difference(found["weights"], reference("classes")["weights"]) < 1e-12


# -------------------------------------------------------------------------------------------------- negative controls


def pool_the_pack() -> None:
    """Take the model's own score, of the last token of the pack, for that of each sample."""
    from hf_hetero.trainer.classes import planned

    def outputs(model: Any, inputs: dict[str, Any], classes: Any) -> dict[str, Any]:
        given = {name: values for name, values in inputs.items() if name not in planned.LABELS}
        logits = model(**given).logits
        return {"logits": logits[:, None].expand(1, given["input_ids"].shape[1], -1), "reached": 0}

    planned.outputs_by_token = outputs


def shift_the_labels() -> None:
    """Let each token learn the label of the one after it, as if labels were tokens."""
    from hf_hetero.collators import ClassCollator, PackedCollator

    ClassCollator.sample = PackedCollator.sample


def average_over_ranks() -> None:
    """Take the mean of the ranks' own means."""
    from hf_hetero.model.classes.class_loss import class_loss, has_label
    from hf_hetero.trainer.classes import planned

    def mean(logits: Any, labels: Any, problem: str, weights: Any = None) -> Any:
        return class_loss(logits, labels, problem) * 6 / max(1, int(has_label(labels).sum()))

    planned.class_loss = mean


BROKEN = {"pack": pool_the_pack, "shift": shift_the_labels, "means": average_over_ranks}


@pytest.mark.parametrize(("kind", "control"), [("class", "pack"), ("tokens", "shift"), ("tokens", "means")])
def test_what_is_broken_is_caught(kind: str, control: str) -> None:
    """The comparison fails where the last token of a pack counts, where labels are shifted, and for means of means."""
    found = run_ranks(learned, 2, kind, False, {"max_steps": 1}, control)[0]
    assert largest_difference(found["gradients"][0], reference(kind, num_steps=1)["gradients"][0]) > 1e-3


# ---------------------------------------------------------------------------------------------------- plain training


def padded(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    most = max(len(row["input_ids"]) for row in batch)
    ids = torch.tensor([row["input_ids"] + [0] * (most - len(row["input_ids"])) for row in batch])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (most - len(row["input_ids"])) for row in batch])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in batch])}


def plain(folder: str, **changes: Any) -> list[dict[str, torch.Tensor]]:
    recorder = Recorder()
    args = arguments(folder, 1, **{"max_steps": 2, **changes})
    data = [row for row in rows("class") if row["labels"] != IGNORE] * 2
    Trainer(model_of("class"), args, train_dataset=data, data_collator=padded, callbacks=[recorder]).train()
    return recorder.gradients


def test_a_step_is_one_batch_of_a_plain_trainer(tmp_path: Any) -> None:
    """The gradient is Trainer's of one batch that is the whole step. It adds up the means of accumulated batches."""
    data = [row for row in rows("class") if row["labels"] != IGNORE] * 2
    found = trained(model_of("class"), data, max_steps=2)["gradients"]
    for ours, theirs in zip(found, plain(str(tmp_path)), strict=True):
        assert largest_difference(ours, theirs) < 1e-12
    (accumulated,) = plain(str(tmp_path), max_steps=1, per_device_train_batch_size=6, gradient_accumulation_steps=2)
    assert largest_difference({name: 2 * gradient for name, gradient in found[0].items()}, accumulated) < 1e-12


# --------------------------------------------------------------------------------------------------------- evaluation


def evaluated(kind: str, folder: str, **changes: Any) -> dict[str, Any]:
    """What an evaluation hands to metrics, and what a prediction without labels gives."""
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"rows": len(prediction.predictions)}

    args = arguments(folder, 1, per_device_eval_batch_size=5, **changes)
    model, data = model_of(kind), rows(kind)
    trainer = ScriptedTrainer(model, args, eval_dataset=data, compute_metrics=metrics)
    found = trainer.evaluate()
    unlabelled = [{"input_ids": row["input_ids"]} for row in data]
    predicted = trainer.predict(unlabelled).predictions
    return {"metrics": found, "seen": seen[0], "predicted": predicted, "problem": model.config.problem_type}


@pytest.mark.parametrize("kind", ["class", "classes", "number", "tokens"])
def test_evaluation_gives_each_row_its_scores(kind: str, tmp_path: Any) -> None:
    """Predictions and labels are in the order of the rows, one score a sequence, and the loss is the mean over rows."""
    model, data = model_of(kind).eval(), rows(kind)
    found = run_ranks(evaluated, 2, kind, str(tmp_path))[0]
    with torch.no_grad():
        scores = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0].numpy() for row in data]
        losses = [loss_of(model, kind, row) for row in data]
    mean = sum(loss.item() for loss, _ in losses) / sum(count for _, count in losses)
    assert found["metrics"]["eval_loss"] == pytest.approx(mean, rel=1e-6)
    assert found["metrics"]["eval_rows"] == len(data)
    for predictions in (found["seen"].predictions, found["predicted"]):
        if kind == "tokens":
            for row, expected in zip(predictions, scores, strict=True):
                np.testing.assert_allclose(row[: len(expected)], expected, rtol=1e-6, atol=1e-9)
        else:
            np.testing.assert_allclose(predictions, np.stack(scores), rtol=1e-6, atol=1e-9)
    if kind != "tokens":
        np.testing.assert_allclose(found["seen"].label_ids, np.array([row["labels"] for row in data]), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------- what is said


def test_the_config_says_which_problem_it_was() -> None:
    """As transformers does: a pipeline chooses by it between one class and several."""
    for kind, problem in (
        ("class", "single_label_classification"),
        ("classes", "multi_label_classification"),
        ("number", "regression"),
    ):
        model = model_of(kind)
        trained(model, rows(kind), max_steps=1)
        assert model.config.problem_type == problem


def test_weights_of_rows_are_factors(tmp_path: Any) -> None:
    """A weight of 0 takes a row's loss away, and leaves the divisor alone."""
    data = [{**row, "weight": float(number % 2)} for number, row in enumerate(rows("classes"))]
    found = trained(model_of("classes"), data, hetero=HeteroConfig(weight_column="weight"), max_steps=1)
    model, step = model_of("classes"), trainer_order(len(data), 12, 7, 1)[0]
    loss = sum(loss_of(model, "classes", data[row])[0] for row in step if row % 2) / len(step)
    loss.backward()
    assert largest_difference(found["gradients"][0], gradients_of(model)) < 1e-12


def test_an_untested_type_is_tried(tmp_path: Any) -> None:
    """A tiny instance of a model that nobody has compared is tried with its own head, and taken."""
    for name in ("Starcoder2ForSequenceClassification", "Starcoder2ForTokenClassification"):
        shape = {key: value for key, value in TINY.items() if key != "head_dim"}
        config = transformers.Starcoder2Config(**shape, num_labels=3, attention_dropout=0.0, residual_dropout=0.0)
        HeteroTrainer(getattr(transformers, name)(config), arguments(str(tmp_path), 1), train_dataset=rows("class"))


class OwnLoss(HeteroTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


def test_what_is_refused(tmp_path: Any) -> None:
    """A loss of one's own, parts of a sequence, and models that score something else than the last token."""
    args = arguments(str(tmp_path), 1)
    with pytest.raises(UnsupportedModel, match=r"OwnLoss\.compute_loss would be given logits of tokens"):
        OwnLoss(model_of("class"), args, train_dataset=rows("class"))
    split = HeteroConfig(max_sample_tokens=8, longer_samples="split")
    with pytest.raises(UnsupportedModel, match="several sequences of one that has one label"):
        HeteroTrainer(model_of("class"), args, train_dataset=rows("class"), hetero=split)
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    with pytest.raises(UnsupportedModel, match="BertForSequenceClassification does not score sequences"):
        HeteroTrainer(transformers.BertForSequenceClassification(config), args, train_dataset=rows("class"))
    with pytest.raises(UnsupportedModel, match="only decoder-only language models"):
        HeteroTrainer(tiny_model().model, args, train_dataset=rows("class"))


@pytest.mark.parametrize(
    ("kind", "label", "message"),
    [
        ("class", 3, r"has the class 3, and the model has 3: 0 to 2"),
        ("class", 0.5, r"has the label 0.5, and the model has 3 classes"),
        ("class", [1, 2], r"has the label \[1, 2\], and the model has 3 labels"),
        ("number", "good", r"has the label 'good', and labels are numbers"),
        ("classes", [0.0, float("nan"), 1.0], r"give each row as many finite numbers"),
        ("tokens", [1, 2], r"has 40 input_ids but 2 labels"),
        ("tokens", [9] * 40, r"has the class 9, and the model has 4"),
        ("class", None, r"has no labels, so there is nothing to learn.*one for the row"),
    ],
)
def test_labels_that_cannot_be_are_named(kind: str, label: Any, message: str) -> None:
    """The error names the row, what it has, and what the model has."""
    data = rows(kind)
    data[0]["labels"] = label
    with pytest.raises(BadSample, match=rf"(?si)row \d+.*{message}"):
        trained(model_of(kind), data[:1] * 12, max_steps=1)
