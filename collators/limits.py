"""Limits say what a model has room for. They are checked when a sample is read: its row is known, no kernel has run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_hetero.attention.rotary import longest_exact
from hf_hetero.errors import BadSample
from hf_hetero.model.loss import IGNORE_INDEX, shift_labels
from hf_hetero.model.wrapped import text_part
from hf_hetero.samples.samples import Samples

POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings")
"""What models of transformers call a learned embedding of positions."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`Limits` say what a model has room for; None: anything.

    Args:
        num_tokens: rows of its input embedding.
        num_labels: rows of its output embedding.
        longest: tokens of the longest sample.
        reason: why there is a longest sample, and what to do about longer ones, in words.
        padding: where positions are numbered from one after the padding token, as in RoBERTa, that token.
    """

    num_tokens: int | None = None
    num_labels: int | None = None
    longest: int | None = None
    reason: str = ""
    padding: int | None = None

    def check_tokens(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None, name: str, aligned: bool = False
    ) -> None:
        """Refuse tokens and targets that the model does not have. Both are of shape (num_tokens,).

        Args:
            input_ids, labels: of a row.
            name: of the row, for the message.
            aligned: each label is a target, the first, too.

        Raises:
            BadSample: it names the row, the token, its position and the vocabulary.
        """
        _check(input_ids, self.num_tokens, f"{name} has token", 0, "")
        if labels is None:
            return
        targets = labels.long() if aligned else shift_labels(labels.long())  # which never learns from the first
        learned = targets.masked_fill(targets == IGNORE_INDEX, 0)
        _check(
            learned,
            self.num_labels,
            f"{name} has label",
            0 if aligned else 1,
            f", and {IGNORE_INDEX} for those not to learn from",
        )

    def check_length(self, num_positions: int, name: str) -> None:
        """Refuse a sample that is too long.

        Args:
            num_positions: its tokens, or, where a row gives positions, one more than the last of them.
            name: for the message.

        Raises:
            BadSample: it names the sample, its length and the reason.
        """
        if self.longest is not None and num_positions > self.longest:
            raise BadSample(f"{name} is {num_positions} tokens long, more than {self.longest}: {self.reason}")

    def check_lengths(self, samples: Samples) -> None:
        """Refuse a dataset with a sample that is too long.

        Raises:
            BadSample: it names the longest one's row.
        """
        if len(samples.lengths):
            longest = int(samples.lengths.argmax())
            row = int(np.searchsorted(samples.first, longest, side="right")) - 1  # the last that starts before it
            self.check_length(int(samples.lengths[longest]), f"Row {row}")


def limits_of(model: Any) -> Limits:
    """Read off a model of transformers what it has room for."""
    vocab_size = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    longest, reason = _longest(model) or (None, "")
    return Limits(
        num_tokens=getattr(model.get_input_embeddings(), "num_embeddings", vocab_size),
        num_labels=getattr(model.get_output_embeddings(), "out_features", vocab_size),
        longest=longest,
        reason=reason,
        padding=padding_of(model),
    )


def padding_of(model: torch.nn.Module) -> int | None:
    """Return the padding token after which a model numbers positions; None where they count from 0."""
    # transformers' name of the function that makes such positions of tokens
    modules = (module for module in model.modules() if hasattr(module, "create_position_ids_from_input_ids"))
    return next(
        (padding for module in modules if isinstance(padding := getattr(module, "padding_idx", None), int)), None
    )


def check_whole_numbers(tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Refuse fractions, which a cast to whole numbers would cut.

    Args:
        tensors: of a row, by its keys.
        name: of the row, for the message.

    Raises:
        BadSample: it names the row, the key, the number and its position.
    """
    for key, values in tensors.items():
        if values.is_floating_point() and bool((is_cut := values.long() != values).any()):
            position = tuple(int(n) for n in is_cut.nonzero()[0])
            where = ", ".join(map(str, position))
            raise BadSample(
                f"{name}: {key} holds {values[position].item():g} at position {where}, which is no whole number. Look "
                "at how the dataset was tokenised, and whether columns changed places."
            )


def _longest(model: Any) -> tuple[int, str] | None:
    """Find the tokens of the longest sample that a model can learn from exactly, and say why; None: of any length."""
    text = text_part(model)
    limits = [*_learned_positions(text), *_chosen_tokens(text)]
    if (table := longest_exact(text)) is not None:
        longest, kind = table
        reason = (
            f"the model's rotary table (rope_type {kind!r}) would grow with it, and stay so for samples after it. Set "
            "HeteroConfig.max_sample_tokens and longer_samples, or another rope_type; to evaluate such samples, set "
            "HeteroConfig.plan_evaluation=False."
        )
        limits.append((longest, reason))
    return min(limits, default=None)


def _learned_positions(text: Any) -> Iterator[tuple[int, str]]:
    """Yield how many positions a model has learned, and the reason in words."""
    for name, module in text.named_modules():
        if isinstance(module, torch.nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES:
            padding = padding_of(text)
            unused = 0 if padding is None else padding + 1
            # some tables have rows that are no position, as the first two of OPT's
            most = getattr(text.config, "max_position_embeddings", module.num_embeddings)
            yield (
                min(module.num_embeddings, most) - unused,
                (f"the model has no more positions ({name}). Set HeteroConfig.max_sample_tokens and longer_samples."),
            )


def _chosen_tokens(text: Any) -> Iterator[tuple[int, str]]:
    """Yield among how many tokens an indexer leaves none out, as DeepSeek-V3.2's, and the reason in words."""
    if not any(type(module).__name__.endswith("Indexer") for module in text.modules()):
        return
    # of single tokens, or of blocks of them, as in MiniMax-M3
    for name, block in (("index_topk", None), ("indexer_budget", None), ("index_topk_blocks", "index_block_size")):
        chosen = getattr(text.config, name, None)
        if isinstance(chosen, int):
            reason = (
                f"in longer samples the model chooses which tokens to attend to ({name}={chosen}), and no rank has all "
                "of them to choose from. Set HeteroConfig.max_sample_tokens and longer_samples."
            )
            yield chosen * (1 if block is None else getattr(text.config, block)), reason


def _check(ids: torch.Tensor, num: int | None, what: str, offset: int, or_else: str) -> None:
    """Refuse numbers that are none of 0 to `num` - 1; the first of them stands at position `offset` of its row."""
    if num is None or not ids.numel() or 0 <= int(ids.min()) <= int(ids.max()) < num:
        return
    position = int(((ids < 0) | (ids >= num)).nonzero()[0])
    raise BadSample(
        f"{what} {int(ids[position])} at position {position + offset}, but the model has {num}: 0 to {num - 1}"
        f"{or_else}. Use the model's own tokenizer, or, after tokens were added to it, "
        "model.resize_token_embeddings(len(tokenizer))."
    )
