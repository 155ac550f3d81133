"""Behaviour by behaviour: what TRL's SFTTrainer does, HeteroSFTTrainer does, or refuses in words that name it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from conformance import Behaviour, Table, compare, learned, subclass
from helpers import ScriptedPlanner, scripted, tiny_model
from torch.nn import functional as F
from transformers import TrainerCallback
from words import say, tokenizer

from hf_hetero.data.plan_ahead import PlanSource

trl = pytest.importorskip("trl")

from hf_hetero import HeteroSFTTrainer  # noqa: E402

pytestmark = pytest.mark.slow

behaviour = Table()


class Here(HeteroSFTTrainer):
    """Steps of one to four micro-batches, which no cost model would choose here."""

    def _plan_source(self) -> PlanSource:
        return scripted(ScriptedPlanner(self.args.world_size))

    def _planners(self) -> Any:
        return SimpleNamespace(for_evaluation=self._plan_source)


# ----------------------------------------------------------------------------------------------------- what runs share

LENGTHS = (3, 21, 7, 12, 30, 5, 9, 17, 4, 26, 11, 8)


def table(rows: list[dict[str, Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


def texts(num: int = 12, name: str = "text") -> datasets.Dataset:
    return table([{name: say(length, n)} for n, length in enumerate(LENGTHS[:num])])


def pairs(num: int = 12) -> datasets.Dataset:
    return table([{"prompt": say(1 + n % 4, n), "completion": " " + say(m, n)} for n, m in enumerate(LENGTHS[:num])])


def turns(n: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": say(1 + n % 5, n)}, {"role": "assistant", "content": say(LENGTHS[n], n)}]


def chats(num: int = 12) -> datasets.Dataset:
    return table([{"messages": turns(n) * (1 + n % 2)} for n in range(num)])


def asked_chats() -> datasets.Dataset:
    return table([{"prompt": turns(n)[:1], "completion": turns(n)[1:]} for n in range(12)])


def tokens() -> list[dict[str, Any]]:
    return [{"input_ids": tokenizer()(row["text"])["input_ids"]} for row in texts()]


def options(folder: str, **changes: Any) -> Any:
    usual: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 16,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "activation_checkpointing": False,
    }
    return trl.SFTConfig(folder, **{**usual, **changes})


def make(kind: Any, folder: str, data: Any, **changes: Any) -> Any:
    names = (
        "callbacks",
        "compute_loss_func",
        "compute_metrics",
        "data_collator",
        "eval_dataset",
        "formatting_func",
        "model",
        "peft_config",
        "preprocess_logits_for_metrics",
    )
    given = {name: changes.pop(name) for name in names if name in changes}
    model = given.pop("model", None) or tiny_model()
    return kind(model, options(folder, **changes), train_dataset=data, processing_class=tokenizer(), **given)


TIMES = ("_runtime", "_per_second", "_time")


def logs(trainer: Any) -> list[dict[str, Any]]:
    """All that was logged, but for times, and FLOPs, which count padding."""

    def is_kept(name: str) -> bool:
        return not (name.endswith(TIMES) or name.startswith("hetero/") or name == "total_flos")

    return [{name: value for name, value in log.items() if is_kept(name)} for log in trainer.state.log_history]


def trained(kind: Any, folder: str, data: Any, **changes: Any) -> Any:
    """What is learnt and all that is logged of it, and the rows that it was learnt from."""
    trainer = make(kind, folder, data, **changes)
    trainer.train()
    rows = [dict(row) for row in trainer.train_dataset]
    return learned(trainer), logs(trainer), [(row.get("input_ids"), row.get("labels")) for row in rows]


# ----------------------------------------------------------------------------------------------------- kinds of rows


@behaviour()
def language_modeling(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts())


@behaviour()
def prompts_and_completions(kind: Any, folder: str) -> Any:
    return trained(kind, folder, pairs())


@behaviour()
def prompts_that_are_learnt(kind: Any, folder: str) -> Any:
    return trained(kind, folder, pairs(), completion_only_loss=False)


@behaviour()
def conversations(kind: Any, folder: str) -> Any:
    return trained(kind, folder, chats())


@behaviour()
def conversations_with_a_prompt(kind: Any, folder: str) -> Any:
    return trained(kind, folder, asked_chats())


@behaviour()
def assistants_words_only(kind: Any, folder: str) -> Any:
    return trained(kind, folder, chats(), assistant_only_loss=True)


@behaviour()
def assistants_words_in_completions_only(kind: Any, folder: str) -> Any:
    return trained(kind, folder, asked_chats(), assistant_only_loss=True, completion_only_loss=True)


@behaviour()
def tools(kind: Any, folder: str) -> Any:
    tool = {"type": "function", "function": {"name": "w1", "parameters": {"type": "object", "properties": {}}}}
    return trained(kind, folder, table([{"messages": turns(n), "tools": [tool]} for n in range(12)]))


@behaviour()
def keywords_of_the_template(kind: Any, folder: str) -> Any:
    rows = [{"messages": turns(n), "chat_template_kwargs": {"thinks": True}} for n in range(12)]
    return trained(kind, folder, table(rows))


@behaviour()
def formatted_rows(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts(name="said"), formatting_func=lambda row: "w1 w2 " + row["said"])


@behaviour()
def text_of_another_name(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts(name="said"), dataset_text_field="said")


@behaviour()
def tokens_of_rows(kind: Any, folder: str) -> Any:
    return trained(kind, folder, table(tokens()))


@behaviour()
def tokens_with_masks(kind: Any, folder: str) -> Any:
    rows = [{**row, "completion_mask": [0, *[1] * (len(row["input_ids"]) - 1)]} for row in tokens()]
    return trained(kind, folder, table(rows))


@behaviour()
def tokens_with_labels(kind: Any, folder: str) -> Any:
    rows = [{**row, "labels": [-100, -100, *row["input_ids"][2:]]} for row in tokens()]
    return trained(kind, folder, table(rows))


@behaviour()
def tokens_as_they_are(kind: Any, folder: str) -> Any:
    rows = [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in tokens()]
    return trained(kind, folder, table(rows), dataset_kwargs={"skip_prepare_dataset": True})


@behaviour()
def tokens_as_they_are_without_labels(kind: Any, folder: str) -> Any:
    return trained(kind, folder, table(tokens()), dataset_kwargs={"skip_prepare_dataset": True})


@behaviour()
def tokenised_as_it_is_read(kind: Any, folder: str) -> Any:
    def tokenise(batch: Any) -> Any:
        ids = tokenizer()(batch["text"])["input_ids"]
        return {"input_ids": ids, "labels": ids}

    data = texts().with_transform(tokenise)
    return trained(kind, folder, data, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False)


@behaviour()
def other_columns(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts().add_column("note", ["x"] * 12))


@behaviour()
def shuffled_rows(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts(), shuffle_dataset=True)


@behaviour()
def a_stream(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts().to_iterable_dataset(), max_steps=5)


@behaviour()
def a_stream_of_prompts(kind: Any, folder: str) -> Any:
    return trained(kind, folder, pairs().to_iterable_dataset(), max_steps=3)


@behaviour()
def a_packed_stream(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts().to_iterable_dataset(), max_steps=2, packing=True, max_length=40)


# ------------------------------------------------------------------------------------------------- lengths and packing


@behaviour()
def cut_rows(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts(), max_length=9)


@behaviour()
def rows_cut_at_their_start(kind: Any, folder: str) -> Any:
    return trained(kind, folder, pairs(), max_length=9, truncation_mode="keep_end")


@behaviour()
def rows_cut_to_their_prompts(kind: Any, folder: str) -> Any:
    return trained(kind, folder, pairs(), max_length=4)


@behaviour()
def packed(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts(), packing=True, max_length=32, per_device_train_batch_size=2)


@behaviour()
def packed_and_split(kind: Any, folder: str) -> Any:
    changes = {"packing": True, "packing_strategy": "bfd_split", "max_length": 10}
    return trained(kind, folder, texts(), **changes)


@behaviour()
def packed_without_a_thought(kind: Any, folder: str) -> Any:
    changes = {"packing": True, "packing_strategy": "wrapped", "max_length": 16}
    return trained(kind, folder, texts(), **changes)


@behaviour()
def packed_prompts(kind: Any, folder: str) -> Any:
    return trained(kind, folder, pairs(), packing=True, max_length=32, per_device_train_batch_size=2)


@behaviour()
def packed_chats(kind: Any, folder: str) -> Any:
    changes = {"packing": True, "max_length": 32, "assistant_only_loss": True, "per_device_train_batch_size": 2}
    return trained(kind, folder, chats(), **changes)


@behaviour()
def without_padding(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts(), padding_free=True, max_length=None)


@behaviour()
def prompts_without_padding(kind: Any, folder: str) -> Any:
    return trained(kind, folder, pairs(), padding_free=True, max_length=None)


@behaviour()
def padded_to_a_multiple(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts(), pad_to_multiple_of=8)


@behaviour()
def evaluation_is_packed_too(kind: Any, folder: str) -> Any:
    changes: dict[str, Any] = {"packing": True, "max_length": 32, "eval_dataset": texts(7), "eval_strategy": "epoch"}
    return trained(kind, folder, texts(), **changes)


@behaviour()
def evaluation_is_not_packed(kind: Any, folder: str) -> Any:
    changes: dict[str, Any] = {"packing": True, "max_length": 32, "eval_dataset": texts(7), "eval_strategy": "epoch"}
    return trained(kind, folder, texts(), **changes, eval_packing=False)


@behaviour()
def only_evaluation_is_packed(kind: Any, folder: str) -> Any:
    """TRL's documents would see each other then; here each is evaluated for itself, as where none is packed."""
    changes: dict[str, Any] = {"max_length": 32, "eval_dataset": texts(7), "eval_strategy": "epoch"}
    return trained(kind, folder, texts(), **changes, eval_packing=kind is Here)


