"""The room of what a fine-tuning script does before there is a trainer: read settings, turn rows into tokens."""

from hf_hetero.fine_tuning.image_chats import ImageChats, counted_chats, has_images
from hf_hetero.fine_tuning.settings import check_fields, explaining, parse_settings
from hf_hetero.fine_tuning.sources import load_rows
from hf_hetero.fine_tuning.tables import check_columns, sample_lengths, truncate
from hf_hetero.fine_tuning.tokens import tokenise
from hf_hetero.fine_tuning.vocabulary import make_tokenizer

__all__ = [
    "ImageChats",
    "check_columns",
    "check_fields",
    "counted_chats",
    "explaining",
    "has_images",
    "load_rows",
    "make_tokenizer",
    "parse_settings",
    "sample_lengths",
    "tokenise",
    "truncate",
]
