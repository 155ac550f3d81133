"""These are the arguments of the command line that say which lengths to look at, for every verb that takes a source."""

from __future__ import annotations

import argparse
import sys

from hf_hetero.what_if.mixes import MIXES
from hf_hetero.what_if.sources import Reading, Source, read_source


def add_source(verb: argparse.ArgumentParser) -> None:
    """Add the arguments that say which lengths to plan with."""
    verb.add_argument(
        "source",
        help="a text file with the tokens of each sample, one a line; a dataset (a folder of save_to_disk, a json, "
        f"jsonl, parquet, csv or arrow file, or owner/name on the hub); or a mix: {', '.join(MIXES)}",
    )
    verb.add_argument("--max-length", type=int, help="leave longer samples out, and say how many")
    verb.add_argument("--seed", type=int, default=0, help="of the mix, and of the order in which samples are drawn")
    dataset = verb.add_argument_group("datasets")
    dataset.add_argument("--split", default="train", help="default: train")
    dataset.add_argument("--dataset-config", metavar="NAME", help="of a hub dataset that has several")
    dataset.add_argument("--length-column", default="length", help="tokens of each row; else input_ids are counted")
    dataset.add_argument("--tokenizer", metavar="NAME", help="folder or hub name; counts text, or messages as chats")
    dataset.add_argument("--text-column", default="text", help="what the tokenizer counts; default: text")


def source_of(args: argparse.Namespace, num_samples: int, usual_tokenizer: str | None = None) -> Source:
    """Read the lengths; say what is left out on stderr, where it disturbs no table and no JSON.

    Args:
        args: with what `add_source` adds.
        num_samples: how many a mix is asked for.
        usual_tokenizer: counts rows of text that nothing else counts.
    """
    reading = Reading(
        args.split, args.dataset_config, args.length_column, args.text_column, args.tokenizer, usual_tokenizer
    )
    source = read_source(args.source, num_samples, args.seed, args.max_length, reading)
    if source.num_dropped:
        total = source.num_dropped + source.lengths.size
        print(
            f"{source.num_dropped:,} of {total:,} samples have more than --max-length {args.max_length:,} tokens "
            "and are left out.",
            file=sys.stderr,
        )
    return source
