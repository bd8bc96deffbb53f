"""A run's folders: lock, CSVs, checkpoints, and going on after ``kill -9``.

``results/<run>/`` holds what is published, ``saved_models/<run>/round_<r>/`` a checkpoint (checkpoints.py).
A CSV only ever grows by whole rounds, and a checkpoint remembers how long each was. Resuming cuts the CSVs to
that length and computes the later rounds again, on a CPU to the same bytes.
"""
from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

import datasets
from engine.processes import Ranks
from engine.signals import Interrupted, held
from methods import METHODS
from metrics import over_clients
from runs import checkpoints, configs, folders, resume
from runs.csvs import append_csv, check_csv, csv_columns, cut_csv
from server.base import Aggregated, Round, Server, State, is_finite
from server.malicious import MaliciousClients
from update import ClientState
from utils import InputError, Late, duration, nearby, participants, typed, write_whole

if TYPE_CHECKING:
    import pandas as pd

    from runs import board, plots
else:   # they take two seconds: after the first round
    pd, plots, board = Late("pandas"), Late("runs.plots"), Late("runs.board")


Start = tuple[State, State, Callable[[int], State]]


@dataclass
class Progress:
    """The last finished round, apart from client states and the server's memory."""

    round: int
    head: State                                   # the shared parameters that the server sends next
    sent: State = field(default_factory=dict)     # those that it sent in ``round``
    clients: list[int] = field(default_factory=list)          # that uploaded in ``round``
    uploads: dict[int, State] = field(default_factory=dict)   # as they arrived; none once a checkpoint has them
    total: State = field(default_factory=dict)                # their weighted mean, if that alone arrived
    csv_bytes: dict[str, int] = field(default_factory=dict)


@contextmanager
def open_run(config: dict, start: Start, server: Server, malicious: MaliciousClients,
             ranks: Ranks) -> Iterator[Run]:
    """Take a run's folders, locked as long as the block lasts, or the process; arguments as of ``Run``."""
    with ExitStack() as locks:
        run = Run(config, start, server, malicious, ranks, locks)
        with run.bar:
            try:
                yield run
            except (Interrupted, InputError):
                if ranks.alone:   # else some may be gone: the last checkpoint stands
                    run.save()
                raise