# ------------------------------------------------------------------------------------------------------------- losses


@behaviour()
def dynamic_fine_tuning(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts(), loss_type="dft")


@behaviour()
def dynamic_fine_tuning_accumulated(kind: Any, folder: str) -> Any:
    found = trained(kind, folder, pairs(), loss_type="dft", gradient_accumulation_steps=3)
    return found[0]


@behaviour()
def accumulated(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, pairs(), gradient_accumulation_steps=2, num_train_epochs=2)
    trainer.train()
    return learned(trainer), [log.get("num_tokens") for log in trainer.state.log_history]


def summed(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum") / num_items_in_batch


@behaviour()
def loss_function(kind: Any, folder: str) -> Any:
    return trained(kind, folder, pairs(), compute_loss_func=summed)


@behaviour("compute_loss_func gives")
def loss_function_that_is_a_mean(kind: Any, folder: str) -> Any:
    def mean(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return summed(outputs, labels, (labels[:, 1:] != -100).sum())

    return trained(kind, folder, pairs(), compute_loss_func=mean)


@behaviour()
def loss_that_is_watched(kind: Any, folder: str) -> Any:
    seen: list[float] = []

    def compute_loss(self: Any, model: Any, inputs: Any, *others: Any, **kwargs: Any) -> Any:
        loss = kind.compute_loss(self, model, inputs, *others, **kwargs)
        if self.is_in_train and model is self.model_wrapped:
            seen.append(float(loss.detach()))
        return loss

    return trained(subclass(kind, compute_loss=compute_loss), folder, texts()), sum(seen)  # once a micro-batch


@behaviour()
def loss_with_a_penalty(kind: Any, folder: str) -> Any:
    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        total = labels[:, 1:].ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
        loss = summed(outputs, labels, total)
        squares = outputs.logits[:, :-1].logsumexp(-1).square() * (labels[:, 1:] != -100)
        loss = loss + 1e-3 * squares.sum() / total
        return (loss, outputs) if return_outputs else loss

    own = subclass(kind, compute_loss=compute_loss)
    trainer = make(own, folder, pairs())
    trainer.train()
    return learned(trainer)


@behaviour("label_smoothing_factor=0.1")
def smoothed_labels(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts(), label_smoothing_factor=0.1)


@behaviour()
def auxiliary_loss_of_a_router(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts(), model=tiny_model("qwen3-moe"))


@behaviour()
def experts_without_an_auxiliary_loss(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts(), model=tiny_model("qwen3-moe"), router_aux_loss_coef=0.0)


# ------------------------------------------------------------------------------------------------------------- models


@behaviour()
def first_tokens_that_count(kind: Any, folder: str) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    dropouts = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=1, n_head=4, **dropouts))
    return trained(kind, folder, texts(), model=model)


