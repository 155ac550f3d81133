"""Recipes do what they say: every file parses, every kind of data becomes the right tokens, the script trains."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
import transformers
import yaml
from end_to_end.test_other_models import model_of
from helpers import free_port, often, run_program, run_ranks, shard_on_cpu
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_hetero import HeteroError
from hf_hetero.cookbook.shelf import MESH, mesh_in
from hf_hetero.data.lengths import read_samples
from hf_hetero.ranks.mesh import mesh_of
from hf_hetero.report import read_records
from hf_hetero.samples.samples import limited

ROOT = Path(__file__).parents[1]
COMPARE = ROOT / "recipes" / "compare" / "train.yaml"
"""Of a script of its own: `tests/test_compare.py`."""
RECIPES = sorted(set((ROOT / "recipes").glob("*/train.yaml")) - {COMPARE})
TEXTS = [
    "def f(x):\n    return x\n",
    "import os\n",
    "class A:\n    def g(self):\n        return [1, 2, 3]\n" * 3,
    "x = 1\n",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
CHAT = [{"role": "user", "content": "import os"}, {"role": "assistant", "content": "x = 1"}]


def load_script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their types up there
    spec.loader.exec_module(module)
    return module


def script_of(recipe: Path) -> str:
    """The script in the command of a recipe's README."""
    found = re.search(r"recipes/(\w+)\.py --config", (recipe.parent / "README.md").read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def sft() -> ModuleType:
    return load_script("sft")


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache" / "datasets")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache" / "downloads")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", pad_token="<end>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="module")
def model_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_every_recipe_parses(path: Path, tmp_path: Path) -> None:
    """A train.yaml holds only keys that the real dataclasses have, with values that they take."""
    script = load_script(script_of(path))
    words = ["--config", str(path), "--output_dir", str(tmp_path), "--use_cpu", "true"]  # bf16 wants a device
    args, training_args, hetero = script.parse(words)
    parsed = {**vars(args), **vars(training_args), **vars(hetero)}
    for key, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        # these are turned into other types
        if key not in {"output_dir", "report_to", "save_strategy", "eval_strategy", "lr_scheduler_type"}:
            assert parsed[key] == value


def test_every_recipe_is_complete() -> None:
    """A recipe is a folder with train.yaml and README.md, without Python, and a row in the table."""
    table = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert RECIPES
    for path in (*RECIPES, COMPARE):
        names = {p.name for p in path.parent.iterdir()}
        assert {"README.md", "train.yaml"} <= names
        assert not [name for name in names if name.endswith(".py")]
        assert f"({path.parent.name}/" in table


def launch_file_of(recipe: Path) -> Path:
    """The accelerate file in the command of a recipe's README."""
    found = re.search(r"--config_file (recipes/accelerate/\w+\.yaml)", (recipe.parent / "README.md").read_text())
    assert found is not None
    return ROOT / found[1]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_launch_files_start_as_many_ranks_as_recipes_need(path: Path) -> None:
    """Accelerate reads the file that a README names; it starts the number of ranks that the recipe insists on."""
    from accelerate.commands.config.config_args import load_config_from_file

    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    if recipe["num_ranks"] == 1:
        return
    config: Any = load_config_from_file(str(launch_file_of(path)))
    assert config.num_processes == recipe["num_ranks"]
    assert not config.use_cpu  # which would choose the mpirun launcher
    assert config.distributed_type == ("FSDP" if "fsdp2" in launch_file_of(path).stem else "MULTI_GPU")


def test_every_launch_file_is_used() -> None:
    """None lies about that no recipe shows, be it as what could be changed."""
    shown = " ".join((path.parent / "README.md").read_text(encoding="utf-8") for path in RECIPES)
    used = {ROOT / name for name in re.findall(r"--config_file (recipes/accelerate/\w+\.yaml)", shown)}
    assert used == set((ROOT / "recipes" / "accelerate").glob("*.yaml"))


