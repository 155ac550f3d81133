"""HeteroSFTTrainer is TRL's SFTTrainer with planned steps. It needs the extra `trl`.

Chat templates, completion-only and assistant-only loss are TRL's: it prepares `input_ids` and `labels`, and these are
planned. `packing` and `padding_free` change nothing but the batch: rows that TRL has packed are taken apart into their
documents, which are shared out anew, without padding. So they are where `eval_packing` is set and `packing` is not:
there the documents of TRL's rows would see each other.
"""

from __future__ import annotations

from typing import Any

from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from hf_hetero.collators import PackedCollator
from hf_hetero.model.classes.labelled import NEXT
from hf_hetero.trainer.trainer import HeteroTrainerMixin


class HeteroSFTTrainer(HeteroTrainerMixin, SFTTrainer):
    """`HeteroSFTTrainer` is `trl.SFTTrainer` with planned steps: same arguments, and `hetero=HeteroConfig(...)`."""

    labelled = (NEXT,)

    def _make_packer(self) -> PackedCollator:
        collator: Any = self.data_collator
        if type(collator) is DataCollatorForLanguageModeling:  # it only pads, or packs; labels are in the dataset
            return PackedCollator(pad_token_id=collator.pad_token_id)
        return super()._make_packer()
