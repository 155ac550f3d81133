"""All that one GPU can show, by one command: `python benchmarks/gpu/run.py`, or `make gpu`.

Each stage is a process of its own with a limit of its own, so that one that fails or takes too long costs only itself.
Results are written as they come, to OUTPUT/gpu.json; OUTPUT/gpu.md is made of it. Stages that are not run again keep
what an earlier call has found there; `--merge` takes it from other files. With `--device cpu` all of it runs in
miniature, which shows that it works, and no more.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from page import FORMAT, page

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
NEEDED = ("torch", "transformers", "accelerate", "numpy", "psutil", "tqdm", "yaml", "packaging")
OPTIONAL = {
    "pytest": "the GPU tests are not run",
    "mip": "plans come from the fast search alone",
    "datasets": "samples are lists",
    "peft": "adapters are the stage's own",
    "matplotlib": "no pictures",
}


GRACE_S = 10
"""A stage leaves out by itself what is too much; after its limit and these seconds it is ended."""


@dataclass(frozen=True)
class Kind:
    """A stage that can be run.

    Args:
        script: beside this one.
        title: on the page.
        gpu_s, cpu_s: seconds that it may take.
    """

    script: str
    title: str
    gpu_s: int
    cpu_s: int = 480


STAGES = {
    "machine": Kind("measure_machine.py", "Machine, kernels, tests", 150),
    "kernels": Kind("measure_kernels.py", "Attention: the whole call against the raw kernel", 100),
    "ranks": Kind("measure_ranks.py", "Virtual ranks: exactness, and what small shards cost", 140),
    "jobs": Kind("measure_jobs.py", "Jobs of several ranks over NCCL, which share the GPU", 300),
    "predicted": Kind("measure_predictions.py", "Predicted against measured steps", 170),
    "steps": Kind("measure_steps.py", "Whole steps beside Trainer's", 270),
    "memory": Kind("measure_memory.py", "Memory: loss and MLPs in chunks, recompute, offload", 110),
    "state_layers": Kind("measure_state_layers.py", "State layers over a pack", 150),
    "compiled": Kind("measure_compiling.py", "torch.compile over steps of changing lengths", 190),
}
"""In the order of the page. On a GPU they take 1,580 s at most; the first four took seven minutes on an H100."""


def main() -> int:
    """Run stages, or merge results; 0 where all that was run is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"), help="folder; default: outputs/gpu")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: all in miniature")
    parser.add_argument("--stages", nargs="*", choices=STAGES, metavar="STAGE", help=f"some of {', '.join(STAGES)}")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="JSON", help="run nothing; join these files' stages")
    options = parser.parse_args()
    keeper = Keeper(options.output)
    if options.merge:
        for path in options.merge:
            for name, found in json.loads(path.read_text(encoding="utf-8"))["stages"].items():
                keeper.keep(name, found)
        return 0
    if problem := missing(options.device):
        print(problem, file=sys.stderr)
        return 1
    # `kill` ends this process by an exception, so that the stage underway is ended, and kept, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    states = [run(name, options.device, keeper) for name in options.stages or STAGES]
    print(f"\nResults: {keeper.page_path}")
    return 0 if set(states) == {"done"} else 1


def missing(device: str) -> str | None:
    """What has to be there and is not, in words; what may be absent is only said."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        return f"{sys.executable} lacks {', '.join(absent)}: name another interpreter (make gpu PYTHON=...)."
    for name, without in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: {without}.")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            return "torch sees no GPU here. `make gpu DEVICE=cpu` runs all of it in miniature."
    return None


class Keeper:
    """What is known so far, on disk.

    Args:
        folder: of the JSON and the page.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self.page_path, self.running = folder / "gpu.json", folder / "gpu.md", folder / "running.json"
        self.log = folder / "gpu.log"
        folder.mkdir(parents=True, exist_ok=True)
        self.running.unlink(missing_ok=True)
        known = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
        self._results: dict[str, Any] = {"format": FORMAT, "stages": known.get("stages", {})}

    def keep(self, name: str, found: dict[str, Any]) -> None:
        """Keep what a stage has found, and make the page anew."""
        self._results["stages"][name] = found
        titles = {stage: kind.title for stage, kind in STAGES.items()}
        for path, text in (
            (self._path, json.dumps(self._results, indent=1) + "\n"),
            (self.page_path, page(self._results, titles)),
        ):
            new = path.with_name(f".{path.name}.new")
            new.write_text(text, encoding="utf-8")
            new.replace(path)


def run(name: str, device: str, keeper: Keeper) -> str:
    """Run one stage to its end, or to its limit; return how it went."""
    kind = STAGES[name]
    limit_s = kind.gpu_s if device == "cuda" else kind.cpu_s
    command = [sys.executable, str(HERE / kind.script), "--device", device, "--seconds", str(limit_s)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    if device == "cpu":
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    else:
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several, Trainer would use all
    start, state, process = time.monotonic(), "interrupted", None
    with keeper.log.open("a", encoding="utf-8") as log:
        try:
            print(f"{name}: {kind.title}, at most {limit_s} s ...", flush=True)
            print(f"\n===== {name} =====", file=log, flush=True)
            process = subprocess.Popen(
                [*command, "--output", str(keeper.running)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its own processes can be ended with it
            )
            code = process.wait(limit_s + GRACE_S)
            state = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            state = f"out of time after {limit_s} s"
        finally:
            if process is not None:
                end(process)
            keeper.keep(name, ended(keeper, state, time.monotonic() - start, device))
    print(f"{name}: {state}, {time.monotonic() - start:.0f} s", flush=True)
    return state


def ended(keeper: Keeper, state: str, seconds: float, device: str) -> dict[str, Any]:
    """What a stage has written, with how it ended; where it failed, with its last words."""
    found: dict[str, Any] = {"device": device, "date": "", "versions": {}, "facts": {}, "tables": {}, "notes": []}
    if keeper.running.exists():
        found |= json.loads(keeper.running.read_text(encoding="utf-8"))
        keeper.running.unlink()
    if state != "done":
        tail = keeper.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-8:]
        found["notes"] = [*found["notes"], f"Last words: {' / '.join(tail)[-1500:]}"]
    return {**found, "state": state, "seconds": round(seconds, 1)}


def end(process: subprocess.Popen[Any]) -> None:
    """End a stage with all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(5)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


if __name__ == "__main__":
    sys.exit(main())
