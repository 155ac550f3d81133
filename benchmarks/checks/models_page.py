"""The page of which models are exact, from what `measure_models` has found."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from datetime import date
from typing import Any

import transformers

TITLES = {
    "text": "Causal language models",
    "images": "Models of images and text, on text, or where they take none alone, with an image in every row",
}
WHOLE = "whole samples: "
"""How the words begin that say why ranks go over whole samples."""
PREFACE = """# Which models are exact

Two steps of training on two ranks, under plans of mixed degrees with each method, against plain Trainer on one process,
in fp64: whatever else a model asks for is given as fp64, too (`in_double`). Measured, and this page written, by

```console
$ python benchmarks/checks/measure_models.py --results models.jsonl --markdown hf_hetero/checks/MODELS.md
```

- **exact**: the weights of both ranks differ from plain Trainer's by less than {exact:g} of the farthest that training
  has moved a weight. A few models are steep, or compute in less than fp64 even so: under {steep:g} they count as exact,
  too, where they differ by less than 10 times what plain Trainer differs from itself, with torch's attention and all
  samples of a step in one padded batch. A sample that sees another makes 1e-3 and more.
- **exact, whole samples**: ranks cannot share a sample, for the reason that is given, and each goes over all of it
  ([how](../manners/README.md)).
- **refused**: `HeteroTrainer` says so, in words, when it is made. **wrong**, **crash**: it does not.
- **stock cannot**: plain Trainer fails, too, on the tiny instance of the type's default config, or on text alone.
- **with images**: the type takes no text alone, so each row has an image. Rows with images of other types are held to
  plain training by tests, for those of [this table](../images/README.md).

A model whose loss cannot be divided by a step's targets is compared with plain Trainer's one batch a step. Written on
{today}, by transformers {version}.
"""


def table(results: Sequence[dict[str, Any]], exact: float, steep: float) -> str:
    """Write results as Markdown: what was done, counts, then a row a type.

    Args:
        results: of types.
        exact, steep: differences, of the movement, that are rounding; always, and where plain Trainer has as much.
    """
    lines = [PREFACE.format(exact=exact, steep=steep, today=date.today(), version=transformers.__version__)]
    for kind, title in TITLES.items():
        ours = sorted((one for one in results if one["kind"] == kind), key=lambda one: one["type"])
        if not ours:
            continue
        counts = Counter(one["result"] for one in ours)
        trainable = len(ours) - counts["stock cannot"]
        share = 100 * counts["exact"] / max(trainable, 1)
        whole = sum(one["why"].startswith(WHOLE) for one in ours if one["result"] == "exact")
        words = ", ".join(f"{number} {result}" for result, number in sorted(counts.items()))
        lines += [
            f"## {title}",
            "",
            *textwrap.wrap(
                f"Of {len(ours)} types {words}: {share:.0f} % of those that plain Trainer can train are exact, {whole} "
                "of these by whole samples.",
                120,
            ),
        ]
        lines += ["", "| type | class | result | difference | why |", "|---|---|---|---|---|"]
        for one in ours:
            why = one["why"].partition("under changing plans: ")[2] or one["why"]
            cell, error = why.replace("|", "\\|")[:200], f"{one['error']:.0e}" if "error" in one else ""
            result = f"{one['result']}, with images" if one.get("with_images") else one["result"]
            lines.append(f"| `{one['type']}` | {one['class']} | {result} | {error} | {cell} |")
        lines.append("")
    return "\n".join(lines)
