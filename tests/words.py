"""A language of few words: its tokenizer, with a chat template that marks what the assistant says; and texts of it."""

from __future__ import annotations

from typing import Any

WORDS = [f"w{n}" for n in range(80)]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s>"
    "{% endgeneration %} {% else %}{{ m.content }} {% endif %}{% endfor %}"
)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = ["<pad>", "<s>", "</s>", "user", "assistant", *WORDS]
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(entries)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    made.chat_template = TEMPLATE
    return made


def say(num_words: int, at: int) -> str:
    return " ".join(WORDS[(at + 7 * n) % len(WORDS)] for n in range(num_words))