SHRUNK = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHRUNK |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 64, "rope_theta": 500000.0}
GRANITE_HYBRID = {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 48}
GRANITE_HYBRID |= {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
GRANITE_HYBRID |= {"mamba_chunk_size": 16}
ARCHITECTURES = {  # model of a recipe -> the same kind of model, small
    "meta-llama/Llama-3.1-8B-Instruct": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "Qwen/Qwen3-8B": ("Qwen3Config", {}),
    "ibm-granite/granite-4.0-h-1b": ("GraniteMoeHybridConfig", GRANITE_HYBRID),
    "Qwen/Qwen3-0.6B": ("Qwen3Config", {"tie_word_embeddings": True}),
}


def environment_of(launch_file: Path) -> dict[str, str]:
    """What `accelerate launch` with this file tells its ranks."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", str(launch_file), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    found = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in found.items() if name.startswith(("ACCELERATE_", "FSDP_", MESH.upper()))}


def recipe_steps(path: str, launch_file: str | None, changes: list[str]) -> str:
    """Three steps of a recipe on this rank's CPU, as its launch file would have it; what the model was wrapped in."""
    if launch_file is not None:
        os.environ |= environment_of(Path(launch_file))
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    if f"{MESH.upper()}_DP_SHARD_SIZE" in os.environ:  # as many replicas, of fewer ranks
        os.environ[f"{MESH.upper()}_DP_SHARD_SIZE"] = "2"
    script, wrappers = load_script("sft"), list[str]()

    class Recording(script.HeteroTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            found = super().train(*args, **kwargs)
            wrappers.append(f"{type(self.model_wrapped).__name__}: {mesh_of(self.model_wrapped)}")
            return found

    script.HeteroTrainer = Recording
    script.main(["--config", path, *changes])
    return wrappers[0]


GPU_RECIPES = [path for path in RECIPES if script_of(path) == "sft" and not path.parent.name.endswith("_cpu")]


@pytest.mark.parametrize(
    "path", often(GPU_RECIPES, ROOT / "recipes" / "llama31_8b_128k" / "train.yaml"), ids=lambda path: path.parent.name
)
def test_three_steps_of_each_recipe(path: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The same settings, launch file and kind of model, shrunk, on chats of very different lengths."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    launch_file = launch_file_of(path) if recipe["num_ranks"] > 1 else None
    check_three_steps(path, launch_file, min(recipe["num_ranks"], 2), tokenizer, tmp_path)


def test_three_steps_of_replicas(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A recipe of nodes with the launch file that makes each node a replica: two of two ranks."""
    path = ROOT / "recipes" / "llama31_8b_two_nodes" / "train.yaml"
    launch_file = ROOT / "recipes" / "accelerate" / "hsdp.yaml"
    config = yaml.safe_load(launch_file.read_text(encoding="utf-8"))
    assert mesh_in(launch_file) == (config["num_machines"], config["num_processes"] // config["num_machines"])
    assert environment_of(launch_file)["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] == "2"
    assert environment_of(launch_file)["PARALLELISM_CONFIG_DP_SHARD_SIZE"] == "8"
    wrappers = check_three_steps(path, launch_file, 4, tokenizer, tmp_path)
    assert all(name.endswith("Mesh(replicas=2, shards=2)") for name in wrappers), wrappers


def check_three_steps(
    path: Path, launch_file: Path | None, num_ranks: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> list[str]:
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    kind, special = ARCHITECTURES[recipe["model"]]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(vocab_size=len(tokenizer), **SHRUNK, **special)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    said = [{"role": "user", "content": "import os"}, {"role": "assistant", "content": "x = 1\n"}]
    rows = [{"messages": said * (1 + (7 * number) % 23)} for number in range(32)]
    data = write_lines(tmp_path / "chats.jsonl", rows)

    changes = {
        **{"model": tmp_path / "model", "dataset": data, "output_dir": tmp_path / "out", "max_length": 400},
        **{"num_ranks": num_ranks, "per_device_train_batch_size": 8 // num_ranks, "max_steps": 3},
        **{"use_cpu": "true", "dataloader_pin_memory": "false", "max_tokens_per_rank": 300, "disable_tqdm": "true"},
        **{"save_strategy": "no"},
    }
    words = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    wrappers = run_ranks(recipe_steps, num_ranks, str(path), launch_file and str(launch_file), words)
    if launch_file is not None:
        wrapper = "FSDP" if "fsdp_config" in launch_file.read_text() else "DistributedDataParallel"
        assert all(name.startswith(wrapper) for name in wrappers), wrappers
    records = read_records(tmp_path / "out")
    assert [len(record["lengths"]) for record in records] == [8] * 3
    assert all(record["plan"]["num_ranks"] == num_ranks for record in records)
    saved = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"report.html", "adapter_model.safetensors" if "lora_r" in recipe else "model.safetensors"} <= saved
    return wrappers


def test_an_unknown_key_is_named(sft: ModuleType, tmp_path: Path) -> None:
    """The message has the file, the key, and the key that was probably meant; so it is on the command line."""
    path = tmp_path / "my.yaml"
    path.write_text("learning_rat: 1e-3\n", encoding="utf-8")
    with pytest.raises(HeteroError, match=r"my\.yaml: unknown key 'learning_rat'. Did you mean 'learning_rate'"):
        sft.parse(["--config", str(path)])
    with pytest.raises(HeteroError, match=r"command line: unknown key 'max_lenght'\. Did you mean 'max_length'"):
        sft.parse(["--use_cpu", "true", "--max_lenght=3"])


def test_the_command_line_overrides_the_file(sft: ModuleType, tmp_path: Path) -> None:
    """File first, then command line; a number that YAML reads as text (1e-3) is a number all the same."""
    path = tmp_path / "my.yaml"
    path.write_text("learning_rate: 1e-3\nmax_steps: 7\nuse_cpu: true\nmodel_config: {model_type: llama}\n")
    args, training_args, hetero = sft.parse(["--config", str(path), "--max_steps", "9", "--max_degree", "2"])
    assert (training_args.learning_rate, training_args.max_steps, hetero.max_degree) == (1e-3, 9, 2)
    assert args.model_config == {"model_type": "llama"}


BAD_VALUES: dict[str, list[Any]] = {
    "max_length": ["many", -3, 0, [1], 2.5, True],
    "vocab_size": [0, -1, "x", [1], None],
    "num_proc": [0, -2, "x"],
    "lora_r": [0, -1, "x", [2]],
    "lora_target_modules": [3, [3], {"a": 1}],
    "dtype": [3, None],
    "dataset": [3, None, []],
    "text_column": [3, None, []],
    "model": [3, []],
    "model_config": [3, []],
    "tokenizer": [3],
    "max_length_policy": ["cut", 3, None],
    "assistant_only_loss": ["maybe", 3, None],
    "save_model": ["maybe", [1]],
    "learning_rate": ["fast"],
    "optim": ["best"],
    "solver": ["best"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD_VALUES.items() for value in values])
def test_a_value_that_cannot_be_is_named(sft: ModuleType, tmp_path: Path, key: str, value: Any) -> None:
    """Whatever a file gives to a key, of another type or out of range, is an error of one line that names it."""
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump({"use_cpu": True, "output_dir": str(tmp_path), key: value}))
    with pytest.raises(HeteroError) as caught:
        sft.parse(["--config", str(path)])
    said = str(caught.value)
    assert "\n" not in said
    assert str(value) in said
    assert key in said or key == "optim"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "FileNotFoundError"),
        ("a: [1", "ParserError"),
        ("- model", r"holds \['model'\]; it must hold lines of `key: value`"),
        ("words", "holds 'words'"),
        ("3: 4", "holds {3: 4}"),
    ],
)
def test_a_file_that_is_no_recipe(sft: ModuleType, tmp_path: Path, text: str | None, message: str) -> None:
    """No file, no YAML, or YAML of another kind: the error names the file."""
    path = tmp_path / "my.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(HeteroError, match=rf"my\.yaml.*{message}"):
        sft.parse(["--config", str(path)])


MISSING = {
    "dataset": (["nowhere.jsonl", "/nowhere", "", "empty.jsonl"], "dataset="),
    "tokenizer": (["/nowhere"], "tokenizer='/nowhere'"),
    "model": (["/nowhere"], "Cannot make the model"),
    "model_config": (["{", "{}", '{"model_type": "nothing"}'], "Cannot make the model"),
    "dtype": (["floaty"], "floaty"),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, (values, _) in MISSING.items() for value in values])
def test_what_is_missing_is_named(
    sft: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str
) -> None:
    """Data, tokenizers and models that are not there, or are none, are errors of one line, too."""
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("")
    write_lines(Path("rows.jsonl"), [{"text": "x"}])
    shape = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    settings = {"dataset": "rows.jsonl", "tokenizer": "train", "vocab_size": 300, "use_cpu": True, "output_dir": "out"}
    settings |= {"model_config": shape} if key != "model" else {}
    Path("my.yaml").write_text(yaml.safe_dump({**settings, key: value}))
    with pytest.raises(HeteroError) as caught:
        sft.main(["--config", "my.yaml"])
    assert MISSING[key][1] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_is_one_line(tmp_path: Path) -> None:
    """The script ends with status 1 and what is wrong, without a traceback."""
    status, said = run_program(ROOT / "recipes" / "sft.py", "--use_cpu", "true", "--max_length", "0")
    assert status == 1
    assert said.splitlines()[-1] == "sft.py: max_length=0: it must be at least 1."
    assert "Traceback" not in said


# ------------------------------------------------------------------------------------------------------------ data


def prepared(sft: ModuleType, tokenizer: Any, dataset: Path, **options: Any) -> datasets.Dataset:
    args = sft.RecipeArguments(dataset=str(dataset), **options)
    return sft.prepare_data(args, sft.load_data(args), tokenizer)


def expected(tokenizer: Any, text: str) -> list[int]:
    return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize(
    "kind", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "part-*.jsonl", "saved", "dict"]
)
def test_text_becomes_tokens_and_an_end(sft: ModuleType, tokenizer: Any, tmp_path: Path, kind: str) -> None:
    """Plain text gives its tokens and one end token, from whatever file it comes; `length` counts them."""
    data = datasets.Dataset.from_dict({"text": TEXTS, "note": ["x"] * len(TEXTS)})
    source = tmp_path / kind
    match kind:
        case "rows.csv":
            data.to_csv(source, index=False)
        case "rows.parquet":
            data.to_parquet(source)
        case "part-*.jsonl":
            write_lines(tmp_path / "part-1.jsonl", [{"text": text} for text in TEXTS[:2]])
            write_lines(tmp_path / "part-2.jsonl", [{"text": text} for text in TEXTS[2:]])
        case "saved":
            data.save_to_disk(source)
        case "dict":
            datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(source)
        case _:
            data.to_json(source)
    found = prepared(sft, tokenizer, source)
    assert found["input_ids"][:] == [expected(tokenizer, text) for text in TEXTS]
    assert found["length"][:] == [len(expected(tokenizer, text)) for text in TEXTS]
    assert set(found.column_names) == {"input_ids", "length"}


def test_a_text_file_is_one_sample(sft: ModuleType, tokenizer: Any, tmp_path: Path) -> None:
    """A .txt file is not cut into lines."""
    (tmp_path / "a.txt").write_text(TEXTS[2], encoding="utf-8")
    assert prepared(sft, tokenizer, tmp_path / "a.txt")["input_ids"][0] == expected(tokenizer, TEXTS[2])


def test_chats_go_through_the_template(sft: ModuleType, tokenizer: Any, tmp_path: Path) -> None:
    """A `messages` column gives what the tokenizer's chat template gives; on request only the assistant is learned."""
    source = write_lines(tmp_path / "chats.jsonl", [{"messages": CHAT}])
    asked, said = tokenizer("import os")["input_ids"], expected(tokenizer, "x = 1")
    whole = prepared(sft, tokenizer, source)
    assert whole["input_ids"][0] == asked + said
    assert "labels" not in whole.column_names
    masked = prepared(sft, tokenizer, source, assistant_only_loss=True)
    assert masked["input_ids"][0] == asked + said
    assert masked["labels"][0] == [-100] * len(asked) + said


def test_tokens_are_kept(sft: ModuleType, tmp_path: Path) -> None:
    """A pre-tokenised sample keeps its tokens and labels, less its padding, and needs no tokenizer."""
    rows = [
        {"input_ids": [5, 6, 7, 0], "labels": [-100, 6, 7, -100], "attention_mask": [1, 1, 1, 0]},
        {"input_ids": [8, 9, 1, 2], "labels": [8, 9, 1, 2], "attention_mask": [1, 1, 1, 1]},
    ]
    found = prepared(sft, None, write_lines(tmp_path / "tokens.jsonl", rows))
    assert found["input_ids"][:] == [[5, 6, 7], [8, 9, 1, 2]]
    assert found["labels"][:] == [[-100, 6, 7], [8, 9, 1, 2]]
    assert found["length"][:] == [3, 4]
    args = sft.RecipeArguments(dataset="tokens", model_config={})
    assert sft.load_tokenizer(args, datasets.Dataset.from_list(rows)) is None


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"place": "here"}}}]
TOOL_TEMPLATE = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{{ mood }}" + CHAT_TEMPLATE


