"""A trial runs a recipe's script for three steps on CPU ranks, with a small model of its kind and short samples."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import yaml
from transformers import AutoTokenizer

from hf_hetero.checks.tiny import architecture_of, build, shrunk, text_of
from hf_hetero.cookbook.sample import Sample, config_in
from hf_hetero.cookbook.shelf import Recipe
from hf_hetero.errors import HeteroError
from hf_hetero.fine_tuning import explaining

STEPS = 3
SAMPLES_A_RANK = 4
TOKENS = 384
"""Of the longest sample: more than one rank may hold, so that ranks share it."""
TOKENS_A_RANK = 256
SMALL_VOCABULARY = 1024
SMALL_WEIGHTS = 20_000_000
"""A model that a recipe makes itself, of no more weights, is small enough as it is."""
SECONDS = 600.0
CHANGES: Mapping[str, Any] = {
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "report_to": "none",
    "max_steps": STEPS,
    "logging_steps": 1,
    "logging_strategy": "steps",
    "save_strategy": "no",
    "per_device_train_batch_size": SAMPLES_A_RANK,
    "gradient_accumulation_steps": 1,
    "save_model": False,
    "max_length": TOKENS,
    "max_length_policy": "truncate",
    "group_timeout_s": 120.0,
    "rounds": 1,
    "steps": 1,
    "eval_dataset": None,
    "resume_from_checkpoint": None,
    "cost_model": None,
    "push_to_hub": None,
    "eval_strategy": None,
    "global_batch_size": None,
    "auto_resume": None,
}
"""What a trial changes of a recipe's settings, as far as its script knows them; None takes a key out."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A `Trial` is what three steps came to.

    Args:
        num_ranks: that trained.
        losses: of the steps, as they were logged; none, where a script compares runs, and logs none of them.
    """

    num_ranks: int
    losses: tuple[float, ...]


def tried(
    recipe: Recipe, values: Mapping[str, Any], known: frozenset[str], sample: Sample | None, seconds: float = SECONDS
) -> Trial:
    """Train three steps in processes of their own, two if the recipe is for several ranks.

    Args:
        recipe: whose script is run.
        values: its settings.
        known: keys that its script has.
        sample: of its data; None: the script reads them all.
        seconds: after which it is given up.

    Raises:
        HeteroError: what the script said last, or that it logged a loss that is no number.
    """
    num_ranks = min(values.get("num_ranks") or 1, 2)
    with tempfile.TemporaryDirectory(prefix="hf_hetero_trial_") as folder:
        short = {**values, **{key: value for key, value in CHANGES.items() if key in known}}
        short |= {"num_ranks": num_ranks, "output_dir": f"{folder}/out"}
        # one rank must hold a sample alone; what could not be looked at may be pairs, which stay together
        most = (TOKENS_A_RANK if num_ranks > 1 else TOKENS) if sample else 2 * TOKENS // num_ranks
        short |= {"max_tokens_per_rank": most}
        if sample is not None:
            with explaining("Cannot keep a sample of the dataset"):
                sample.rows.save_to_disk(f"{folder}/rows")
            short |= {"dataset": f"{folder}/rows", "dataset_config": None}
        short |= _small_model(values, sample, Path(folder))
        settings = Path(folder) / "train.yaml"
        settings.write_text(yaml.safe_dump({key: value for key, value in short.items() if value is not None}), "utf-8")
        words = [str(recipe.script), "--config", str(settings)]
        if num_ranks > 1:
            words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks), *words]
        printed = _run([sys.executable, *words], seconds)
    losses = tuple(float(loss) for loss in re.findall(r"'loss': '?([-+\w.]+)", printed))
    if not all(map(math.isfinite, losses)):
        said = ", ".join(f"{loss:g}" for loss in losses)
        raise HeteroError(f"{STEPS} steps logged the losses {said}: all of them must be numbers.")
    return Trial(num_ranks, losses[:STEPS])


def _small_model(values: Mapping[str, Any], sample: Sample | None, folder: Path) -> dict[str, Any]:
    """Save a small model of the recipe's kind with a tokenizer of few entries; return the settings that name it."""
    config = config_in(values)
    if values.get("model") is None and _num_weights(config) <= SMALL_WEIGHTS:
        return {}
    small, tokenizer = shrunk(config), None
    text = text_of(small)
    with explaining("Cannot make a small model of its kind"):
        if (name := values.get("tokenizer") or values.get("model")) not in (None, "train"):
            tokenizer = sample.tokenizer if sample else AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if tokenizer is not None:
            tokenizer = _small_tokenizer(tokenizer, sample)
            tokenizer.save_pretrained(folder / "model")
            ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            for key, value in {"vocab_size": len(tokenizer), **ids}.items():
                setattr(text, key, value)
        else:  # rows of tokens, of the whole vocabulary
            text.vocab_size = text_of(config).vocab_size
        build(small, "cpu", architecture_of(config)).save_pretrained(folder / "model")
    return {
        **{"model": str(folder / "model"), "model_config": None, "dtype": values.get("dtype")},
        **({"tokenizer": None} if tokenizer is not None else {}),
    }


def _small_tokenizer(tokenizer: Any, sample: Sample | None) -> Any:
    """Make a tokenizer of the same kind, special tokens and template with few entries; the given one, if it cannot."""
    if sample is None or len(tokenizer) <= SMALL_VOCABULARY:
        return tokenizer
    try:
        small = tokenizer.train_new_from_iterator(_texts(sample.rows), SMALL_VOCABULARY, show_progress=False)
    except Exception:  # of a kind that is not trained; all of its entries take more memory, and are right as well
        return tokenizer
    small.chat_template = tokenizer.chat_template
    return small


def _texts(rows: datasets.Dataset) -> Iterator[str]:
    """Give every text in the rows, at any depth."""

    def within(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping | list):
            for inner in value.values() if isinstance(value, Mapping) else value:  # pyright: ignore
                yield from within(inner)

    for row in rows.with_format(None):
        yield from within(row)


def _num_weights(config: Any) -> int:
    outline = build(config, "meta", architecture_of(config))
    return sum(parameter.numel() for parameter in outline.parameters())


def _run(command: Sequence[str], seconds: float) -> str:
    """Run a script's processes; return what they printed, or raise what they said last."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    with _started(command, environment) as process:
        try:
            printed, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise HeteroError(f"{STEPS} steps of a shrunk model were not done within {seconds:g} s.") from None
    if process.returncode:
        raise HeteroError(_last_words(said, printed))
    return printed


@contextmanager
def _started(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Start processes in a session of their own, and end all that are left of it."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 15)
            process.communicate()


def _last_words(said: str, printed: str) -> str:
    """Return what a script says is wrong: its own line, else the last error, else the last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    own = [line.partition(": ")[2] for line in lines if re.match(r"(\[rank\d+\]: )?\w+\.py: ", line)]
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]+(Error|Model|Batch|Sample): ", line)]
    last = lines or printed.strip().splitlines()
    return (own or errors or last or ["The script ended, and said nothing."])[-1]