@behaviour()
def logits_that_are_scaled(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts(), model=tiny_model("granite", logits_scaling=3.0))


@behaviour()
def logits_with_a_soft_cap(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts(), model=tiny_model("gemma3"))


@behaviour()
def embeddings_that_are_tied(kind: Any, folder: str) -> Any:
    return trained(kind, folder, pairs(), model=tiny_model("qwen3", tie_word_embeddings=True))


@behaviour()
def model_after_training(kind: Any, folder: str) -> Any:
    model = tiny_model()
    make(kind, folder, texts(), model=model).train()
    logits = model.eval()(torch.tensor([[5, 6, 7]])).logits
    generated = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    return model.config._attn_implementation, type(model.lm_head).__name__, float(logits.sum()), generated.tolist()


# ------------------------------------------------------------------------------------------------------ around a run


def pad(examples: list[Any]) -> dict[str, torch.Tensor]:
    most = max(len(example["input_ids"]) for example in examples)

    def filled(name: str, value: int) -> torch.Tensor:
        return torch.tensor([list(e[name]) + [value] * (most - len(e[name])) for e in examples])

    masks = [[1] * len(e["input_ids"]) + [0] * (most - len(e["input_ids"])) for e in examples]
    labels = filled("labels", -100)
    return {
        "input_ids": filled("input_ids", 0),
        "attention_mask": torch.tensor(masks),
        "labels": labels.where(labels % 2 == 0, -100),
    }


