"""Count what towers add to a step: operations of an image's patches beside those of tokens, as plans have them.

    python benchmarks/estimate/count_towers.py

Models are built by their sizes, without weights. Towers are counted as plans count them (`hf_hetero.images.towers`),
text as in `hf_hetero.estimate.flops`. The last column is what a trained tower keeps for backward, by what would be kept
of the tokens of text that are planned for it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from hf_hetero.estimate.flops import flops_of
from hf_hetero.images.towers import ImageSize, ImageSizes, TextRates, towers_of

PATCHES = (64, 64)
"""Rows and columns of them in an image."""
TEXT_TOKENS = 300
"""Of a question and its answer, beside one image."""
QWEN = {"vocab_size": 152064, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
GEMMA_TOWER = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}


@dataclass(frozen=True)
class Subject:
    """A `Subject` is a model by its sizes, and an image.

    Args:
        kind: of the classes.
        text, vision, own: of the config.
        num_patches, num_tokens: of the image.
    """

    kind: str
    text: dict[str, Any]
    vision: dict[str, Any]
    own: dict[str, Any]
    num_patches: int
    num_tokens: int


def qwen(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> Subject:
    """Qwen2.5-VL beside an image of 896 x 896: 64 x 64 patches of 14, windows of 8 x 8, four of 32 layers without."""
    text = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16, "out_hidden_size": hidden}
    return Subject("Qwen2_5_VL", {**QWEN, **text}, vision, {}, 4096, 1024)


def gemma(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int) -> Subject:
    """Gemma 3 beside an image of any size: 64 x 64 patches of 14, which become 256 tokens."""
    text = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    vision = {**GEMMA_TOWER, "image_size": 896, "patch_size": 14}
    return Subject("Gemma3", {**text, "vocab_size": 262208}, vision, {"mm_tokens_per_image": 256}, 4096, 256)


SUBJECTS = {
    "Qwen2.5-VL 3B": qwen(2048, 11008, 36, 16, 2),
    "Qwen2.5-VL 7B": qwen(3584, 18944, 28, 28, 4),
    "Qwen2.5-VL 72B": qwen(8192, 29568, 80, 64, 8),
    "Gemma 3 4B": gemma(2560, 10240, 34, 8, 4, 256),
    "Gemma 3 12B": gemma(3840, 15360, 48, 16, 8, 256),
    "Gemma 3 27B": gemma(5376, 21504, 62, 32, 16, 128),
    "LLaVA 1.5 7B": Subject(
        "Llava",
        {"model_type": "llama", "vocab_size": 32064},
        {**CLIP, "num_attention_heads": 16, "image_size": 336, "patch_size": 14},
        {},
        576,
        576,
    ),
}


def outline(subject: Subject) -> Any:
    """Build the model without weights."""
    config = getattr(transformers, f"{subject.kind}Config")(
        text_config=subject.text, vision_config=subject.vision, **subject.own
    )
    with torch.device("meta"):
        return getattr(transformers, f"{subject.kind}ForConditionalGeneration")(config)


def size_of(subject: Subject, sizes: ImageSizes) -> ImageSize:
    """Return the size of one image, of 64 x 64 patches where images have sizes of their own."""
    told = {"image_grid_thw": [[1, *PATCHES]], "pixel_values": [None]}
    [size] = sizes.of(told)
    assert size.tokens == subject.num_tokens
    return size


def kept(config: Any, is_gated: bool) -> int:
    """Count the numbers that the layers of a model, or of a tower, keep of a token, or of a patch, for backward.

    As `hf_hetero.estimate.memory` counts them: two norms and their fp32 copies, queries, keys, values and outputs, the
    input, and what is inside the MLP.
    """
    layers, heads = (getattr(config, name, None) for name in ("depth", "num_heads"))
    layers, heads = layers or config.num_hidden_layers, heads or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    exchanged = 2 * (heads + (getattr(config, "num_key_value_heads", None) or heads)) * head_dim
    return layers * (10 * config.hidden_size + exchanged + (4 if is_gated else 2) * config.intermediate_size)


def main() -> None:
    """Print a table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| model | patches, tokens | tower by text, image's tokens | of a step, trained | frozen | kept by planned |")
    print("|---|---|---|---|---|---|")
    for name, subject in SUBJECTS.items():
        model = outline(subject)
        flops = flops_of(model)
        towers = towers_of(model, TextRates(flops.in_layers + flops.in_head, flops.a_token))
        size = size_of(subject, towers.sizes)
        tower = towers.looking.of([size])
        tokens = towers.learning.of([size]) / towers.learning.text
        planned = tokens * kept(model.config.get_text_config(), is_gated=True)
        memory = size.patches * kept(model.config.vision_config, is_gated="Qwen" in subject.kind) / planned
        own = flops.of([TEXT_TOKENS + subject.num_tokens]) - flops.of([TEXT_TOKENS])
        whole = flops.of([TEXT_TOKENS + subject.num_tokens])
        shares = [times * tower / (times * tower + whole) for times in (3, 1)]
        print(
            f"| {name} | {subject.num_patches:,}, {subject.num_tokens:,} | {3 * tower / own:.2f} | "
            f"{shares[0]:.0%} | {shares[1]:.0%} | {memory:.1f} |"
        )


if __name__ == "__main__":
    main()
