"""This module turns a row of text, chat, prompt and completion, or tokens into tokens and labels, as TRL would."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from hf_hetero.errors import HeteroError
from hf_hetero.fine_tuning.settings import explaining
from hf_hetero.model.loss import IGNORE_INDEX
from hf_hetero.samples.rows import PACKED_COLUMN

# no sets here: their order changes from process to process, and `datasets` caches by it
PAIR = ("prompt", "completion")
MASKS = ("assistant_masks", "completion_mask")
TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids", *MASKS)


def tokenise(
    row: Mapping[str, Any],
    number: int,
    tokenizer: Any,
    text_column: str,
    assistant_only: bool,
    version: str = "",
) -> dict[str, Any]:
    """Make `input_ids`, `length`, `labels` where not every token is learned, `seq_lengths` where rows are packed.

    Args:
        row: with `input_ids`, or else `messages`, `prompt` and `completion`, or a column of text.
        number: of the row, for errors.
        tokenizer: of transformers; None where rows have tokens.
        text_column: what is tokenised where there is nothing else.
        assistant_only: learn only what the assistant says.
        version: of this package. It is not read: `datasets` knows by it what another version has tokenised.

    Raises:
        HeteroError: it says what is wrong with the row, and its number.
    """
    try:
        with explaining("it cannot be tokenised, so mend it, or leave it out"):
            if "input_ids" in row:
                columns = _from_tokens(row)
            elif "messages" in row:
                columns = _from_chat(row, tokenizer, assistant_only)
            elif all(name in row for name in PAIR):
                columns = _from_pair(row, tokenizer, assistant_only)
            else:
                columns = {"input_ids": _encode(tokenizer, _as_text(row, text_column), ends=True)}
            if not columns["input_ids"]:
                raise HeteroError("it has no tokens. Filter empty samples out of the dataset.")
    except HeteroError as error:
        raise HeteroError(f"Row {number}: {error}") from error
    return {**columns, "length": len(columns["input_ids"])}


def _from_tokens(row: Mapping[str, Any]) -> dict[str, Any]:
    """Take tokens and labels as they are, less their padding, and find the documents of a row that was packed."""
    columns = {name: row[name] for name in TOKEN_COLUMNS if name in row}
    for name, values in columns.items():
        if not isinstance(values, list) or not all(type(value) in (int, bool) for value in values):
            raise HeteroError(f"{name} is {values!r:.60}; it must be a list of whole numbers.")
        if len(values) != len(columns["input_ids"]):
            raise HeteroError(f"it has {len(columns['input_ids'])} input_ids, but {len(values)} {name}.")
    numbers = columns.get("attention_mask", [1] * len(columns["input_ids"]))
    places = [place for place, number in enumerate(numbers) if number]
    unpadded = {name: [values[place] for place in places] for name, values in columns.items()}
    tokens = {"input_ids": unpadded["input_ids"]}
    masks = [unpadded[name] for name in MASKS if name in unpadded]
    if "labels" in unpadded or masks:
        tokens["labels"] = unpadded["labels"] if "labels" in unpadded else _learned(unpadded["input_ids"], masks)
    # by the row's columns, not its numbers: all rows of a table must come out with the same columns
    if any(name in row for name in (PACKED_COLUMN, "position_ids", "attention_mask")):
        tokens[PACKED_COLUMN] = _documents(places, unpadded, row.get(PACKED_COLUMN))
    return tokens


def _documents(places: list[int], columns: Mapping[str, list[int]], stated: list[int] | None) -> list[int]:
    """Count the tokens of each document of a row: as stated, or else between the marks that other packers leave.

    A document starts where `position_ids` begin anew, or where `attention_mask` goes on with another number.

    Args:
        places: of the row, those that are no padding.
        columns: what they hold there.
        stated: `seq_lengths`, if there are any.
    """
    positions, numbers = columns.get("position_ids"), columns.get("attention_mask", [1] * len(places))
    starts: list[int] = []
    for i in range(len(places)):
        if not i or numbers[i] != numbers[i - 1] or (positions and positions[i] != positions[i - 1] + 1):
            starts.append(i)
            if positions and positions[i] != 0:
                raise HeteroError(
                    f"position_ids of token {places[i]} is {positions[i]}; a document's count 0, 1, 2, ..."
                )
        elif places[i] != places[i - 1] + 1:
            # inside a document: attention in here could not leave the token out
            raise HeteroError(f"its attention_mask leaves out token {places[i] - 1}, amid others.")
    marked = [end - start for start, end in zip(starts, [*starts[1:], len(places)], strict=True)]
    if stated is None:
        return marked
    if sum(stated) != len(places) or min(stated) < 1 or (len(marked) > 1 and marked != stated):
        raise HeteroError(f"its seq_lengths are {stated!s:.60}, and its documents have {marked!s:.60} tokens.")
    return stated


def _from_chat(row: Mapping[str, Any], tokenizer: Any, assistant_only: bool) -> dict[str, Any]:
    """Put `messages` through the chat template; on request, only what the assistant says is learned."""
    chat = _as_chat(row, "messages")
    encoded = _under_template(row, chat, tokenizer, return_assistant_tokens_mask=assistant_only)
    columns = {"input_ids": encoded["input_ids"]}
    return {**columns, "labels": _said_by_assistant(chat, encoded)} if assistant_only else columns


def _from_pair(row: Mapping[str, Any], tokenizer: Any, assistant_only: bool) -> dict[str, Any]:
    """Join `prompt` and `completion`, texts or chats; only what follows the prompt is learned.

    That is what does not begin as the prompt alone does: a tokenizer may join the prompt's last letters with the first
    of the completion, so that no count of the prompt's tokens tells where it ends.
    """
    if list in (type(row["prompt"]), type(row["completion"])):
        asked, answered = _as_chat(row, "prompt"), _as_chat(row, "completion")
        prompt = _under_template(row, asked, tokenizer, add_generation_prompt=True)["input_ids"]
        columns = _from_chat({**row, "messages": asked + answered}, tokenizer, assistant_only)
    else:
        asked, answered = _as_text(row, "prompt"), _as_text(row, "completion")
        prompt = _encode(tokenizer, asked)
        columns = {"input_ids": _encode(tokenizer, asked + answered, ends=True)}
    ids = columns["input_ids"]
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, ids, strict=False)))
    return {**columns, "labels": [IGNORE_INDEX] * same + columns.get("labels", ids)[same:]}


def _encode(tokenizer: Any, text: str, ends: bool = False) -> list[int]:
    """Tokenise a text, with one end token if it is to end."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]  # its length is checked later, in words
    end: int | None = tokenizer.eos_token_id
    return [*ids, end] if ends and end is not None and ids[-1:] != [end] else ids


