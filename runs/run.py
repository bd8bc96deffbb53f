"""A run's folders: lock, CSVs, checkpoints, and going on after ``kill -9``.

``results/<run>/`` holds what is published, ``saved_models/<run>/round_<r>/`` a checkpoint (checkpoint.py).
A CSV only ever grows by whole rounds, and a checkpoint remembers how long each was. Resuming cuts the CSVs to
that length and computes the later rounds again, on a CPU to the same bytes.
"""
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from engine.processes import Ranks
from methods import METHODS
from metrics import METRICS
from runs import configs, folders, resuming
from runs import plots as pictures
from runs.checkpoints import (
    ClientStore,
    WaitingUploads,
    checked_state,
    is_whole,
    load_checked,
    read_client,
    read_shared,
    same_layout,
    same_memory,
)
from runs.configs import EVALUATION_SPLIT
from runs.csvs import append_csv, cut_csv, read_csv
from server.base import State
from server.malicious import BEHAVIOURS
from server.robust import RULES
from update import ClientState
from utils import InputError, printable, shown, write_whole


def write_config(folder: Path, config: dict) -> None:
    """Write a run's ``config.json``."""
    text = json.dumps(config, indent=2, default=str) + "\n"
    write_whole(folder / "config.json", lambda file: file.write(text.encode()))


def csv_columns(backdoor: bool = False) -> dict[str, list[str]]:
    """The columns of each CSV; ``server.csv`` has those of every rule, empty where another rule ran.

    Args:
        backdoor: the run's malicious clients plant one; only then ``clients.csv`` says how often it opens.
    """
    of_rules = dict.fromkeys(name for rule in RULES.values() for name in rule.columns)
    return {
        "clients.csv": ["round", "client", "stage", "split", "n", *METRICS, *["backdoor"] * backdoor],
        "rounds.csv": ["round", "stage", "split", "loss", "accuracy", "accuracy_std", "accuracy_worst",
                       *METRICS[2:], "seconds"],
        "server.csv": ["round", "client", "n", *of_rules, "weight", "malicious"]}


@dataclass
class Progress:
    """Everything but the private parameters that the next round starts from."""

    round: int
    head: State                                   # what the server sends next
    sent: State = field(default_factory=dict)     # what it sent in ``round``
    uploads: dict[int, State] = field(default_factory=dict)   # in ``round``; none once a checkpoint has them
    csv_bytes: dict[str, int] = field(default_factory=dict)
    memory: dict = field(default_factory=dict)   # the server's own


@contextmanager
def open_run(config: dict, initial: ClientState, head: State, memory: dict, ranks: Ranks) -> Iterator["Run"]:
    """Take a run's folders, under a lock that lasts as long as the block, or the process.

    Args:
        config: what ``config.json`` will say, with every option under ``options``.
        initial: what every client starts from.
        head: what the server sends first.
        memory: what the server remembers before it.
        ranks: the processes that share the run; the first holds the lock for all.

    Raises:
        InputError: the folders are in use, belong to an earlier or foreign run, or are damaged.
    """
    with ExitStack() as held:
        owner = _lock(config["options"], held) if ranks.first else None   # the first holds it for all
        run = Run(config, initial, Progress(0, head, memory=memory), ranks, owner)
        with run.bar:
            yield run


def _lock(options: dict, held: ExitStack) -> BinaryIO:
    """Lock both folders of a run until ``held`` closes: another run may have one of them in common with it.

    Returns:
        The lock in the checkpoints' folder, in which stands which run they belong to.
    """
    results, models = (Path(options[name]) / options["run_name"] for name in ("results_dir", "models_dir"))
    for folder in (results, models):
        for place in (folder, *folder.parents):
            if place.is_symlink() and not place.exists():
                raise InputError(f"{place} is a link to {place.readlink()}, which is not there; make that "
                                 "folder, or remove the link")
        folder.mkdir(parents=True, exist_ok=True)
        if folder is models and folder.samefile(results):   # held already
            break
        lock = folders.lock(folder, held, "--run_name")
    return lock


