"""This module makes a tokenizer of one's own texts, for models that are trained from scratch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"


def make_tokenizer(texts: Iterable[str], num_entries: int, folder: Path) -> None:
    """Train a byte-level BPE tokenizer, and save it whole or not at all; of two runs at once the faster one's stays.

    Args:
        texts: to train on.
        num_entries: of the vocabulary, with the 256 bytes and the end token.
        folder: where to save it; `AutoTokenizer.from_pretrained` reads it there.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=num_entries, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    with tempfile.TemporaryDirectory(dir=folder.parent) as new, suppress(OSError):
        fast.save_pretrained(f"{new}/whole")
        os.rename(f"{new}/whole", folder)  # fails if another run was faster, which is as good