class Run:
    """One run's folders; open them with ``open_run``.

    Each rank writes its own clients' checkpoints, and the first everything else, all into the same folders. Only
    this program's own files are ever deleted (folders.py): a folder may be a link, or hold other things.

    Args:
        config: the content of ``config.json``, with every option under ``options``.
        start: the shared parameters that are sent first, all clients' private ones, and client -> its own.

    Raises:
        InputError: the folders are in use, belong to an earlier or foreign run, or are damaged.
    """

    def __init__(self, config: dict, start: Start, server: Server, malicious: MaliciousClients,
                 ranks: Ranks, locks: ExitStack):
        self.config = {"format": configs.FORMAT, **config}
        self.options, self.server, self.malicious, self.ranks = config["options"], server, malicious, ranks
        self.results = Path(self.options["results_dir"]) / self.options["run_name"]
        self.models = Path(self.options["models_dir"]) / self.options["run_name"]
        self.evaluation_split = configs.EVALUATION_SPLIT[config["protocol"]]
        self.columns = csv_columns(config["images"]["classes"], malicious.behaviour.trigger is not None)
        self.rounds_kept, self.clients = set(self.options["save_rounds"]), self.options["num_users"]
        earlier = None
        if ranks.first:
            resume.lock_folders(self.results, self.models, locks)
            earlier = resume.admit(self.results, self.models, self.config)
        self.finished = ranks.share(earlier is not None and earlier["status"] == "finished"
                                    and self.options["rounds"] <= earlier["options"]["rounds"])
        self.progress = Progress(0, start[0])
        self.states = checkpoints.ClientStore(self.models / ".private", ClientState(start[1]), own_start=start[2])
        if not self.finished:
            self._restore(earlier)
        self.events: board.SummaryWriter | None = None
        if ranks.first and self.options["tensorboard"]:
            self.events = board.open_writer(self.results, "rounds")
            locks.callback(self.events.close)
            board.add_rounds(self.events, pd.read_csv(self.results / "rounds.csv").to_dict("records"))
        self.undrawn: tuple[np.ndarray, np.ndarray] | None = None   # arguments of ``_draw_inputs``
        self.saved_round, self.saved_at, self.warned = self.progress.round, time.monotonic(), False
        self.started = time.monotonic()
        # It moves with every client, so that the time left is known within a round. No bar without a terminal.
        self.bar = tqdm(initial=self.progress.round, total=self.options["rounds"], leave=False,
                        disable=self.finished or not ranks.first or None,
                        bar_format="{desc}|{bar:30}| {elapsed} elapsed, {remaining} left")

    def advance(self, round: int, selected: int) -> None:
        """Move the bar by one of the ``selected`` clients that train in a round."""
        done = int((self.bar.n - round + 1) * selected + 1.5)
        self.bar.set_description_str(f"round {round}/{self.bar.total}, {done} of {selected} clients ",
                                     refresh=False)
        self.bar.update(1 / selected)

    def say(self, line: str) -> None:
        """Print a line above the bar, to standard error."""
        self.bar.write(line, file=sys.stderr)

    def write_inputs(self, data: datasets.Dataset, owned: list[np.ndarray], splits: list) -> None:
        """Write ``partition.npz`` (who trains and who is evaluated on which image); its pictures follow later."""
        arrays: dict[str, Any]   # of integers
        if self.config["protocol"] == "resplit":   # drawn anew every round: only the owner is fixed
            arrays = {f"owned_{k}": indices for k, indices in enumerate(owned)}
        else:
            arrays = {f"{split}_{k}": indices for k, pair in enumerate(splits)
                      for split, indices in zip(("train", self.evaluation_split), pair, strict=True)}
        write_whole(self.results / "partition.npz", lambda file: np.savez_compressed(file, **arrays))
        counts = np.stack([np.bincount(data.labels[indices], minlength=data.num_classes) for indices in owned])
        self.undrawn = counts, data.images[:8]

    def _draw_inputs(self, counts: np.ndarray, images: np.ndarray) -> None:
        """Draw the classes of each client and, if there is one, the backdoor's trigger on a few images."""
        plots.plot_partition(self.results / "partition.png", counts, self._title())
        if (trigger := self.malicious.behaviour.trigger) is not None:
            plots.plot_triggered(self.results / "backdoor.png", images, trigger(torch.from_numpy(images)).numpy(),
                                 self._title())
        self.undrawn = None

    @held()
    def record(self, round: Round, aggregated: Aggregated, clients: list[dict], seconds: float) -> None:
        """Write a round's CSV rows, commit the clients' states, and save a checkpoint if one is due."""
        number, bad = round.number, self.malicious.members
        honest = [row for row in clients if row["client"] not in bad] or clients
        rows = {"clients.csv": clients,
                "rounds.csv": [{"round": number, **mean, **round.traffic, "seconds": seconds}
                               for mean in over_clients(honest)],
                "server.csv": [{"round": number, **row, "malicious": int(row["client"] in bad)}
                               for row in aggregated.rows if round.sent]}   # nothing is sent: there is no server
        progress = Progress(number, aggregated.head, round.sent, sorted(round.uploads), aggregated.uploads,
                            aggregated.total)
        if self.ranks.first:
            few, rule = self.server.min_uploads, self.options["aggregation"]
            if len(round.uploads) < few and not self.warned:
                self.warned = True
                self.say(f"warning: --aggregation {rule} cannot tell who is malicious among fewer than {few} "
                         f"uploads; round {number} has {len(round.uploads)}")
            if self.config.get("server") != self.server.facts:
                self.config["server"] = self.server.facts
                configs.write(self.results, self.config)
            progress.csv_bytes = {name: append_csv(self.results / name, self.columns[name], added)
                                  for name, added in rows.items()}
            if self.events is not None:
                board.add_rounds(self.events, rows["rounds.csv"])
        self.bar.n = number   # exact again after the sum of the clients' shares
        if held_out := [row for row in rows["rounds.csv"] if row["split"] == self.evaluation_split]:
            stages = ", ".join(f"{row['stage']} {row['accuracy']:.4f} (worst decile {row['accuracy_worst']:.4f})"
                               for row in held_out)
            self.bar.write(f"round {number}/{self.bar.total}: {self.evaluation_split} accuracy {stages}")
        self.states.commit()
        self.progress = progress
        due = number in self.rounds_kept or time.monotonic() - self.saved_at >= self.options["checkpoint_seconds"]
        if self.ranks.share(due):
            self.save()
        if self.undrawn is not None:   # last, so that a full disk costs no round
            self._draw_inputs(*self.undrawn)

    @held()
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
        self.states.export(self.ranks.mine(range(self.clients)), partial)
        self.ranks.wait()
        if self.ranks.first:
            shared = {"round": now.round, "protocol": self.config["protocol"],
                      "sent": now.sent, "clients": now.clients, "uploads": now.uploads, "sum": now.total}
            start = self.states.initial.parameters if self.options["full_sharing_rounds"] else {}
            server = {"round": now.round, "head": now.head, "csv_bytes": now.csv_bytes,
                      "memory": self.server.memory, "private_start": start}
            write_whole(partial / "shared.pt", lambda file: torch.save(shared, file))
            write_whole(partial / "server.pt", lambda file: torch.save(server, file))
            partial.rename(target)
            self._drop_older(now.round)
        now.uploads = {}   # the next round's take their place in memory
        self.saved_round, self.saved_at = now.round, time.monotonic()

    @held()
    def finish(self) -> None:
        """Save the last checkpoint, draw the plots, and mark the run as finished."""
        self.save()
        if self.ranks.first:
            folders.remove(self.models / ".private")
            if self.undrawn is not None:   # all rounds were done before
                self._draw_inputs(*self.undrawn)
            plots.plot_curves(self.results / "curves.png", pd.read_csv(self.results / "rounds.csv"), self._title())
            server = pd.read_csv(self.results / "server.csv")
            if server["trust"].notna().any():
                plots.plot_trust(self.results / "trust.png", server, self._title())
            self.config["status"] = "finished"
            configs.write(self.results, self.config)

    def table(self) -> str:
        """Return the metrics of the last round, where the files are, and what to run next, as text."""
        rounds = pd.read_csv(self.results / "rounds.csv").query("split == @self.evaluation_split")
        last, deployed = rounds[rounds["round"] == rounds["round"].max()], rounds[rounds["stage"] == "deployed"]
        shown = last[["stage", "accuracy", "accuracy_std", "accuracy_worst", "accuracy_images", "f1", "kl_nats"]]
        shown = shown.rename(columns={"accuracy_images": "images"}).to_string(
            index=False, na_rep="-", float_format="%.4f")
        details = _details(deployed.iloc[-1]) + _best(deployed) * (self.options["preset"] is not None)
        everybody = self.options["frac"] == 1 and not self.options["malicious_frac"]
        who = (f"{participants(self.options)} clients" if everybody
               else "honest clients (trained: those that trained)")
        return (f"\n{self._title()}\nround {last['round'].max()}, split {self.evaluation_split}, means over "
                f"{who}; images: share of all images\n{shown}\n{details}"
                f"results:     {nearby(self.results)}\npicture:     {nearby(self.results / 'curves.png')}\n"
                f"checkpoints: {nearby(self.models)}\n"
                + f"time:        {duration(time.monotonic() - self.started)}\n" * (not self.finished)
                + "next:        " + "\n             ".join(self._next()))

    def _next(self) -> list[str]:
        """Return the commands that attack this run, if it can be attacked, and that report it."""
        images, attack = self.config["images"], "attack/mi_attack.py"
        public = "unowned" if images["pooled"] - images["owned"] >= datasets.MIN_PUBLIC else (
            datasets.OTHER_DATA.get(self.options["dataset"]))
        if self.config["protocol"] != "held-out" or public is None:
            return [typed("report.py", self.options, "results_dir")]
        return [typed(attack, {**self.options, "run": self.results.name, "public": public}, "run", "public",
                      "results_dir", "models_dir", "data_dir"), typed("report.py", self.options, "results_dir")]

    def _title(self) -> str:
        mark = {"resplit": ", RESPLIT: tested on images trained on", "validate": ", validation images"}
        return self.results.name + mark.get(self.config["protocol"], "")

    def _drop_older(self, latest: int) -> None:
        """Delete the checkpoints of other rounds, but for those that are kept for good."""
        for round, folder in folders.checkpoints(self.models).items():
            if round != latest and round not in self.rounds_kept:
                folders.remove(folder)

    def _restore(self, earlier: dict | None) -> None:
        """Go back to the latest checkpoint or the start; ``earlier`` is the ``config.json`` that is resumed."""
        latest = self.ranks.share(max(folders.checkpoints(self.models), default=0))
        if latest:
            self._load(latest)
        if self.ranks.first:   # only now: if the checkpoint or a CSV is refused, nothing has changed
            for name, size in self.progress.csv_bytes.items():
                check_csv(self.results / name, self.columns[name], size)
            if earlier is not None:
                self.rounds_kept |= set(earlier["options"]["save_rounds"])   # kept for good
                self.options["save_rounds"] = sorted(self.rounds_kept)
                if warning := resume.note_environment(self.config, earlier, latest):
                    print(warning, file=sys.stderr)
            configs.write(self.results, self.config)
            for name, columns in self.columns.items():
                cut_csv(self.results / name, columns, self.progress.csv_bytes.get(name))
            if latest:   # a process killed after its last save did not come to it
                self._drop_older(latest)

    def _load(self, round: int) -> None:
        """Load progress, the server's memory and this rank's clients; InputError if a file is not of this run."""
        folder, full = self.models / f"round_{round}", self.options["full_sharing_rounds"]
        path = folder / "server.pt"
        content = checkpoints.load_checked(path)
        method = METHODS[self.options["method"]].in_round(round, self.options)
        shared, private = method.shared_and_private({**self.progress.head, **self.states.initial.parameters})
        memory = content.get("memory", {})
        expected = {"round": round, "head": shared, "csv_bytes": dict.fromkeys(self.columns, 0), "memory": memory,
                    "private_start": private if full else {}}
        checkpoints.require(checkpoints.same_layout(content, expected) and content["round"] == round
                            and is_finite({**content["head"], **content["private_start"]})
                            and checkpoints.same_memory(memory, self.server.memory), path)
        sent = checkpoints.read_shared(folder / "shared.pt", shared, self.clients)["sent"]
        if full:
            self.states.start_from(content["private_start"], [])
        for k in self.ranks.mine(range(self.clients)):
            self.states.put(k, checkpoints.read_client(folder / f"client_{k}.pt", private, shared))
        self.states.commit()
        self.server.memory.update(memory)   # uploads: in the checkpoint
        self.progress = Progress(round, content["head"], sent, csv_bytes=content["csv_bytes"])


def _details(row: pd.Series) -> str:
    """Return the accuracy by class and the bytes sent in a row of ``rounds.csv``, as text."""
    classes = " ".join("-" if share != share else f"{share:.3f}" for share in row.filter(like="accuracy_class_"))
    return (textwrap.fill(f"{row['stage']}, by class: {classes}", 100, subsequent_indent=" " * 20)
            + f"\nlast round:  {row['bytes_up'] / 1e6:,.1f} MB up, {row['bytes_down'] / 1e6:,.1f} MB down\n")


def _best(deployed: pd.DataFrame) -> str:
    """Return the highest accuracy over all images of any round, as some benchmarks report it, as text."""
    best = deployed.loc[deployed["accuracy_images"].idxmax()]
    return (f"best:        {best['accuracy_images']:.4f} of all images, in round {best['round']}: optimistic, "
            f"since the round is chosen on {best['split']} images\n")
