"""The mixin over another Trainer: TRL's SFTTrainer, whose loss has a head of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from helpers import (
    LENGTHS,
    Recorder,
    ScriptedPlanner,
    arguments,
    largest_difference,
    reference_steps,
    run_ranks,
    samples,
    scripted,
    tiny_model,
    trainer_order,
)

from hf_hetero import HeteroTrainerMixin

trl = pytest.importorskip("trl")


def train_sft(folder: str) -> dict[str, Any]:
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    class HeteroSFT(HeteroTrainerMixin, trl.SFTTrainer):
        def _plan_source(self) -> Any:
            return scripted(ScriptedPlanner(self.args.world_size))

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 2, "a": 4}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    plain = arguments(folder, dist.get_world_size()).to_dict()
    names = ("per_device_train_batch_size", "max_steps", "learning_rate", "optim", "lr_scheduler_type", "max_grad_norm")
    args = trl.SFTConfig(
        folder,
        **{name: plain[name] for name in names},
        use_cpu=True,
        bf16=False,
        seed=7,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        max_length=None,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    recorder = Recorder()
    data = datasets.Dataset.from_list(samples(LENGTHS))
    trainer = HeteroSFT(tiny_model(), args, train_dataset=data, processing_class=tokenizer, callbacks=[recorder])
    trainer.train()
    return {"gradients": recorder.gradients, "logs": trainer.state.log_history}


def test_sft_trainer_learns_the_same(tmp_path: Any) -> None:
    """Gradients and losses of SFTTrainer under mixed plans equal the reference; its token count is that of the data."""
    found = run_ranks(train_sft, 4, str(tmp_path))[0]
    steps = trainer_order(len(LENGTHS), 12, 7, 4)
    expected = reference_steps(tiny_model(), samples(LENGTHS), steps)
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert largest_difference(ours, theirs) <= 1e-6
    logs = [entry for entry in found["logs"] if "loss" in entry]
    assert [entry["loss"] for entry in logs] == pytest.approx(expected["losses"], rel=1e-6)
    assert logs[-1]["num_tokens"] == sum(LENGTHS[row] for rows in steps for row in rows)