@pytest.fixture
def with_tools(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    made = copy.deepcopy(tokenizer)
    made.chat_template = TOOL_TEMPLATE
    return made


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["as lists", "as JSON"])
def test_tools_and_settings_reach_the_template(
    sft: ModuleType, with_tools: Any, tmp_path: Path, tools: list[Any] | str
) -> None:
    """A row's `tools` and `chat_template_kwargs` are given to the template, as TRL does; rows without do without."""
    rows = [
        {"messages": CHAT, "tools": tools, "chat_template_kwargs": {"mood": "calm"}},
        {"messages": CHAT, "tools": None, "chat_template_kwargs": None},
    ]
    expected = [
        with_tools.apply_chat_template(CHAT, tools=TOOLS, mood="calm")["input_ids"],
        with_tools.apply_chat_template(CHAT)["input_ids"],
    ]
    assert len(expected[0]) > len(expected[1])
    assert prepared(sft, with_tools, write_lines(tmp_path / "chats.jsonl", rows))["input_ids"][:] == expected
    table = datasets.Dataset.from_list(rows)
    assert sft.prepare_data(sft.RecipeArguments(), table, with_tools)["input_ids"][:] == expected


@pytest.mark.parametrize("kind", ["texts", "chats"])
def test_a_completion_is_learned_and_its_prompt_is_not(
    sft: ModuleType, tokenizer: Any, tmp_path: Path, kind: str
) -> None:
    """`prompt` and `completion` become what TRL makes of them: the completion, ended, is what is learned."""
    asked, answered = ("import os\n", "x = 1") if kind == "texts" else (CHAT[:1], CHAT[1:])
    source = write_lines(tmp_path / "pairs.jsonl", [{"prompt": asked, "completion": answered}])
    found = prepared(sft, tokenizer, source)
    prompt = tokenizer("import os\n" if kind == "texts" else "import os")["input_ids"]
    assert found["input_ids"][0] == prompt + expected(tokenizer, "x = 1")
    assert found["labels"][0] == [-100] * len(prompt) + expected(tokenizer, "x = 1")


