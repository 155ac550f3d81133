"""`hf-hetero profile` times a model as training computes it, and writes a cost model that a run of it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from costs.test_cost_model import a_cost_model
from helpers import LENGTHS, arguments, run_ranks, samples, tiny_model

from hf_hetero import CostModel, HeteroConfig, HeteroTrainer
from hf_hetero.cli import main
from hf_hetero.costs import files
from hf_hetero.plan import Group
from hf_hetero.profile import timing


def profiled(folder: str, words: list[str]) -> int:
    return main(["profile", f"{folder}/model", "-o", f"{folder}/cost.json", "--cpu", "--seconds", "0.01", *words])


def lines_of_run(folder: str) -> list[str]:
    """What a run of the same model, by that cost model, logs about it."""
    import logging

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("hf_hetero.trainer.machine").addHandler(handler)
    found: list[str] = []
    for model in (tiny_model(), tiny_model(hidden_size=64)):
        lines.clear()
        args = arguments(f"{folder}/run", torch.distributed.get_world_size(), max_steps=1)
        hetero = HeteroConfig(cost_model=f"{folder}/cost.json")
        HeteroTrainer(model, args, train_dataset=samples(LENGTHS), hetero=hetero).train()
        found.append("\n".join(lines))
    return found


@pytest.mark.slow
def test_a_profile_serves_its_model(tmp_path: Path) -> None:
    """On 2 ranks the exchange is timed, too; a run takes the file without a warning, and one of another model warns."""
    tiny_model().config.save_pretrained(tmp_path / "model")
    assert run_ranks(profiled, 2, str(tmp_path), ["--max-length", "64"]) == [0, 0]
    cost = CostModel.load(tmp_path / "cost.json")
    assert cost.provenance == "measured"
    assert cost.source.startswith("measured: `hf-hetero profile")
    assert "2 ranks" in cost.source
    assert cost.degrees(2) == (1, 2)
    assert cost.linear_s_per_token > 0
    assert "GiB was weighed" in cost.source
    assert cost.both_ways_overlap is None, "no token ring is timed unless it is asked for"
    same, other = run_ranks(lines_of_run, 2, str(tmp_path))[0]
    assert "was made for another model" not in same
    assert "was made for another model: llama, 2 layers of 32" in other
    assert "This run trains: llama, 2 layers of 64" in other


@pytest.mark.slow
def test_a_token_ring_is_timed_where_it_is_asked_for(tmp_path: Path) -> None:
    """What its answers hide behind is then in the file, and a run that names it may plan it."""
    tiny_model().config.save_pretrained(tmp_path / "model")
    words = ["--max-length", "64", "--methods", "ulysses", "token_ring"]
    assert run_ranks(profiled, 2, str(tmp_path), words) == [0, 0]
    cost = CostModel.load(tmp_path / "cost.json")
    assert cost.both_ways_overlap is not None
    assert 0 <= cost.both_ways_overlap <= 1
    assert "token_ring" in {way.method for way in cost.methods(Group((0, 1), (0,)), [64])}


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--lora-r", "2"], ["--checkpointing"], ["--bf16"], ["--dtype", "bfloat16"]])
def test_ways_to_train(tmp_path: Path, words: list[str]) -> None:
    """Alone it estimates the exchanges of the run to come; the file says how the model was trained."""
    tiny_model().config.save_pretrained(tmp_path / "model")
    assert run_ranks(profiled, 1, str(tmp_path), [*words, "--max-length", "64", "--ranks", "4"]) == [0]
    cost = CostModel.load(tmp_path / "cost.json")
    assert cost.degrees(8) == (1, 2, 4)
    assert cost.model is not None
    assert {"--lora-r": "trained", "--checkpointing": "layers recomputed"}.get(words[0], "bfloat16") in cost.model


def test_cut_short_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted while it times, the file is as it was; so it is where timing ends too soon."""
    tiny_model().config.save_pretrained(tmp_path / "model")
    a_cost_model().save(tmp_path / "cost.json")
    before = (tmp_path / "cost.json").read_bytes()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(timing.Stopwatch, "on_step_report", interrupted)
    with pytest.raises(KeyboardInterrupt):
        profiled(str(tmp_path), ["--max-length", "64"])
    monkeypatch.setattr(timing.Stopwatch, "on_step_report", lambda *_: None)
    assert profiled(str(tmp_path), ["--max-length", "64"]) == 1
    assert (tmp_path / "cost.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cost.json", "model"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted while it is written, a file stays as it was, and nothing is left beside it; a link stays a link."""
    file, link = tmp_path / "cost.json", tmp_path / "link.json"
    a_cost_model(name="first").save(file)
    link.symlink_to(file)
    a_cost_model(name="second").save(link)
    assert link.is_symlink()
    assert json.loads(file.read_text())["name"] == "second"

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        a_cost_model(name="third").save(file)
    assert json.loads(file.read_text())["name"] == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cost.json", "link.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-length", "0"], "--max-length 0: it must be at least 1"),
        (["--seconds", "nan"], "--seconds nan"),
        (["-o", "nowhere/at/all.json"], "there is no such folder"),
        ([], "Cannot read a config from"),
    ],
)
def test_what_is_wrong_is_said(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 1, and one line that names the value, before anything is timed."""
    assert main(["profile", "no-such-model", "-o", "cost.json", *words]) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
