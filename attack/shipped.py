"""The run that ships with the project, so that attacks work before any training: client 0 of ten.

    python attack/shipped.py               write data/shipped.pt as the run "shipped" to results/ and saved_models/
    python attack/shipped.py --pack RUN    make data/shipped.pt from a finished run

The parameters are stored as their change in training, in half precision, a large matrix as two factors of rank 8.
They are added to the start, which the run's seed gives.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the project, whatever the folder

import numpy as np
import torch

from attack.target import Target, open_target
from parsing import Option, Parser
from runs.checkpoints import load_checked
from server.base import State
from utils import ROOT, InputError, error_line, write_whole

FILE, NAME, VICTIM = ROOT / "data" / "shipped.pt", "shipped", 0
RANK, LARGE = 8, 50_000   # LARGE: the number of values above which a matrix is stored as factors
PLACES = "data_dir", "results_dir", "models_dir"   # options that name folders of the machine
TABLES = "rounds.csv", "clients.csv"


def compressed(state: State, start: State) -> dict[str, list[torch.Tensor]]:
    """Return the change of each parameter since the start: the tensor alone, or two factors."""
    found = {}
    for name, value in state.items():
        parts = [value - start[name]]
        if value.numel() > LARGE:
            left, sizes, right = torch.linalg.svd(parts[0], full_matrices=False)
            parts = [left[:, :RANK] * sizes[:RANK], right[:RANK]]
        found[name] = [part.half() for part in parts]
    return found


def restored(changes: dict[str, list[torch.Tensor]], start: State) -> State:
    """Return parameters from their ``compressed`` changes."""
    return {name: start[name] + (parts[0].float() if len(parts) == 1 else parts[0].float() @ parts[1].float())
            for name, parts in changes.items()}


def pack(run: str) -> dict[str, Any]:
    """Return what is shipped of a run: its options, its partition, and the last round of one client."""
    target = open_target(run, ROOT / "results", ROOT / "saved_models", ROOT / "data")
    config = json.loads((target.results / "config.json").read_text())
    config["options"] = {name: value for name, value in config["options"].items() if name not in PLACES}
    last = target.latest_round()
    shared = target.shared(last)
    states = {"sent": shared["sent"], "upload": shared["uploads"][VICTIM], "head": target.sent_next(last),
              "private": target.private(last, VICTIM).parameters}
    return {"config": json.dumps(config, indent=2) + "\n", "round": last, "memory": target.server(last).memory,
            "tables": {name: (target.results / name).read_text() for name in TABLES},
            "owned": [[torch.from_numpy(part).short() for part in half] for half in target.owned()],
            "states": {name: compressed(state, target.seeded) for name, state in states.items()}}


def write(path: Path, content: str | dict[str, Any]) -> None:
    """Write a file of text or of tensors."""
    write_whole(path, lambda file: torch.save(content, file) if isinstance(content, dict)
                else file.write(content.encode()))


def unpack(content: dict[str, Any]) -> Target:
    """Write what ``pack`` returned as the run ``NAME``; InputError if there is another run of that name."""
    results, models = ROOT / "results" / NAME, ROOT / "saved_models" / NAME / f"round_{content['round']}"
    config = results / "config.json"
    if config.exists() and config.read_text() != content["config"]:
        raise InputError(f"{results} is another run; move it away")
    write_whole(results / "partition.npz", lambda file: np.savez_compressed(file, **{
        f"{half}_{k}": part.long().numpy() for half, parts in zip(("train", "test"), content["owned"], strict=True)
        for k, part in enumerate(parts)}))
    for name, text in {**content["tables"], config.name: content["config"]}.items():
        write(results / name, text)
    target = open_target(NAME, ROOT / "results", ROOT / "saved_models", ROOT / "data")
    target.require(0)   # the start must be that of the packed run
    states = {name: restored(changes, target.seeded) for name, changes in content["states"].items()}
    files: dict[str, dict[str, Any]] = {
        f"client_{VICTIM}.pt": {"parameters": states["private"], "steps": 0},
        "shared.pt": {"sent": states["sent"], "clients": [VICTIM], "uploads": {VICTIM: states["upload"]},
                      "sum": {}},
        "server.pt": {"head": states["head"], "memory": content["memory"]}}
    for name, file_content in files.items():
        write(models / name, file_content)
    return target


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = Parser("shipped.py", "Write the run that ships with the project, for attacks before any training.")
    parser.add(Option("pack", "make data/shipped.pt from this run instead"))
    args = parser.parse(argv)
    try:
        if args.pack:
            write(FILE, pack(args.pack))
        else:
            print(f"results:  {unpack(load_checked(FILE)).results}")
    except (InputError, OSError) as error:
        print(error_line("shipped.py", error), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