class Run:
    """One run's folders; open them with ``open_run``.

    With several ranks, each writes its own clients' checkpoints and the first writes everything else, all into
    the same folders. The first also decides what all of them have to do alike. Only this program's own files are
    ever deleted (folders.py): a folder may be a link, or hold other things.
    """

    def __init__(self, config: dict, initial: ClientState, start: Progress, ranks: Ranks,
                 owner: BinaryIO | None):
        options, self.ranks = config["options"], ranks
        self.results = Path(options["results_dir"]) / options["run_name"]
        self.models = Path(options["models_dir"]) / options["run_name"]
        self.evaluation_split = EVALUATION_SPLIT[config["protocol"]]
        self.config, self.rounds_kept = {"format": configs.FORMAT, **config}, set(options["save_rounds"])
        behaviour = BEHAVIOURS.get(str(options["malicious_behaviour"]))
        self.columns = csv_columns(behaviour is not None and behaviour.trigger is not None)
        self.clients, self.every = options["num_users"], options["checkpoint_seconds"]
        self.past: list[dict] = []   # environments of the run that is resumed
        self.finished = ranks.share(
            owner is not None and self._admit(options["resume"], options["overwrite"], owner))
        self.private = ClientStore(self.models / ".private", initial, processes=ranks.local_size)
        self.uploads = WaitingUploads(self.models / ".private")
        self.progress = start
        if not self.finished:
            if owner is not None:
                self._clear_scraps()
                folders.note_owner(owner, self._seen_from_models())
            self._restore()
        self.saved_round, self.saved_at = self.progress.round, time.monotonic()
        # It moves with every client, so that the time left is known within a round. No bar without a terminal.
        self.bar = tqdm(initial=self.progress.round, total=options["rounds"], unit="round",
                        disable=self.finished or not ranks.first or None,
                        bar_format="{l_bar}{bar}| {elapsed}<{remaining}")

    def advance(self, round: int, client: int, asked: int, accuracy: float) -> None:
        """Move the bar by one of the ``asked`` clients that train in a round."""
        self.bar.set_description(f"round {round}/{self.bar.total} client {client} accuracy {accuracy:.3f}")
        self.bar.update(1 / asked)

    def say(self, line: str) -> None:
        """Print a line above the bar, to standard error."""
        self.bar.write(line, file=sys.stderr)

    def note(self, facts: dict) -> None:
        """Write what the server knows of itself into ``config.json``, if that is new."""
        if self.config.get("server") != facts:
            self.config["server"] = facts
            self.write_config()

    def write_config(self) -> None:
        """``config.json``: every option, versions, commit, device, sizes, and whether the run is done."""
        write_config(self.results, self.config)

    def write_partition(self, owned: list[np.ndarray], splits: list, labels: np.ndarray) -> None:
        """``partition.npz`` (who trains and who is tested on which image) and ``partition.png``."""
        arrays: dict[str, Any]   # integers
        if self.config["protocol"] == "resplit":   # drawn afresh every round: only the owner is fixed
            arrays = {f"owned_{k}": indices for k, indices in enumerate(owned)}
        else:
            arrays = {f"{part}_{k}": indices for k, pair in enumerate(splits)
                      for part, indices in zip(("train", self.evaluation_split), pair, strict=True)}
        write_whole(self.results / "partition.npz", lambda file: np.savez_compressed(file, **arrays))
        classes = self.config["images"]["classes"]
        counts = np.stack([np.bincount(labels[indices], minlength=classes) for indices in owned])
        pictures.partition_picture(self.results / "partition.png", counts, self._title())

    def write_triggered(self, images: np.ndarray, trigger: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """``backdoor.png``: images ``N x H x W x C`` as they are and with a backdoor's trigger."""
        pictures.triggered_picture(self.results / "backdoor.png", images,
                                   trigger(torch.from_numpy(images)).numpy(), self._title())

    def end_round(self, progress: Progress, facts: dict, rows: dict[str, list[dict]]) -> None:
        """Record a round: CSV rows, the server's facts, private parameters, a checkpoint if one is due."""
        if self.ranks.first:
            self.note(facts)
            progress.csv_bytes = {name: append_csv(self.results / name, self.columns[name], added)
                                  for name, added in rows.items()}
        self.bar.n = progress.round   # exact again after the sum of the clients' shares
        held_out = {row["stage"]: row for row in rows["rounds.csv"] if row["split"] == self.evaluation_split}
        if held_out:
            stages = ", ".join(f"{stage} {row['accuracy']:.4f} (worst decile {row['accuracy_worst']:.4f})"
                               for stage, row in held_out.items())
            self.bar.write(f"round {progress.round}/{self.bar.total}: {self.evaluation_split} accuracy {stages}")
        self.private.commit()
        self.uploads.end_round()
        self.progress = progress
        due = progress.round in self.rounds_kept or time.monotonic() - self.saved_at >= self.every
        if self.ranks.share(due):
            self.save()

    def save(self) -> None:
        """Write the checkpoint of the last finished round, if that is not there yet, and drop older ones."""
        now = self.progress
        if self.saved_round == now.round:
            return
        target, partial = self.models / f"round_{now.round}", self.models / f".round_{now.round}"
        if self.ranks.first:
            folders.remove(partial)
            partial.mkdir(parents=True)
        self.ranks.wait()
        self.private.export(self.ranks.mine(range(self.clients)), partial)
        self.ranks.wait()
        if self.ranks.first:
            shared = {"round": now.round, "protocol": self.config["protocol"],
                      "sent": now.sent, "uploads": now.uploads}
            server = {"round": now.round, "head": now.head, "csv_bytes": now.csv_bytes,
                      "memory": now.memory, **({"private_start": self.private.base} if self.private.base else {})}
            write_whole(partial / "shared.pt", lambda file: torch.save(shared, file))
            write_whole(partial / "server.pt", lambda file: torch.save(server, file))
            partial.rename(target)
            self._drop_older(now.round)
        now.uploads = {}   # the next round's take their place in memory
        self.uploads.dropped()
        self.saved_round, self.saved_at = now.round, time.monotonic()

    def finish(self) -> None:
        """The last checkpoint, and the mark that nothing is left to do."""
        self.save()
        if self.ranks.first:
            folders.remove(self.models / ".private")
            pictures.curves_picture(self.results / "curves.png", self.rounds(), self._title())
            server = read_csv(self.results / "server.csv")
            if server["trust"].notna().any():
                pictures.trust_picture(self.results / "trust.png", server, self._title())
            self.config["status"] = "finished"
            self.write_config()

    def rounds(self) -> pd.DataFrame:
        """``rounds.csv`` so far."""
        return read_csv(self.results / "rounds.csv")

    def table(self) -> str:
        """The last round, for the screen, and where the files are."""
        last = self.rounds()
        last = last[(last["round"] == last["round"].max()) & (last["split"] == self.evaluation_split)]
        shown = last[["stage", "accuracy", "accuracy_std", "accuracy_worst", "f1", "kl_nats"]]
        options = self.config["options"]
        everybody = options["frac"] == 1 and not options["malicious_frac"]
        who = f"{self.clients} clients" if everybody else "honest clients (trained: those that trained)"
        return (f"\n{self._title()}\nround {last['round'].max()}, split {self.evaluation_split}, means over "
                f"{who}:\n{shown.to_string(index=False, na_rep='-', float_format='%.4f')}\n"
                f"results:     {printable(self.results)}\ncheckpoints: {printable(self.models)}")

    def _title(self) -> str:
        mark = {"resplit": ", RESPLIT: tested on images trained on", "validate": ", validation images"}
        return self.results.name + mark.get(self.config["protocol"], "")

    def _admit(self, resume: bool, overwrite: bool, owner: BinaryIO) -> bool:
        """Decide what happens to an earlier run of this name; True if it is finished and was resumed."""
        name, path = self.results.name, self.results / "config.json"
        theirs = (self.models.resolve() / (folders.owner(owner) or self._seen_from_models())).resolve()
        other = (theirs / "config.json").exists() and not theirs.samefile(self.results)
        checkpoints = folders.checkpoints(self.models)
        if other and checkpoints and not overwrite:
            raise InputError(f"{self.models} holds the checkpoints of the run in {theirs}; give its "
                             "--results_dir, or this run another --models_dir or --run_name, or use "
                             "--overwrite to delete them")
        if not path.exists():
            self._admit_new(overwrite)
            return False
        try:
            config = configs.of_this_program(path)
        except InputError as error:
            raise InputError(f"{error}; move {self.results} away, or give another --run_name") from error
        if overwrite:
            folders.refuse_foreign(*folders.scraps(self.models), *checkpoints.values())
            self._delete_earlier(config)
            return False
        try:
            old = configs.read(path, "rounds", "save_rounds")
        except InputError as error:
            raise InputError(f"{error}; start again with --overwrite") from error
        before, finished = old["options"], old["status"] == "finished"
        if not resume:
            raise InputError(f"run {name} is already " + (
                "finished; use --overwrite to replace it or another --run_name" if finished else
                "there, unfinished; use --resume to go on, --overwrite to start again"))
        resuming.check(self.config, old)
        if old.get("start") != self.config.get("start"):
            raise InputError(f"--resume: run {name} began with other weights than its seed gives here; resume it "
                             "with the PyTorch version that it began with, or use --overwrite")
        more = self.config["options"]["rounds"] > before["rounds"]
        if finished and more and before["rounds"] not in checkpoints:
            raise InputError(f"--resume: {self.models} has no checkpoint of the last round, {before['rounds']}, "
                             "to go on from; give another --run_name, or start again with --overwrite")
        self.rounds_kept |= set(before["save_rounds"])   # they are kept for good
        self.config["options"]["save_rounds"] = sorted(self.rounds_kept)
        self.past = resuming.environments(old)
        return finished and not more

    def _admit_new(self, overwrite: bool) -> None:
        """Return if the results' folder is empty and nothing else is in the way of a new run."""
        foreign = [p.name for p in self.results.iterdir() if not p.name.startswith(".")]
        if foreign:
            raise InputError(f"{self.results} holds {shown(foreign[0])} but no config.json, so it is no run of "
                             "this program; move it away or give another --run_name")
        left = [*folders.scraps(self.models), *folders.checkpoints(self.models).values()]
        folders.refuse_foreign(*left)
        if left and not overwrite:
            raise InputError(f"{self.models} holds checkpoints, but {self.results / 'config.json'} is gone; use "
                             "--overwrite to delete them, or another --run_name")
        self._delete_earlier()

    def _delete_earlier(self, config: dict | None = None) -> None:
        """Delete the files of the run that is overwritten.

        Killed anywhere in between, it leaves that run, unfinished, which --resume goes on with: ``config.json``
        says so first and stays, and the CSVs go when no checkpoint counts on them any more.

        Args:
            config: its ``config.json``, if it has one.
        """
        if config is not None and config.get("status") != "unfinished":
            write_config(self.results, {**config, "status": "unfinished"})
        attacks = folders.own(self.results, f"{folders.OF_ATTACKS}|{folders.OF_MEMBERSHIP}")
        for path in sorted(attacks, key=lambda path: (path.name == "attack.json", path.name != "attack.csv")):
            path.unlink()
        for _, folder in sorted(folders.checkpoints(self.models).items(), reverse=True):
            folders.remove(folder)
        for path in folders.own(self.results, folders.OF_TRAINING):
            path.unlink()

    def _seen_from_models(self) -> str:
        """The results' folder as a relative path, so that both folders may move, or be copied, together."""
        return os.path.relpath(self.results.resolve(), self.models.resolve())

    def _clear_scraps(self) -> None:
        """Delete what a killed process left half done; nobody else trains here, or attacks."""
        folders.refuse_foreign(*folders.scraps(self.models))
        for folder in folders.scraps(self.models):
            folders.remove(folder)
        for path in folders.half_written(self.results, rf"{folders.OF_TRAINING}|config\.json"):
            path.unlink()

    def _drop_older(self, latest: int) -> None:
        """Delete the checkpoints of other rounds, but for those that are kept for good."""
        for round, folder in folders.checkpoints(self.models).items():
            if round != latest and round not in self.rounds_kept:
                folders.remove(folder)

    def _restore(self) -> None:
        """Go back to the latest checkpoint, or to the start: load it, and cut the CSVs to its length."""
        found, csv_bytes = self.ranks.share(max(folders.checkpoints(self.models), default=0)), {}
        if found:
            folder = self.models / f"round_{found}"
            server = load_checked(folder / "server.pt")
            if not self._is_ours(server, found):
                raise InputError(f"checkpoint {folder} is not of this run; start again with --overwrite")
            travels, stays = self._layout(found)
            head = checked_state(server["head"], travels, folder / "server.pt")
            sent = read_shared(folder / "shared.pt", travels, self.clients)["sent"]
            if "private_start" in server:
                self.private.start_from(checked_state(server["private_start"], stays, folder / "server.pt"))
            for k in self.ranks.mine(range(self.clients)):
                self.private.put(k, read_client(folder / f"client_{k}.pt", stays, travels))
            self.private.commit()
            csv_bytes = server["csv_bytes"]
            self.progress = Progress(found, head, sent, memory=server["memory"])   # uploads: in the checkpoint
        if self.ranks.first:   # only now: if the checkpoint is refused, nothing has changed
            if warning := resuming.note_environment(self.config, self.past, found):
                print(warning, file=sys.stderr)
            self.write_config()
            for name, columns in self.columns.items():
                cut_csv(self.results / name, columns, csv_bytes.get(name))
            if found:   # a process killed after its last save did not come to it
                self._drop_older(found)

    def _layout(self, round: int) -> tuple[State, State]:
        """State dicts like what travels in a round, and like what stays with a client after it."""
        options = self.config["options"]
        row = METHODS[options["method"]].in_round(round, options)
        return row.shared_and_private({**self.progress.head, **self.private.initial.parameters})

    def _is_ours(self, server: dict, round: int) -> bool:
        """Whether a ``server.pt`` is what this run would have written after that round."""
        warm = {"private_start"} if 0 < (self.config["options"].get("full_sharing_rounds") or 0) < round else set()
        return (server.keys() == {"round", "head", "csv_bytes", "memory"} | warm
                and is_whole(server["round"]) and server["round"] == round
                and same_layout(server["head"], self._layout(round)[0])
                and isinstance(server["csv_bytes"], dict) and server["csv_bytes"].keys() == self.columns.keys()
                and all(map(is_whole, server["csv_bytes"].values()))
                and same_memory(server["memory"], self.progress.memory))
