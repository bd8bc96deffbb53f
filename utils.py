"""What every part needs and no method owns: a user's error, seeding, device, precision, signals, output."""
import ctypes
import errno
import hashlib
import os
import platform
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np
import torch


class InputError(Exception):
    """A user's mistake or a broken surrounding: its text is the one line the user sees."""


def rng(seed: int, purpose: str, client: int = 0, round: int = 0) -> np.random.Generator:
    """The generator of one draw. Nothing else decides it, so no draw depends on the order of others."""
    digest = hashlib.blake2b(purpose.encode(), digest_size=4).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "little"), client, round])


def torch_rng(seed: int, purpose: str, client: int = 0, round: int = 0) -> torch.Generator:
    """``rng`` as a generator of PyTorch's, on the CPU."""
    return torch.Generator().manual_seed(int(rng(seed, purpose, client, round).integers(2**63)))


def seed_torch(seed: int, purpose: str, client: int = 0, round: int = 0) -> None:
    """Seed PyTorch's own generators, dropout's included, for one client's work in one round."""
    torch.manual_seed(int(rng(seed, purpose, client, round).integers(2**63)))


def choose_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` -> a device that exists, or InputError.

    Without a number, processes that torchrun started on one machine take its GPUs in turn.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if name == "cuda" and torch.cuda.device_count():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices "
                         "that PyTorch can use; use --device cpu")
    return device


def fast_bf16(device: torch.device) -> bool:
    """Whether the chip multiplies bfloat16 natively: elsewhere it is emulated, slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """``auto``, ``fp32`` or ``bf16`` -> the dtype of convolutions and matrix products."""
    if name == "bf16" or (name == "auto" and fast_bf16(device)):
        return torch.bfloat16
    return torch.float32


def keep_freed_memory() -> None:
    """Have glibc reuse big blocks instead of giving them back to the kernel after every tensor.

    A training step allocates hundreds of megabytes; mapping and zeroing them anew each step costs a
    third of its time on a CPU. Without glibc this does nothing.
    """
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4   # <malloc.h>
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 64 * 2**20)


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM, whose number is its argument."""


class Interrupts:
    """While entered, SIGINT and SIGTERM raise Interrupted, except inside ``held()``, which they wait for."""

    def __enter__(self):
        self.holding, self.pending = False, None
        self.before = {number: signal.signal(number, self._arrived)
                       for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _arrived(self, number, frame):
        self.pending = number
        if not self.holding:
            raise Interrupted(number)

    @contextmanager
    def held(self):
        """Let no signal between two writes that belong together."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        if self.pending:
            raise Interrupted(self.pending)


class Steady:
    """A standard stream that never fails: what nobody can take any more is dropped, and the work goes on.

    What the program says is also in its files, so a full disk behind standard output, or a reader who has
    seen enough (``| head``), is no reason to lose a training. Letters that the stream's encoding lacks, or
    bytes of a file name that are no letters, are shown as escapes.
    """

    def __init__(self, stream: TextIO | None, lost: str = ""):
        # None: closed before we began.
        self.stream, self.lost = stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"), lost
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, operation, *arguments) -> None:
        try:
            operation(*arguments)
        except BlockingIOError:   # a terminal that others made non-blocking, full for a moment
            select.select([], [self.stream.fileno()], [], 1.0)
        except OSError as error:
            # What the stream still holds goes there too, when it is flushed or closed.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if self.lost and error.errno != errno.EPIPE:
                print(f"{self.lost} ({error.strerror})", file=sys.stderr)


@contextmanager
def steady_output(program: str) -> Iterator[None]:
    """While entered, printing cannot fail (``Steady``); a full standard output is said once, on the other."""
    while os.open(os.devnull, os.O_RDWR) <= 2:   # or a file of ours would become the stream that was closed
        pass
    sys.stderr = Steady(sys.stderr)
    sys.stdout = Steady(sys.stdout, f"{program}: warning: standard output cannot be written, what it would "
                                    "say is lost; files are written as usual")
    try:
        yield
    finally:
        sys.stdout.flush()


def environment(device: torch.device) -> dict:
    """What a figure depends on besides the options: versions, commit, machine."""
    return {
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else
        f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "system": platform.platform(),
    }


def _commit() -> str:
    """The commit that runs, or "unknown" where there is no git, or no repository that it would read."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head, edits = (subprocess.run([*git, *words], capture_output=True, check=True).stdout.strip()
                       for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno")))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.decode() + (" with edits" if edits else "")
