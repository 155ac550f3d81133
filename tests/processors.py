"""Real processors, made here: one word a token, and images of as few pixels as the tiny models that see take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from seers import IMAGE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

TEMPLATE = (
    "{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}PLACE"
    "{% elif m.role == 'assistant' %}{% generation %}{{ part.text }} </s>{% endgeneration %}"
    "{% else %} {{ part.text }} {% endif %}{% endfor %}{% endfor %}"
)
BEGIN, END = 92, 93
"""Tokens that Gemma 3's processor puts around those of an image."""
WORDS = [f"w{n}" for n in range(3, 90)]
SQUARE = {"height": 8, "width": 8}


def tokenizer(*named: str, **tokens: str) -> Any:
    """One word a token; special ones after the image's, from 92 on.

    Args:
        named: special tokens that a processor asks for by what they are.
        tokens: those that it asks for by the name of an attribute; `image_token` is the image's.
    """
    image = tokens.setdefault("image_token", "<image>")
    others = [token for token in dict.fromkeys((*tokens.values(), *named)) if token != image]
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{word: 3 + n for n, word in enumerate(WORDS)}, image: IMAGE}
    vocabulary |= {token: BEGIN + n for n, token in enumerate(others)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    plain.add_special_tokens([image, *others])
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=tokens
    )


def template(place: str = "<image>") -> str:
    """The chats' template, with what stands in the place of an image."""
    return TEMPLATE.replace("PLACE", place)


def _llava() -> Any:
    size = {"height": 4, "width": 4}
    images = transformers.CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    return transformers.LlavaProcessor(images, tokenizer(), **OF_CLIP, chat_template=template())


def _llava_next() -> Any:
    pinpoints, size = [[4, 8], [8, 4], [8, 8]], {"height": 4, "width": 4}
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 4}, crop_size=size, image_grid_pinpoints=pinpoints)
    return transformers.LlavaNextProcessor(images, tokenizer(), **OF_CLIP, chat_template=template())


def _gemma3() -> Any:
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    words = tokenizer(boi_token="<begin>", eoi_token="<end>")
    return transformers.Gemma3Processor(images, words, chat_template=template("<begin>"), image_seq_length=16)


def _lighton_ocr() -> Any:
    images = PixtralImageProcessorPil(size={"longest_edge": 12}, patch_size={"height": 2, "width": 2})
    words = tokenizer(image_break_token="<break>", image_end_token="<end>")
    return transformers.LightOnOcrProcessor(images, words, 2, 2, chat_template=template())


def _deepseek_vl() -> Any:
    images = DeepseekVLImageProcessorPil(size=SQUARE, min_size=2)
    return transformers.DeepseekVLProcessor(images, tokenizer(), chat_template=template(), num_image_tokens=16)


def _deepseek_vl_hybrid() -> Any:
    low, high = {"height": 4, "width": 4}, SQUARE
    images = DeepseekVLHybridImageProcessorPil(size=low, high_res_size=high, min_size=2)
    return transformers.DeepseekVLHybridProcessor(images, tokenizer(), chat_template=template(), num_image_tokens=4)


def _ovis2() -> Any:
    images = Ovis2ImageProcessorPil(size=SQUARE, crop_to_patches=False)
    words = tokenizer("<IMG_START>", "<IMG_END>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", image_token="<IMG_ATOM>")
    return transformers.Ovis2Processor(images, words, chat_template=template(), image_seq_length=4)


def _idefics2() -> Any:
    images = Idefics2ImageProcessorPil(size={"shortest_edge": 6, "longest_edge": 12}, do_image_splitting=False)
    words = tokenizer(image_boundary_token="<around>")
    return transformers.Idefics2Processor(images, words, image_seq_len=3, chat_template=template())


def _paddleocr_vl() -> Any:
    sizes = {"shortest_edge": 16, "longest_edge": 256}
    images = PaddleOCRVLImageProcessorPil(patch_size=2, temporal_patch_size=1, merge_size=2, size=sizes)
    words, place = tokenizer("<begin>", "<end>"), "<begin><image><end>"  # so that no two images touch
    return transformers.PaddleOCRVLProcessor(images, words, chat_template=template(place))


OF_CLIP = {"patch_size": 2, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": _llava,
    "gemma3": _gemma3,
    "llava-next": _llava_next,
    "lighton-ocr": _lighton_ocr,
    "deepseek-vl": _deepseek_vl,
    "deepseek-vl-hybrid": _deepseek_vl_hybrid,
    "ovis2": _ovis2,
    "idefics2": _idefics2,
    "paddleocr-vl": _paddleocr_vl,
}


def processor(name: str = "llava") -> Any:
    """The processor of a tiny model that sees."""
    return PROCESSORS[name]()
