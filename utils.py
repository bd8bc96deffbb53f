"""What every part needs and no method owns: a user's error, seeding, device, precision, signals."""
import ctypes
import hashlib
import os
import platform
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

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


def environment(device: torch.device) -> dict:
    """What a figure depends on besides the options: versions, commit, machine."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    edits = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    return {
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        "commit": commit.stdout.strip() + (" with edits" if edits.stdout.strip() else ""),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else
        f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "system": platform.platform(),
    }
