"""The command line gives what the library returns, and one line for what is wrong."""

from __future__ import annotations

import gc
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from costs.test_cost_model import a_cost_model
from planner.reference import small_cost

from hf_hetero import CostModel, Plan, Planner
from hf_hetero.cli import _parser, main
from hf_hetero.costs import shipped_names
from hf_hetero.what_if.mixes import MIXES
from hf_hetero.what_if.simulate import busy_seconds

LENGTHS = [150, 20, 30, 40, 7, 90, 1]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "lengths.txt").write_text("\n".join(map(str, LENGTHS)) + "\n\n")
    a_cost_model().save(tmp_path / "cost.json")
    return [str(tmp_path / "lengths.txt"), "--cost", str(tmp_path / "cost.json"), "--ranks", "4"]


def test_plan_as_json(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """--json is a plan in its documented format, of all samples."""
    assert main(["plan", *files, "--json"]) == 0
    plan = Plan.from_dict(json.loads(capsys.readouterr().out))
    assert plan.num_samples == len(LENGTHS)
    assert plan.seconds == pytest.approx(a_cost_model().plan_seconds(plan, LENGTHS))
    assert plan.lower_bound_s <= plan.seconds


def test_plan_as_table(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The table counts all samples and tokens, and says how far from optimal the plan may be."""
    assert main(["plan", *files]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in printed[1:-1]]
    assert sum(int(row[-2].replace(",", "")) for row in rows) == sum(LENGTHS)
    assert "of optimal" in printed[-1]


def test_plan_as_picture(files: list[str], tmp_path: Path) -> None:
    """--plot draws the plan."""
    assert main(["plan", *files, "--plot", str(tmp_path / "plan.svg")]) == 0
    assert "<svg" in (tmp_path / "plan.svg").read_text()


def test_prove(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--prove raises what is proven of a plan, and its last line says how far from optimal the plan is at most."""
    pytest.importorskip("mip")
    # two long samples take four ranks each, one after the other or side by side: either way more than their work says
    (tmp_path / "two.txt").write_text("\n".join(map(str, [300, 290] + [40] * 4)))
    small_cost(100, (2, 4)).save(tmp_path / "small.json")
    words = [str(tmp_path / "two.txt"), "--cost", str(tmp_path / "small.json"), "--ranks", "4"]

    def planned(*more: str) -> dict[str, Any]:
        assert main(["plan", *words, *more, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    quick, proven = planned(), planned("--prove", "20")
    assert proven["seconds"] <= quick["seconds"]
    assert quick["lower_bound_s"] * 1.01 < proven["lower_bound_s"] <= proven["seconds"]
    assert main(["plan", *words, "--prove", "20"]) == 0
    assert "within 0.0% of optimal" in capsys.readouterr().out.splitlines()[-1]
    steps = ["--batch-size", "3", "--steps", "2"]
    ways = simulated(capsys, *files, *steps, "--prove", "1"), simulated(capsys, *files, *steps)
    assert ways[0]["lower_bound_s"] >= ways[1]["lower_bound_s"]


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_time_to_prove_that_cannot_be(files: list[str], seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is above 0, and finite."""
    assert "--prove" in refused(capsys, "plan", *files, f"--prove={seconds}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": "12\nmany\n"}, "line 2: 'many' is not a whole number"),
        ({"lengths": "999999\n"}, "999999 tokens"),
        ({"lengths": "0\n"}, "0"),
        ({"lengths": None}, "Cannot read the lengths"),
        ({"cost": "{}"}, "format None is unknown"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    files: list[str], change: dict[str, str | None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 1, nothing on stdout, one line that names the value."""
    for name, text in change.items():
        path = Path(files[0] if name == "lengths" else files[2])
        path.unlink() if text is None else path.write_text(text)
    assert main(["plan", *files]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def simulated(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["simulate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on stderr of a command that must fail."""
    assert main(list(words)) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


def test_simulate(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A line a way for people, the totals for programs; the same seed gives the same batches."""
    command = [*files, "--batch-size", "3", "--steps", "2"]
    data = simulated(capsys, *command)
    assert (data["num_steps"], data["num_samples"], data["context_tokens"]) == (2, 6, max(LENGTHS))
    assert main(["simulate", *command]) == 0
    table = capsys.readouterr().out.splitlines()
    ways = [line.split()[0] for line in table[1:-2]]
    assert ways == [*data["ways"], "bound"]
    gap = data["ways"]["adaptive"]["ratio_to_bound"] - 1
    assert f"within {gap:.1%} of optimal" in table[-2]
    assert simulated(capsys, *command)["ways"] == data["ways"]
    assert simulated(capsys, *command, "--seed", "1")["ways"] != data["ways"]


def test_simulate_as_picture(files: list[str], tmp_path: Path) -> None:
    """--plot draws the comparison."""
    assert main(["simulate", *files, "--batch-size", "3", "--plot", str(tmp_path / "ways.svg")]) == 0
    assert 'id="way-adaptive"' in (tmp_path / "ways.svg").read_text()


def test_default_steps(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As many full steps as the source makes, twenty of a mix."""
    assert simulated(capsys, *files, "--batch-size", "3")["num_steps"] == len(LENGTHS) // 3
    mix = ["web", "--cost", "llama-8b_8xh200_nvlink", "--ranks", "8", "--batch-size", "4", "--solver", "fast"]
    assert simulated(capsys, *mix)["num_steps"] == 20


def test_context(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The run's one degree holds --context, else --max-length, else the longest of the whole source."""
    command = [*files, "--batch-size", "1", "--steps", "1"]

    def degrees(*words: str) -> list[str]:
        return list(simulated(capsys, *command, *words)["static_s"])

    assert simulated(capsys, *command)["context_tokens"] == 150
    assert simulated(capsys, *command, "--max-length", "99")["context_tokens"] == 99
    assert degrees() == ["2", "4"]
    assert degrees("--context", "390", "--max-length", "99") == ["4"]
    assert degrees("--max-length", "99", "--context", "100") == ["1", "2", "4"]
    mix = ["prolong", "--cost", "llama-8b_8xh200_nvlink", "--ranks", "8", "--batch-size", "2", "--steps", "1"]
    assert simulated(capsys, *mix)["context_tokens"] == 192 * 1024


def test_dropped_samples_are_said(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """How many samples were too long stands on stderr, so that stdout stays JSON."""
    assert main(["plan", *files, "--json", "--max-length", "50"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["lengths"] == [length for length in LENGTHS if length <= 50]
    assert printed.err == "2 of 7 samples have more than --max-length 50 tokens and are left out.\n"


def test_plan_of_one_batch(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """--batch-size picks the batch that `simulate` would start with; the JSON says which lengths it planned."""
    assert main(["plan", *files, "--batch-size", "3", "--seed", "2", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert Plan.from_dict(data).num_samples == len(data["lengths"]) == 3
    seconds = simulated(capsys, *files, "--batch-size", "3", "--seed", "2")["ways"]["adaptive"]["step_s"][0]
    assert data["seconds"] == pytest.approx(seconds)


def test_mix_and_shipped_cost_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Names alone are enough: no file is needed, and a mix without a number of samples is refused."""
    words = ["plan", "github", "--cost", "gpt-7b_64xa100_192k", "--ranks", "64"]
    assert main([*words, "--batch-size", "64", "--json"]) == 0
    assert Plan.from_dict(json.loads(capsys.readouterr().out)).num_samples == 64
    assert "The mix 'github' has no end" in refused(capsys, *words)


def test_dataset(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dataset's column gives the plan that a text file gives."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"tokens": n}) + "\n" for n in LENGTHS))
    options = ["--length-column", "tokens", "--json"]
    assert main(["plan", str(tmp_path / "data.jsonl"), *files[1:], *options]) == 0
    assert json.loads(capsys.readouterr().out)["lengths"] == LENGTHS


def test_costs(capsys: pytest.CaptureFixture[str]) -> None:
    """Every shipped cost model is listed with its source; one alone is its JSON."""
    assert main(["costs"]) == 0
    printed = capsys.readouterr().out
    for name in shipped_names():
        assert f"\n{name}\n" in f"\n{printed}"
    assert printed.count("estimated, not measured") == len(shipped_names()) - 1
    assert printed.count("measured by FlexSP's authors") == 1
    assert main(["costs", "llama-8b_8xa100_pcie"]) == 0
    shown = CostModel.from_dict(json.loads(capsys.readouterr().out))
    assert shown == CostModel.load("llama-8b_8xa100_pcie")


OUTPUTS = {"table": [], "json": ["--json"], "svg": ["--plot", "it.svg"], "png": ["--plot", "it.png"]}


@pytest.mark.parametrize("name", shipped_names())
@pytest.mark.parametrize("output", OUTPUTS)
def test_every_cost_model_in_every_output(
    name: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`plan` and `simulate` of a few samples, one of which needs several ranks, give what was asked for."""
    monkeypatch.chdir(tmp_path)
    cost = CostModel.load(name)
    num_ranks = cost.degrees(sys.maxsize)[-1]
    lengths = [min(num_ranks, 2) * cost.capacity_tokens, 3000, 700, 60]
    Path("lengths.txt").write_text("\n".join(map(str, lengths)))
    words = ["lengths.txt", "--cost", name, "--ranks", str(num_ranks), *OUTPUTS[output]]
    for verb, size in ((["plan"], []), (["simulate"], ["--batch-size", "2", "--steps", "2"])):
        assert main([*verb, *words, *size]) == 0
        printed = capsys.readouterr().out
        if output == "json":
            assert json.loads(printed)["format"].startswith("hf-hetero-")
        else:
            assert "of optimal" in printed
        if "--plot" in words:
            drawn = Path(words[-1])
            assert drawn.read_bytes().startswith((b"<?xml", b"\x89PNG"))
            drawn.unlink()


@pytest.mark.parametrize("name", shipped_names())
def test_every_cost_model_in_a_report(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`costs` prints each as the JSON that makes it again; a step planned with it is drawn by `report`."""
    assert main(["costs", name]) == 0
    cost = CostModel.from_dict(json.loads(capsys.readouterr().out))
    assert cost == CostModel.load(name)
    lengths = [cost.capacity_tokens + 1, 500, 40]
    plan = Planner(cost, cost.degrees(sys.maxsize)[-1]).plan(lengths)
    record = {"step": 1, "lengths": lengths, "plan": plan.to_dict(), "seconds": plan.seconds, "wait_s": 0.0}
    (tmp_path / "plans.jsonl").write_text(json.dumps({**record, "busy_s": busy_seconds(plan, lengths, cost)}) + "\n")
    assert main(["report", str(tmp_path / "plans.jsonl")]) == 0
    assert "<svg" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", "0"], "0 samples a batch: it must be at least 1"),
        (["--batch-size", "3", "--steps", "0"], "0 steps: it must be at least 1"),
        (["--batch-size", "3", "--steps", "-1"], "-1 steps"),
        (["--batch-size", "8"], "1 batches of 8 samples need 8"),
        (["--batch-size", "3", "--steps", "3"], "3 batches of 3 samples need 9; "),
        (["--batch-size", "3", "--ranks", "0"], "num_ranks is 0"),
        (["--batch-size", "3", "--ranks", "-4"], "num_ranks is -4"),
        (["--batch-size", "3", "--max-degree", "3"], "--max-degree 3: the cost model"),
        (["--batch-size", "3", "--max-degree", "0"], "--max-degree 0: the cost model"),
        (["--batch-size", "3", "--max-degree", "1"], "150 tokens fits no degree"),
        (["--batch-size", "3", "--max-length", "0"], "maximum length is 0"),
        (["--batch-size", "3", "--seed", "-1"], "seed is -1"),
        (["--batch-size", "3", "--context", "149"], "--context 149: "),
        (["--batch-size", "3", "--context", "0"], "has samples of up to 150 tokens. Raise it, or leave longer"),
        (["--batch-size", "3", "--context", "401"], "context of 401 tokens fits no degree: 4 ranks hold 400"),
        (["--batch-size", "3", "--cost", "no-such-cluster"], "one of gpt-7b_64xa100_192k, llama-3b_8xrtx4090_pcie"),
        (["--batch-size", "3", "--plot", "ways.pdf"], "ways.pdf: pictures are drawn as .png or .svg"),
        (["--batch-size", "3", "--plot", "absent/ways.svg"], "there is no folder 'absent'"),
    ],
)
def test_numbers_that_cannot_be(
    files: list[str], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is refused in one line that names it and what could be."""
    assert message in refused(capsys, "simulate", *files, "--seed", "3", *words)


def test_degrees_that_there_are(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """--max-degree is obeyed; one that the cost model lacks is refused with those it has."""
    assert main(["plan", *files, "--max-degree", "2", "--json"]) == 0
    plan = Plan.from_dict(json.loads(capsys.readouterr().out))
    assert max(group.degree for group in plan.groups) == 2
    assert "offers degrees 1, 2, 4 on 4 ranks" in refused(capsys, "plan", *files, "--max-degree", "3")


@pytest.mark.parametrize("verb", ["plan", "simulate", "costs"])
def test_no_torch(verb: str, files: list[str]) -> None:
    """Text files, mixes and the list need neither torch nor `datasets`, so they start at once."""
    mix = ["web", "--batch-size", "2", "--steps", "1", "--cost", "gpt-7b_64xa100_192k", "--ranks", "64"]
    words = {"plan": ["plan", *files], "simulate": ["simulate", *mix], "costs": ["costs"]}[verb]
    code = (
        f"import sys; from hf_hetero.cli import main; assert main({words!r}) == 0; "
        "print([name for name in ('torch', 'datasets', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("verb", [[], ["plan"], ["simulate"], ["advise"], ["check"], ["recipes"]])
def test_help_imports_little(verb: list[str]) -> None:
    """Help for any verb needs neither large packages nor what draws, plans in other ways, checks or trains."""
    packages = (
        "torch",
        "transformers",
        "datasets",
        "accelerate",
        "peft",
        "matplotlib",
        "rich",
        "mip",
        "highsbox",
        "tqdm",
    )
    rooms = "report", "what_if.simulate", "forecast.forecast", "advice.advise", "checks", "estimate", "trainer"
    code = (
        "import atexit, sys; atexit.register(lambda: print('imported', *sys.modules)); "
        f"from hf_hetero.cli import main; main({[*verb, '--help']!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = done.stdout.splitlines()[-1].split()
    assert {"imported", "hf_hetero.cli"} <= set(imported)
    assert not {*packages, *(f"hf_hetero.{room}" for room in rooms)} & set(imported)


def test_garbage_is_looked_for_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    """While a verb runs it is looked for less often; what called `main` finds the collector as it was, error or not."""
    before = gc.get_threshold()
    assert main(["costs"]) == 0
    assert main(["costs", "none such"]) == 1
    assert gc.get_threshold() == before
    capsys.readouterr()


def test_a_report_lies_beside_its_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the file is named, or its folder, or the folder one stands in."""
    cost, lengths = a_cost_model(), [50, 7]
    plan = Planner(cost, 2).plan(lengths)
    record = {"step": 1, "lengths": lengths, "plan": plan.to_dict(), "seconds": 1.0, "wait_s": 0.0}
    text = json.dumps({**record, "busy_s": busy_seconds(plan, lengths, cost)})
    (tmp_path / "plans.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)
    for where in (str(tmp_path), ".", "plans.jsonl"):
        assert main(["report", where]) == 0
        (tmp_path / "report.html").unlink()


def test_whoever_has_seen_enough_may_leave() -> None:
    """`hf-hetero costs | head -1` and a full disk end with 1 and at most a line."""
    command = [sys.executable, "-m", "hf_hetero.cli", "costs"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    running.stdout.close()
    assert running.stderr is not None
    assert running.stderr.read() == ""
    running.stderr.close()
    assert running.wait() == 1
    if Path("/dev/full").exists():
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1
        assert done.stderr.splitlines()[0] == "hf-hetero: Cannot write the output: No space left on device."


def page() -> str:
    return (Path(__file__).parents[1] / "recipes" / "plan_only" / "README.md").read_text(encoding="utf-8")


def test_the_page_says_what_can_be_typed() -> None:
    """Every command of the page is one that the command line takes, with cost models and mixes that exist."""
    lines = [line.split("#")[0] for line in page().splitlines() if line.strip().startswith("hf-hetero ")]
    commands = [shlex.split(line.replace("$mix", mix))[1:] for line in lines for mix in ("wiki-192k", "prolong")]
    parsed = [_parser().parse_args(command) for command in commands if command[-1] != "costs"]
    assert len(parsed) > 15
    for args in parsed:
        assert args.cost in shipped_names()
        assert args.source in MIXES or args.source in {"lengths.txt", "train.parquet"}


def test_the_page_says_what_comes_out(capsys: pytest.CaptureFixture[str]) -> None:
    """The page's first command prints the table that the page shows: seconds within 3 %, the static degree exactly."""
    command, rest = page().split("```bash\n", 1)[1].split("\n", 1)
    shown = rest.split("```\n")[2].splitlines()
    assert main(shlex.split(command.partition(" --plot")[0])[1:]) == 0
    printed = capsys.readouterr().out.splitlines()
    for expected, line in zip(shown[1:-2], printed[1:-2], strict=True):
        assert line.split()[0] == expected.split()[0]
        assert float(line.split()[1]) == pytest.approx(float(expected.split()[1]), rel=0.03)
    assert printed[2].split()[-2:] == shown[2].split()[-2:] == ["degree", "64"]
    assert printed[-1] == shown[-1]


# ---------------------------------------------------------------------------------------------------------- check


@pytest.fixture
def model(tmp_path: Path) -> str:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
    text = json.dumps({"model_type": "llama", **sizes, "intermediate_size": 48, "vocab_size": 97})
    (tmp_path / "config.json").write_text(text)
    return str(tmp_path)


def test_check(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A line a degree for people, the same for programs, and 0 for a model that can be trained."""
    assert main(["check", model, "--max-degree", "8", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["format"] == "hf-hetero-check/1"
    assert main(["check", model, "--max-degree", "8"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == [
        *("model", "versions", "kernel", "heads", "degree", "2", "4", "8", "memory"),
        *("everything", "+", "+", "+", "+", "probe", "verdict"),
    ]
    held = list(data["tokens_a_rank"].values())
    assert held == sorted(held)
    assert held[0] < held[-1]
    assert [line.split()[-1] for line in printed[9:14]] == [f"{tokens:,}" for tokens in held]
    assert main(["check", model, "--ranks", "64", "--memory-gib", "24", "--json"]) == 0
    smaller = json.loads(capsys.readouterr().out)["tokens_a_rank"]
    assert all(0 < tokens < known for tokens, known in zip(smaller.values(), held, strict=True))
    assert "num_ranks is 0" in refused(capsys, "check", model, "--ranks", "0")
    assert printed[3].split()[1:3] == ["8", "of"]
    for line in printed[5:8]:
        for words in data["methods"][line.split()[0]].values():
            assert words in line
    assert f"reached in {data['probe']['reached']} of 2 layers" in printed[-2]
    assert printed[-1] == "verdict   can be trained"


def test_check_says_how(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that carries a state in a way of its own is trained by whole samples; what was tried is said, too."""
    path = Path(model) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "rwkv"}))
    assert main(["check", model]) == 0
    printed = capsys.readouterr().out
    assert "verdict   can be trained, by whole samples, which ranks do not share, because" in printed
    assert "a tiny instance that goes over whole samples differs from stock by" in printed


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"model_type": "bart", "is_encoder_decoder": True}, "refused because it has an encoder and a decoder"),
        ({"attention_dropout": 0.1}, "refused because attention_dropout=0.1 draws another mask"),
        ({"model_type": "deepseek_v2", "num_key_value_heads": 8}, "not tested: a tiny instance fails with stock"),
    ],
)
def test_check_says_no(model: str, change: dict[str, Any], verdict: str, capsys: pytest.CaptureFixture[str]) -> None:
    """1 for a model that cannot be trained, and the whole table: it is an answer, not an error."""
    path = Path(model) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert main(["check", model]) == 1
    printed = capsys.readouterr()
    assert f"verdict   {verdict}" in printed.out
    assert "hf-hetero:" not in printed.err
    assert main(["check", model, "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert not data["ok"]
    assert data["verdict"].startswith(verdict)


def test_check_of_nothing(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is no model's, and a degree that cannot be, are errors: one line, and no table."""
    name = str(Path(model) / "nowhere")
    assert refused(capsys, "check", name).startswith(f"hf-hetero: Cannot read a config from {name!r}")
    assert "largest degree to look at is 0" in refused(capsys, "check", model, "--max-degree", "0")


# ------------------------------------------------------------------------------------------------------- estimate


def test_estimate(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a rank holds and the seconds of samples, for people; the file is one to plan with."""
    file, config = str(tmp_path / "cost.json"), Path(model) / "config.json"
    larger = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    config.write_text(json.dumps({**json.loads(config.read_text()), **larger}))
    assert main(["estimate", model, "--gpus", "2x4xH100", "--offload", "--network", "400", "-o", file]) == 0
    printed = capsys.readouterr().out.splitlines()
    cost = CostModel.load(file)
    assert printed[0].startswith(f"model     {model}, ")
    assert printed[1].startswith("GPUs      2x4xH100: ")
    held = [int(line.split()[-1].replace(",", "")) for line in printed[3:6]]
    assert len(set(held)) == 3
    assert held == [way.capacity_tokens for way in cost.by_activations.values()]
    assert printed[7].split() == ["tokens", "1", "2", "4", "8"]
    length, *seconds = printed[8].split()
    assert [float(number) for number in seconds] == [
        pytest.approx(cost.seconds([int(length.replace(",", ""))], degree), rel=0.01) for degree in cost.degrees(8)
    ]
    assert printed[-1] == f"Wrote {file}"
    (tmp_path / "lengths.txt").write_text("1000\n5000\n")
    assert main(["plan", str(tmp_path / "lengths.txt"), "--cost", file, "--ranks", "8"]) == 0


def test_estimate_of_nothing(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A GPU that is none, and a file that cannot be written, are one line; nothing is half written."""
    assert "did you mean H100" in refused(capsys, "estimate", model, "--gpus", "8xH1000")
    assert "rank of adapters of 0" in refused(capsys, "estimate", model, "--gpus", "8xH100", "--lora-r", "0")
    nowhere = tmp_path / "nowhere" / "cost.json"
    assert main(["estimate", model, "--gpus", "H100", "-o", str(nowhere)]) == 1
    assert "Cannot write the output: No such file or directory" in capsys.readouterr().err
    assert not nowhere.parent.exists()