@pytest.mark.parametrize(
    ("row", "assistant_only"),
    [
        ({"text": "import os"}, False),
        ({"messages": CHAT, "tools": TOOLS, "chat_template_kwargs": {"mood": "calm"}}, True),
        ({"prompt": "import os\n", "completion": "x = 1"}, False),
        ({"prompt": CHAT[:1], "completion": CHAT[1:], "tools": json.dumps(TOOLS)}, False),
        ({"prompt": CHAT, "completion": CHAT}, True),
    ],
    ids=["text", "chat", "pair", "pair-of-chats", "pair-of-chats-assistant-only"],
)
def test_rows_become_what_trl_makes_of_them(
    sft: ModuleType, with_tools: Any, model_folder: Path, tmp_path: Path, row: dict[str, Any], assistant_only: bool
) -> None:
    """Tokens and labels are those of TRL's SFTTrainer."""
    trl = pytest.importorskip("trl")
    table = datasets.Dataset.from_list([row] * 2)
    options = {"max_length": None, "assistant_only_loss": assistant_only, "use_cpu": True, "bf16": False}
    config = trl.SFTConfig(str(tmp_path), report_to=[], activation_checkpointing=False, **options)
    theirs = trl.SFTTrainer(str(model_folder), config, train_dataset=table, processing_class=copy.deepcopy(with_tools))
    args = sft.RecipeArguments(assistant_only_loss=assistant_only)
    for ours, prepared in zip(sft.prepare_data(args, table, with_tools), theirs.train_dataset, strict=True):
        assert ours["input_ids"] == prepared["input_ids"]
        assert ours.get("labels", ours["input_ids"]) == prepared["labels"]