@behaviour()
def own_collator(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts(), data_collator=pad)


@behaviour()
def collator_of_trl(kind: Any, folder: str) -> Any:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collator = DataCollatorForLanguageModeling(pad_token_id=0, pad_to_multiple_of=8)
    return trained(kind, folder, pairs(), data_collator=collator)


@behaviour()
def collator_over_trls(kind: Any, folder: str) -> Any:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    class Halved(DataCollatorForLanguageModeling):
        def torch_call(self, examples: list[Any]) -> Any:
            batch = super().torch_call(examples)
            return {**batch, "labels": batch["labels"].where(batch["labels"] % 2 == 0, -100)}

    return trained(kind, folder, pairs(), data_collator=Halved(pad_token_id=0))


@behaviour()
def transformers_collator(kind: Any, folder: str) -> Any:
    from transformers import DataCollatorForLanguageModeling

    rows = table([{**row, "attention_mask": [1] * len(row["input_ids"])} for row in tokens()])
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    return trained(kind, folder, rows, data_collator=collator, dataset_kwargs={"skip_prepare_dataset": True})


@behaviour()
def adapters(kind: Any, folder: str) -> Any:
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return trained(kind, folder, texts(), peft_config=lora)


@behaviour()
def adapters_with_a_dropout_of_none(kind: Any, folder: str) -> Any:
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    return trained(kind, folder, texts(), peft_config=lora, activation_checkpointing=True)


@behaviour("adds virtual tokens")
def prompt_tuning(kind: Any, folder: str) -> Any:
    from peft import PromptTuningConfig

    return trained(kind, folder, texts(), peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


@behaviour()
def recomputed_activations(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts(), activation_checkpointing=True)


@behaviour()
def recomputed_activations_by_default(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts(), activation_checkpointing=None)


@behaviour()
def selectively_recomputed_activations(kind: Any, folder: str) -> Any:
    kwargs = {"selective": True}
    return trained(kind, folder, texts(), activation_checkpointing=True, activation_checkpointing_kwargs=kwargs)


@behaviour()
def model_by_its_name(kind: Any, folder: str) -> Any:
    tiny_model().save_pretrained(f"{folder}/model")
    return trained(kind, folder, texts(), model=f"{folder}/model", model_init_kwargs={"dtype": "float32"})


@behaviour()
def plain_arguments(kind: Any, folder: str) -> Any:
    from transformers import TrainingArguments

    kept = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "report_to": [], "use_cpu": True, "bf16": False}
    args = TrainingArguments(folder, **kept, activation_checkpointing=False, logging_steps=1, save_strategy="no")
    trainer = kind(tiny_model(), args, train_dataset=texts(), processing_class=tokenizer())
    trainer.train()
    return learned(trainer), logs(trainer), type(trainer.args).__name__


@behaviour()
def loss_of_a_batch_of_ones_own(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, texts())
    batch = next(iter(trainer.get_train_dataloader()))
    return float(trainer.compute_loss(trainer.model, dict(batch)).detach())


@behaviour()
def logs_of_an_epoch(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts(4), logging_strategy="epoch", num_train_epochs=2)


@behaviour()
def steps_between_logs(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, texts(), logging_steps=2, num_train_epochs=2)
    trainer.train()
    return [log.get("num_tokens") for log in trainer.state.log_history]


