"""This module makes rows of chats with images trainable: images found and opened, tokens counted once, made as read.

What a processor makes of an image is many times as large as the image, so that a table keeps images, and each step's
rows go through the processor as they are read (`ImageChats`, an `example_collator`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_hetero.errors import HeteroError
from hf_hetero.fine_tuning.settings import explaining
from hf_hetero.model.loss import IGNORE_INDEX

if TYPE_CHECKING:
    import datasets

COLUMNS = ("images", "image")
"""Of a row's images, or its one image: files, or what `datasets` keeps of them."""


@dataclass(frozen=True, slots=True)
class ImageChats:
    """An `ImageChats` is a collator that makes tokens, labels and inputs of the tower of `messages` and images.

    Args:
        processor: of transformers, with a chat template.
        assistant_only: learn only what the assistant says; else every token but those of images.
    """

    processor: Any
    assistant_only: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return a batch, padded on the right where rows differ in length.

        Raises:
            HeteroError: a row has no messages, or other images than its messages have room for; or the processor says
                of tokens of images that the assistant says them.
        """
        chats = [with_images(row.get("messages"), images_of(row)) for row in rows]
        batch = self.processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=self.assistant_only,
            processor_kwargs={"padding": len(rows) > 1, "padding_side": "right"},
        )
        labels = batch["input_ids"].clone()
        # Gemma 3's processor gives one name to the token that begins an image, and another to those of the image
        of_images = {self.processor.image_token_id, *getattr(self.processor, "image_token_ids", ())} - {None}
        is_image = torch.isin(labels, torch.tensor(sorted(of_images)))
        labels[is_image | (batch["attention_mask"] == 0)] = IGNORE_INDEX
        if self.assistant_only:
            said = torch.as_tensor(batch.pop("assistant_masks"))
            if not said.any(dim=1).all():
                raise HeteroError(
                    "the chat template does not mark what the assistant says, so assistant_only_loss would learn "
                    "nothing. Put {% generation %} before it and {% endgeneration %} after it."
                )
            if (is_image & (said != 0)).any() and not any(map(_shows_images, chats)):
                raise HeteroError(
                    f"{type(self.processor).__name__} does not know where the assistant speaks: it marks tokens of "
                    "images, so assistant_only_loss would learn others than are said. Set it to false."
                )
            labels[said == 0] = IGNORE_INDEX
        return {**batch, "labels": labels}


def _shows_images(chat: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the assistant itself has images in a chat."""
    said = (part for message in chat if message["role"] == "assistant" for part in message["content"])
    return any(part["type"] == "image" for part in said)


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """Return the images of a row, which may have none."""
    many, one = (row.get(name) for name in COLUMNS)
    return list(many) if many is not None else [] if one is None else [one]


def with_images(chat: Any, images: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the messages of a chat with its images where they stand, or before what the user says first.

    Args:
        chat: messages, whose content is text, or a list of `{"type": "text", "text": ...}` and `{"type": "image"}`.
        images: as many as it has places, or any number where its messages are text.

    Raises:
        HeteroError: there are more images than places, or fewer; or nothing that could be a chat.
    """
    if not isinstance(chat, list) or not chat:
        raise HeteroError(f"messages is {chat!r:.60}; it must be a list of messages.")
    is_text = all(isinstance(message.get("content"), str) for message in chat)
    left, placed = list(images), list[dict[str, Any]]()
    for message in chat:
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
        if is_text and message["role"] == "user" and len(left) == len(images):
            parts = [*({"type": "image"} for _ in images), *parts]
        # a table gives all parts the same keys, some of them None
        parts = [{key: value for key, value in part.items() if value is not None} for part in parts]
        for part in parts:
            if part["type"] == "image" and not {"image", "url", "path"} & set(part):
                if not left:
                    raise HeteroError(f"its messages have places for more than its {len(images)} images.")
                part["image"] = left.pop(0)
        placed.append({**message, "content": parts})
    if left:
        raise HeteroError(f"it has {len(images)} images, and its messages have places for {len(images) - len(left)}.")
    return placed


def has_images(data: datasets.Dataset) -> bool:
    """Return whether rows have a column of images."""
    return bool(set(COLUMNS) & set(data.column_names))


def counted_chats(
    data: datasets.Dataset, collate: ImageChats, folder: Path, max_length: int | None, num_proc: int | None
) -> datasets.Dataset:
    """Return the same rows, their images opened, with a column `length`: tokens, those of images included.

    Args:
        data: with `messages`, and images or names of their files.
        collate: makes tokens.
        folder: where files are looked for.
        max_length: tokens of the longest row that is allowed; None: any. None is cut, for it would lose an image.
        num_proc: processes that count.

    Raises:
        HeteroError: a row cannot be made trainable, or is too long; it says which, and why.
    """

    def count(row: Mapping[str, Any], number: int) -> dict[str, int]:
        try:
            with explaining("it cannot be tokenised, so mend it, or leave it out"):
                length = collate([row])["input_ids"].shape[1]
            if max_length is not None and length > max_length:
                raise HeteroError(
                    f"it has {length} tokens, more than max_length={max_length}. Rows with images are not cut: raise "
                    "max_length, leave longer ones out, or have the processor make images smaller."
                )
        except HeteroError as error:
            raise HeteroError(f"Row {number}: {error}") from error
        return {"length": length}

    return _opened(data, folder).map(count, with_indices=True, num_proc=num_proc, desc="Counting tokens")


def _opened(data: datasets.Dataset, folder: Path) -> datasets.Dataset:
    """Return the same rows, with images where there were names of files."""
    import datasets  # here, because only who has a table needs it

    for name in set(COLUMNS) & set(data.column_names):
        kind: Any = data.features[name]
        of_one = getattr(kind, "feature", kind)
        if getattr(of_one, "dtype", None) != "string":
            continue
        if is_list := of_one is not kind:
            places = [[str(folder / path) for path in paths or ()] for paths in data[name]]
        else:
            places = [path and str(folder / path) for path in data[name]]
        image: Any = datasets.List(datasets.Image()) if is_list else datasets.Image()
        added: Any = data.remove_columns(name).add_column(name, places)  # pyright: ignore[reportArgumentType]
        data = added.cast_column(name, image)
    return data