def _under_template(row: Mapping[str, Any], chat: list[Any], tokenizer: Any, **options: Any) -> Any:
    """Put a chat through the template, with the `tools` and `chat_template_kwargs` of its row, as TRL does."""
    tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
    # a table fills up with None what other rows set
    settings = {name: value for name, value in (row.get("chat_template_kwargs") or {}).items() if value is not None}
    return tokenizer.apply_chat_template(chat, return_dict=True, **{"tools": tools, **settings, **options})


def _said_by_assistant(chat: list[Any], encoded: Mapping[str, list[int]]) -> list[int]:
    """Label what the template marks as the assistant's."""
    if not any(encoded["assistant_masks"]) and any(m["role"] == "assistant" and m.get("content") for m in chat):
        raise HeteroError(
            "the chat template does not mark what the assistant says, so assistant_only_loss would learn nothing. Put "
            "{% generation %} before it and {% endgeneration %} after it in the tokenizer's chat_template."
        )
    return _learned(encoded["input_ids"], [encoded["assistant_masks"]])


def _learned(ids: list[int], masks: list[list[int]]) -> list[int]:
    """Label the tokens that every mask lets through."""
    return [token if all(let) else IGNORE_INDEX for token, *let in zip(ids, *masks, strict=True)]


def _as_text(row: Mapping[str, Any], column: str) -> str:
    """Return the text of a column, or refuse what is none."""
    if not isinstance(row[column], str):
        raise HeteroError(f"{column} is {row[column]!r:.60}; it must be text.")
    return row[column]


def _as_chat(row: Mapping[str, Any], column: str) -> list[Any]:
    """Return the messages of a column, or refuse what are none."""
    chat = row[column]
    if not isinstance(chat, list) or not chat:
        raise HeteroError(f"{column} is {chat!r:.60}; it must be a list of messages.")
    for number, m in enumerate(chat):
        if not isinstance(m, dict) or not m.get("role") or not (m.get("content") is not None or m.get("tool_calls")):
            raise HeteroError(
                f"message {number} of {column} is {m!r:.60}; it must have a role, and content or tool_calls."
            )
    return chat