@behaviour()
def callbacks(kind: Any, folder: str) -> Any:
    class Note(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.seen.append(sorted(name for name in logs if not name.startswith("hetero/")))

    note = Note()
    make(kind, folder, texts(), callbacks=[note], eval_dataset=texts(5), eval_strategy="steps", eval_steps=2).train()
    return note.seen


@behaviour()
def moving_average(kind: Any, folder: str) -> Any:
    bema = trl.BEMACallback(update_freq=1)
    make(kind, folder, texts(), callbacks=[bema]).train()
    return [float(p.double().norm()) for p in bema.running_model.parameters()]


@behaviour()
def resumed(kind: Any, folder: str) -> Any:
    make(kind, folder, pairs(), save_strategy="steps", save_steps=2, packing=False).train()
    files = sorted(path.name for path in Path(folder, "checkpoint-2").iterdir() if "hetero" not in path.name)
    trainer = make(kind, folder, pairs())
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    return learned(trainer), logs(trainer), files


@behaviour()
def trained_twice(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, texts())
    trainer.train()
    trainer.train()
    return learned(trainer), logs(trainer)


# ---------------------------------------------------------------------------------------------------------- evaluation


@behaviour()
def evaluations(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts(), eval_dataset=texts(7), eval_strategy="steps", eval_steps=1)


@behaviour()
def evaluations_by_name(kind: Any, folder: str) -> Any:
    data = {"texts": texts(7), "pairs": pairs(5)}
    return trained(kind, folder, texts(), eval_dataset=data, eval_strategy="epoch")


@behaviour()
def evaluation_of_chats(kind: Any, folder: str) -> Any:
    changes: dict[str, Any] = {"eval_dataset": chats(7), "eval_strategy": "epoch", "assistant_only_loss": True}
    return trained(kind, folder, chats(), **changes)


@behaviour()
def evaluation_of_a_stream(kind: Any, folder: str) -> Any:
    data = texts(7).to_iterable_dataset()
    return trained(kind, folder, texts(), eval_dataset=data, eval_strategy="epoch")


@behaviour()
def evaluation_without_padding(kind: Any, folder: str) -> Any:
    changes: dict[str, Any] = {"eval_dataset": texts(7), "eval_strategy": "epoch"}
    return trained(kind, folder, texts(), padding_free=True, max_length=None, **changes)


@behaviour()
def evaluation_of_other_rows(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, texts(), eval_dataset=texts(7))
    trainer.evaluate(pairs(5))
    trainer.evaluate({"a": texts(3), "b": chats(4)})
    trainer.evaluate()
    return logs(trainer)


@behaviour()
def evaluation_before_training(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, texts(), eval_dataset=texts(7), eval_strategy="epoch", eval_on_start=True)
    trainer.train()
    return learned(trainer), logs(trainer)


@behaviour()
def metrics(kind: Any, folder: str) -> Any:
    def compute(found: Any) -> dict[str, float]:
        right = found.predictions[:, :-1] == found.label_ids[:, 1:]
        kept = found.label_ids[:, 1:] != -100
        return {"right": float((right & kept).sum()), "kept": float(kept.sum())}

    def best(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)

    changes: dict[str, Any] = {"compute_metrics": compute, "preprocess_logits_for_metrics": best}
    return trained(kind, folder, pairs(), eval_dataset=pairs(7), eval_strategy="epoch", **changes)


@behaviour()
def predictions(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, texts(), eval_dataset=texts(7))
    found = trainer.predict(trainer.eval_dataset)
    return found.predictions.shape, found.label_ids.tolist(), found.metrics["test_loss"]


@behaviour()
def loss_of_evaluation_by_another_type(kind: Any, folder: str) -> Any:
    return trained(kind, folder, texts(), eval_dataset=texts(7), eval_strategy="epoch", loss_type="dft")


@behaviour()
def evaluation_by_a_loss_function(kind: Any, folder: str) -> Any:
    def mean(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        total = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return summed(outputs, labels, total)

    return trained(kind, folder, texts(), eval_dataset=texts(7), eval_strategy="epoch", compute_loss_func=mean)


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.filterwarnings("ignore")  # TRL warns of what it will remove, and this is tried, too
@pytest.mark.parametrize("one", behaviour.all, ids=lambda one: one.name)
def test_as_trl_or_refused(one: Behaviour, tmp_path: Path) -> None:
    """The outcome is SFTTrainer's, or a refusal that names what it is about."""
    compare(one, trl.SFTTrainer, Here, tmp_path)
