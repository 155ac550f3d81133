"""The two changed lines: an ordinary fine-tuning script, with Trainer on one process and with ours on four ranks."""

from __future__ import annotations

from typing import Any

import datasets
import torch.distributed as dist
from helpers import arguments, largest_difference, run_ranks, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, Trainer

from hf_hetero import HeteroTrainer


def script(folder: str, trainer_class: Any) -> dict[str, Any]:
    """As in transformers' examples: text, a tokenizer whose pad token is its end token, a stock collator."""
    words = {f"w{i}": i for i in range(90)} | {"</s>": 90}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    texts = [" ".join(f"w{(3 * i + 7 * j) % 90}" for j in range(1 + (i * i * 5) % 61)) + " </s>" for i in range(20)]
    data = datasets.Dataset.from_dict({"text": texts, "source": ["web"] * 20})
    data = data.map(lambda rows: tokenizer(rows["text"]), batched=True)

    world = dist.get_world_size() if dist.is_initialized() else 1
    args = arguments(folder, world, 8, remove_unused_columns=True, max_grad_norm=1.0, max_steps=5)
    model = tiny_model()
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data.select(range(6)),
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"weights": weights, "logs": trainer.state.log_history, "eval": trainer.evaluate()["eval_loss"]}


def test_two_changed_lines(tmp_path: Any) -> None:
    """The same losses, gradient norms and weights, and the same evaluation."""
    plain = script(str(tmp_path / "plain"), Trainer)
    ours = run_ranks(script, 4, str(tmp_path / "ours"), HeteroTrainer)[0]
    for mine, theirs in zip(ours["logs"], plain["logs"], strict=True):
        if "loss" in mine:
            assert abs(mine["loss"] - theirs["loss"]) < 1e-5
            assert abs(mine["grad_norm"] - theirs["grad_norm"]) < 1e-4
    assert largest_difference(ours["weights"], plain["weights"]) < 1e-6
    # the value of one process; Trainer's own on four ranks is another, for it repeats samples to fill its batches
    assert abs(ours["eval"] - plain["eval"]) < 1e-5