def test_a_template_that_marks_nothing_is_refused(sft: ModuleType, tokenizer: Any, tmp_path: Path) -> None:
    """assistant_only_loss needs `{% generation %}`; without it nothing would be learned, by a run that looks well."""
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    source = write_lines(tmp_path / "chats.jsonl", [{"messages": CHAT}])
    with pytest.raises(HeteroError, match=r"Row 0: .*\{% generation %\}.*chat_template"):
        prepared(sft, plain, source, assistant_only_loss=True)
    assert "labels" not in prepared(sft, plain, source).column_names
    plain.chat_template = None
    with pytest.raises(HeteroError, match=r"the tokenizer has no chat template\. Name a tokenizer"):
        prepared(sft, plain, source)


def test_assistant_only_loss_needs_an_assistant(sft: ModuleType, tokenizer: Any, tmp_path: Path) -> None:
    """Of texts and of tokens nobody knows who said them; chats in which no assistant speaks have nothing to learn."""
    for row in ({"text": "x"}, {"input_ids": [1, 2], "labels": [1, 2]}):
        with pytest.raises(HeteroError, match=r"assistant_only_loss=True, but .* has no 'messages'"):
            prepared(sft, tokenizer, write_lines(tmp_path / "rows.jsonl", [row]), assistant_only_loss=True)
    lonely = write_lines(tmp_path / "chats.jsonl", [{"messages": CHAT[:1]}] * 2)
    with pytest.raises(HeteroError, match=r"no token of its 2 rows is to be learned.*\{% generation %\}"):
        prepared(sft, tokenizer, lonely, assistant_only_loss=True)
    mixed = write_lines(tmp_path / "mixed.jsonl", [{"messages": CHAT[:1]}, {"messages": CHAT}])
    assert set(prepared(sft, tokenizer, mixed, assistant_only_loss=True)["labels"][0]) == {-100}


def test_data_without_a_target_are_refused(sft: ModuleType, tokenizer: Any, tmp_path: Path) -> None:
    """However it comes that all labels are -100: so they were, or max_length cut the rest off."""
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, -100, 8]}]
    source = write_lines(tmp_path / "tokens.jsonl", rows)
    assert len(prepared(sft, None, source)) == 1
    with pytest.raises(HeteroError, match=r"no token of its 1 rows is to be learned.*max_length"):
        prepared(sft, None, source, max_length=3, max_length_policy="truncate")
    unlearned = write_lines(tmp_path / "unlearned.jsonl", [{"input_ids": [5, 6], "labels": [-100, -100]}])
    with pytest.raises(HeteroError, match=r"no token of its 1 rows is to be learned\. Labels other than -100"):
        prepared(sft, None, unlearned)


ROWS = {
    "text": ({"text": "x"}, [{"text": None}, {"text": 3}, {"text": ["x"]}]),
    "chat": (
        {"messages": CHAT},
        [
            {"messages": None},
            {"messages": []},
            {"messages": "import os"},
            {"messages": ["import os"]},
            {"messages": [{"content": "x"}]},
            {"messages": [{"role": "user"}]},
            {"messages": [*CHAT, {"role": "user", "content": None}]},
        ],
    ),
    "tools": ({"messages": CHAT, "tools": "[]"}, [{"messages": CHAT, "tools": "[{]"}]),
    "pair": (
        {"prompt": "x", "completion": "y"},
        [{"prompt": None, "completion": "y"}, {"prompt": "x", "completion": None}, {"prompt": "x", "completion": CHAT}],
    ),
    "tokens": (
        {"input_ids": [1, 2], "labels": [1, 2]},
        [
            {"input_ids": None, "labels": [1, 2]},
            {"input_ids": [], "labels": []},
            {"input_ids": "abc", "labels": [1, 2]},
            {"input_ids": [[1, 2]], "labels": [1, 2]},
            {"input_ids": [1, None], "labels": [1, 2]},
            {"input_ids": [1, 2], "labels": None},
            {"input_ids": [1, 2], "labels": [1]},
        ],
    ),
    "padded tokens": (
        {"input_ids": [1, 2], "attention_mask": [1, 1]},
        [
            {"input_ids": [1, 2], "attention_mask": None},
            {"input_ids": [1, 2], "attention_mask": [0, 0]},
            {"input_ids": [1, 2], "attention_mask": [1]},
            {"input_ids": [1, 2], "attention_mask": [[1, 0], [1, 1]]},
            {"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]},
        ],
    ),
    "packed tokens": (
        {"input_ids": [1, 2, 3], "seq_lengths": [2, 1], "position_ids": [0, 1, 0]},
        [
            {"input_ids": [1, 2, 3], "seq_lengths": [2, 2], "position_ids": [0, 1, 0]},
            {"input_ids": [1, 2, 3], "seq_lengths": [3, 0], "position_ids": [0, 1, 2]},
            {"input_ids": [1, 2, 3], "seq_lengths": [1, 2], "position_ids": [0, 1, 0]},
            {"input_ids": [1, 2, 3], "seq_lengths": [2, 1], "position_ids": [0, 1, 5]},
        ],
    ),
}
BAD_ROWS = [
    pytest.param(good, bad, id=f"{kind}-{n}") for kind, (good, bads) in ROWS.items() for n, bad in enumerate(bads)
]


@pytest.mark.parametrize(("good", "bad"), BAD_ROWS)
def test_a_row_that_cannot_be_used_is_named(
    sft: ModuleType, tokenizer: Any, tmp_path: Path, good: dict[str, Any], bad: dict[str, Any]
) -> None:
    """One row of another kind than the others, or empty, or at odds with itself: the message has its number."""
    assert len(prepared(sft, tokenizer, write_lines(tmp_path / "good.jsonl", [good] * 5))) == 5
    with pytest.raises(HeteroError, match=r"Row 3\b"):
        prepared(sft, tokenizer, write_lines(tmp_path / "rows.jsonl", [good, good, good, bad, good]))


def test_a_row_is_named_although_a_tokenizer_is_made_of_the_data(sft: ModuleType, tmp_path: Path) -> None:
    """A tokenizer is made of the texts there are; it is the row without one that stops the run."""
    args = sft.RecipeArguments(tokenizer="train", vocab_size=300)
    for bad in (None, 3):
        source = write_lines(tmp_path / "rows.jsonl", [{"text": "x"}, {"text": bad}])
        data = sft.load_data(sft.RecipeArguments(dataset=str(source)))
        with pytest.raises(HeteroError, match=f"Row 1: text is {bad}; it must be text"):
            sft.prepare_data(args, data, sft.load_tokenizer(args, data))


@pytest.mark.slow
def test_every_process_finds_what_another_has_tokenised() -> None:
    """`datasets` caches rows by the functions they go through, whose names must not depend on the order of sets."""
    code = (
        "import runpy; from datasets.fingerprint import Hasher; "
        "script = runpy.run_path('recipes/sft.py', run_name='sft_'); "
        "print(*(Hasher.hash(script[name]) for name in ('stdlib_files', 'tokenise', 'truncate')))"
    )
    names = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "123"
    }
    assert len(names) == 1


def test_a_row_is_named_by_several_processes(sft: ModuleType, tokenizer: Any, tmp_path: Path) -> None:
    """The number is that of the row in the dataset, whoever tokenises it."""
    source = write_lines(tmp_path / "rows.jsonl", [{"text": None if n == 5 else "x"} for n in range(8)])
    with pytest.raises(HeteroError, match="Row 5: text is None; it must be text"):
        prepared(sft, tokenizer, source, num_proc=2)


# ----------------------------------------------------------------------------------------------------- packed rows


DOCUMENTS = [[5, 6, 7], [8, 9], [3], [4, 5, 6, 7]]
PACKS = [DOCUMENTS[:2], DOCUMENTS[2:]]
MARKS = {  # how packers say where documents end
    "seq_lengths": lambda pack: {"seq_lengths": [len(document) for document in pack]},
    "position_ids": lambda pack: {"position_ids": [at for document in pack for at in range(len(document))]},
    "numbers": lambda pack: {"attention_mask": [n for n, document in enumerate(pack, 1) for _ in document]},
    "both": lambda pack: {**MARKS["position_ids"](pack), **MARKS["numbers"](pack)},
    "all ones": lambda pack: {**MARKS["position_ids"](pack), "attention_mask": [1] * sum(map(len, pack))},
}


def joined(pack: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(pack))


def packed(mark: str, padding: int = 0) -> datasets.Dataset:
    rows = []
    for pack in PACKS:
        row = {"input_ids": joined(pack), "labels": [-token for token in joined(pack)], **MARKS[mark](pack)}
        rows.append({name: values + [0] * (padding if name != "seq_lengths" else 0) for name, values in row.items()})
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("padding", [0, 2])
def test_documents_of_packed_rows_stay_apart(sft: ModuleType, mark: str, padding: int) -> None:
    """Tokens and labels stay; `seq_lengths`, which hf_hetero goes by, has the documents, however they were marked."""
    if padding and mark in {"seq_lengths", "position_ids"}:
        pytest.skip("without an attention mask nothing says what is padding")
    found = sft.prepare_data(sft.RecipeArguments(), packed(mark, padding), None)
    assert found["input_ids"][:] == [joined(pack) for pack in PACKS]
    assert found["labels"][:] == [[-token for token in joined(pack)] for pack in PACKS]
    assert found["seq_lengths"][:] == [[3, 2], [1, 4]]
    assert found["length"][:] == [5, 5]
    assert read_samples(found, "length").lengths.tolist() == [3, 2, 1, 4]


def test_marks_of_one_document_are_no_packing(sft: ModuleType) -> None:
    """Rows of one document each, padded on either side, are rows as ever."""
    rows = [
        {"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1], "position_ids": [1, 0, 1]},
        {"input_ids": [7, 0, 0], "attention_mask": [1, 0, 0], "position_ids": [0, 1, 2]},
    ]
    found = sft.prepare_data(sft.RecipeArguments(), datasets.Dataset.from_list(rows), None)
    assert found["input_ids"][:] == [[5, 6], [7]]
    assert set(found.column_names) == {"input_ids", "length"}


def test_max_length_is_of_a_document(sft: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Of packed rows, documents are counted, refused and cut; what is left of one still does not see the others."""
    args = {"dataset": "packs", "max_length": 3}
    with pytest.raises(
        HeteroError, match=r"1 of 4 samples have more than max_length=3 tokens; the longest, row 1, has 4"
    ):
        sft.prepare_data(sft.RecipeArguments(**args), packed("numbers"), None)
    cut = sft.prepare_data(sft.RecipeArguments(**args, max_length_policy="truncate"), packed("numbers"), None)
    assert cut["input_ids"][:] == [[5, 6, 7, 8, 9], [3, 4, 5, 6]]
    assert cut["labels"][:] == [[-5, -6, -7, -8, -9], [-3, -4, -5, -6]]
    assert (cut["seq_lengths"][:], cut["length"][:]) == ([[3, 2], [1, 3]], [5, 4])
    assert "1 tokens are cut off them" in capsys.readouterr().out
    split = sft.prepare_data(sft.RecipeArguments(**args, max_length_policy="split"), packed("numbers"), None)
    assert split["seq_lengths"][:] == [[3, 2], [1, 4]]
    samples, _ = limited(read_samples(split, "length"), 3, "split")
    assert samples.lengths.tolist() == [3, 2, 1, 3, 1]
    assert sft.prepare_data(sft.RecipeArguments(max_length=4), packed("numbers"), None)["length"][:] == [5, 5]


def test_masks_of_trl_say_what_is_learned(sft: ModuleType) -> None:
    """Tokens with TRL's mask columns instead of labels are learned where the masks say so."""
    masks = {"assistant_masks": [0, 1, 1, 0], "completion_mask": [0, 0, 1, 1]}
    for names, labels in ((["assistant_masks"], [6, 7]), (["completion_mask"], [7, 8]), (list(masks), [7])):
        table = datasets.Dataset.from_list([{"input_ids": [5, 6, 7, 8], **{name: masks[name] for name in names}}])
        found = sft.prepare_data(sft.RecipeArguments(), table, None)["labels"][0]
        assert [label for label in found if label != -100] == labels


def test_a_missing_column_or_file_is_named(sft: ModuleType, tokenizer: Any, tmp_path: Path) -> None:
    """What was looked for, and what is there."""
    source = write_lines(tmp_path / "rows.jsonl", [{"body": "x"}])
    with pytest.raises(HeteroError, match=r"no 'input_ids', 'messages' or 'text' column, only \['body'\]"):
        prepared(sft, tokenizer, source)
    assert prepared(sft, tokenizer, source, text_column="body")["input_ids"][0] == expected(tokenizer, "x")
    with pytest.raises(HeteroError, match="no such file"):
        prepared(sft, tokenizer, tmp_path / "nowhere.jsonl")


def test_longer_samples_are_refused_or_cut_as_asked(
    sft: ModuleType, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default a sample longer than max_length stops the run; cutting is a choice, and what is cut is counted."""
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4, 5, 6, 7, 8], "labels": [4, 5, 6, 7, 8]}]
    source = write_lines(tmp_path / "tokens.jsonl", rows)
    with pytest.raises(HeteroError, match=r"1 of 2 samples have more than max_length=3.*row 1, has 5"):
        prepared(sft, tokenizer, source, max_length=3)
    found = prepared(sft, tokenizer, source, max_length=3, max_length_policy="truncate")
    assert found["input_ids"][:] == found["labels"][:] == [[1, 2, 3], [4, 5, 6]]
    assert found["length"][:] == [3, 3]
    assert "2 tokens are cut off" in capsys.readouterr().out
    assert prepared(sft, tokenizer, source, max_length=5)["length"][:] == [3, 5]


def test_the_built_in_corpus(
    sft: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sources of the standard library in a fixed order, without tests; long files are left out, and that is said.

    The tokenizer is made of them once.
    """
    library = tmp_path / "lib"
    for name, text in (
        ("b.py", TEXTS[0]),
        ("a/c.py", TEXTS[2]),
        ("test/d.py", "no"),
        ("a/tests/e.py", "no"),
        ("z.py", ""),
    ):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(sft.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    args = sft.RecipeArguments(tokenizer="train", vocab_size=280, max_length=25)
    data = sft.load_data(args)
    assert data["text"][:] == [TEXTS[2], TEXTS[0]]
    made, again = sft.load_tokenizer(args, data), sft.load_tokenizer(args, data)
    assert capsys.readouterr().out.count("Making a tokenizer") == 1
    assert len(made) == 280
    assert made(TEXTS[2])["input_ids"] == again(TEXTS[2])["input_ids"]
    assert made.decode(made(TEXTS[2])["input_ids"]) == TEXTS[2]
    found = sft.prepare_data(args, data, made)
    assert found["input_ids"][:] == [expected(made, TEXTS[0])]
    assert "1 of 2 samples have more than max_length=25 tokens and are left out" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- run


def test_a_new_model_fits_its_tokenizer(sft: ModuleType, tokenizer: Any) -> None:
    """From `model_config`: vocabulary and special tokens are the tokenizer's; JSON text serves as well as a mapping."""
    shape = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape["num_attention_heads"] = 2
    for given in (shape, json.dumps(shape)):
        model = sft.load_model(sft.RecipeArguments(model_config=given), tokenizer)
        assert model.config.vocab_size == len(tokenizer)
        assert model.config.eos_token_id == tokenizer.eos_token_id


def test_adapters_alone_are_trained(sft: ModuleType, tokenizer: Any, model_folder: Path) -> None:
    """With `lora_r`, only adapter weights ask for a gradient."""
    model = sft.load_model(sft.RecipeArguments(model=str(model_folder), lora_r=2), tokenizer)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_exactly_one_model(sft: ModuleType, tokenizer: Any) -> None:
    """No model, or two, is an error that names both fields."""
    for options in ({}, {"model": "a", "model_config": {}}):
        with pytest.raises(HeteroError, match=r"`model` .* `model_config`"):
            sft.load_model(sft.RecipeArguments(**options), tokenizer)


@pytest.mark.parametrize("lora", [[], ["--lora_r", "2"]], ids=["full", "lora"])
def test_the_script_trains(
    sft: ModuleType, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lora: list[str]
) -> None:
    """Three steps from a local model and a local file: a record of each step, a page, pictures, a saved model."""
    source = write_lines(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS * 2])
    config = tmp_path / "my.yaml"
    config.write_text(
        f"model: {model_folder}\ndataset: {source}\noutput_dir: {tmp_path / 'out'}\nuse_cpu: true\nmax_steps: 3\n"
        "per_device_train_batch_size: 3\nreport_to: none\ndataloader_pin_memory: false\nlearning_rate: 1e-3\n"
        "save_strategy: 'no'\ndisable_tqdm: true\nlogging_steps: 1\ncalibrate: true\n",
        encoding="utf-8",
    )
    sft.main(["--config", str(config), *lora])
    out = tmp_path / "out"
    assert [len(record["lengths"]) for record in read_records(out)] == [3, 3, 2]
    assert {"report.html", "step.png", "step.svg", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    assert (out / ("adapter_model.safetensors" if lora else "model.safetensors")).exists()
    printed = capsys.readouterr().out
    assert "8 samples" in printed
    assert f"Wrote {out / 'report.html'}" in printed


@pytest.mark.slow
@pytest.mark.slow
def test_the_quickstart_runs_on_four_ranks(tmp_path: Path) -> None:
    """The command of its README, cut to two steps: four ranks plan, train and report, and nothing warns."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml"]
    script = ["recipes/sft.py", "--config", "recipes/quickstart_cpu/train.yaml"]
    short = ["--max_steps", "2", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(
        [*launch, *script, *short], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower(), done.stderr
    records = read_records(tmp_path / "out")
    assert [len(record["lengths"]) for record in records] == [16, 16]
    assert all(record["plan"]["num_ranks"] == 4 for record in records)
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.slow
def test_two_nodes_of_two_ranks(tmp_path: Path) -> None:
    """Two launchers on loopback, as on two machines: four ranks in two nodes train together."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml"]
    nodes = ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    script = ["recipes/sft.py", "--config", "recipes/quickstart_cpu/train.yaml"]
    short = ["--max_steps", "2", "--max_tokens_per_rank", "2560", "--output_dir", str(tmp_path / "out")]
    running = [
        subprocess.Popen(
            [*launch, *nodes, "--machine_rank", str(rank), *script, *short],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [node.communicate(timeout=400)[0] for node in running]
    finally:
        for node in running:
            node.kill()
    assert [node.returncode for node in running] == [0, 0], printed
    records = read_records(tmp_path / "out")
    assert [record["plan"]["num_ranks"] for record in records] == [4, 4]
    degrees = {
        len(group["ranks"]) for record in records for m in record["plan"]["micro_batches"] for group in m["groups"]
    }
    assert 4 in degrees  # files of more than 5120 tokens need both nodes


def test_weights_and_sources_pass_the_tokenizer(sft: Any) -> None:
    """The recipe keeps the weight and the source of each row where asked for, and no other column that is no tokens."""
    table = datasets.Dataset.from_list([{"input_ids": [5, 6, 7], "importance": -0.5, "source": "web"}])
    [row] = sft.prepare_data(sft.RecipeArguments(), table, None, weight_column="importance")
    assert row["importance"] == -0.5
    assert "source" not in row
    [row] = sft.prepare_data(sft.RecipeArguments(), table, None, source_column="source")
    assert row["source"] == "web"
    assert "importance" not in row


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "qwen2.5-vl", "llava"])
def test_models_that_see_are_loaded(sft: ModuleType, name: str, tmp_path: Path) -> None:
    """As what they are, from a folder and from a config, whether or not transformers counts them as language models."""
    model = model_of(name)
    model.save_pretrained(tmp_path)
    loaded = sft.load_model(sft.RecipeArguments(model=str(tmp_path), dtype="float32"), None)
    assert type(loaded) is type(model)
    assert all(torch.equal(x, model.state_dict()[key]) for key, x in loaded.state_dict().items())
    shape = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert type(sft.load_model(sft.RecipeArguments(model_config=shape), None)) is type(model)
