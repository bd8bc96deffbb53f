"""Errors, seeding, device, precision, and files that are written whole."""
import ctypes
import errno
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent   # the project's folder

MOST_SHOWN = 80      # characters of a value in a message
LONGEST_WORD = 256   # characters of a message without a space; no file name is longer


class InputError(Exception):
    """A user's mistake or a fault of the system; its text is the one line that the user sees."""


def printable(text: object, kept: str = "") -> str:
    """Return a text whose unprintable characters, except those in ``kept``, are written as escapes."""
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in str(text))


def shortened(text: str, most: int = MOST_SHOWN) -> str:
    """Return a text shortened to ``most`` characters: its beginning and its end."""
    return text if len(text) <= most else f"{text[:most - 23]}...{text[-20:]}"


def shown(value: object) -> str:
    """Return a value of a command line or a file for a message: printable, and at most MOST_SHOWN characters."""
    plain = value is None or isinstance(value, (str, int, float, Path))   # a list may be nested too deeply
    return shortened(printable(value)) if plain else f"a {type(value).__name__}"


def error_line(program: str, error: Exception | str, hint: str = "") -> str:
    """Return an error as one printable line, with long words shortened; ``hint`` says what to do."""
    text = f"{error.filename or 'a file'}: {error.strerror or error}" if isinstance(error, OSError) else error
    line = printable(f"{program}: error: {text}{hint}")
    return shortened(re.sub(rf"\S{{{LONGEST_WORD},}}", lambda word: shortened(word[0]), line), 10 * LONGEST_WORD)


def rng(seed: int, purpose: str, client: int = 0, round: int = 0) -> np.random.Generator:
    """Return the generator of one draw, independent of all others, so that their order does not matter."""
    digest = hashlib.blake2b(purpose.encode(), digest_size=4).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "little"), client, round])


def torch_rng(seed: int, purpose: str, client: int = 0, round: int = 0) -> torch.Generator:
    """Return ``rng`` as a PyTorch generator on the CPU."""
    generator = torch.Generator()
    generator.set_state(_torch_state(rng(seed, purpose, client, round))[1])
    return generator


def seed_torch(seed: int, purpose: str, client: int = 0, round: int = 0) -> None:
    """Seed PyTorch's default generators, which dropout uses, for one client's work in one round."""
    number, state = _torch_state(rng(seed, purpose, client, round))
    torch.manual_seed(number)   # for GPUs, whose Philox uses all of it
    torch.default_generator.set_state(state)


def _torch_state(drawn: np.random.Generator) -> tuple[int, torch.Tensor]:
    """Draw a seed of 63 bits, and a whole state of PyTorch's Mersenne twister, which uses 32 bits of a seed."""
    number = int(drawn.integers(2**63))
    state = torch.Generator().manual_seed(number).get_state()
    words = state[24:24 + 8 * 624].view(torch.int64)   # ATen/CPUGeneratorImpl.cpp: 32 bits in each
    words.copy_(torch.from_numpy(drawn.integers(2**32, size=624)))
    return number, state


def generator_of(device: torch.device) -> torch.Generator:
    """Return PyTorch's default generator of a device."""
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def choose_device(name: str, turn: int = 0) -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; InputError if it does not exist.

    A GPU becomes PyTorch's current device, without TF32 in convolutions. Without a number in ``name``, processes
    take the machine's GPUs in turn.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    count, number = torch.cuda.device_count(), name.removeprefix("cuda").removeprefix(":")
    index = int(number) if number else turn % max(count, 1)
    if index >= count:
        raise InputError(f"--device {name}: this machine has {count} CUDA devices that PyTorch can use; use "
                         "--device cpu")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products for ``fp32``, ``bf16`` or ``auto``: bf16 if the chip is fast at it."""
    fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
            torch.cpu._is_avx512_bf16_supported() and torch.backends.cpu.get_cpu_capability().startswith("AVX512"))
    return torch.bfloat16 if name == "bf16" or (name == "auto" and fast) else torch.float32


def keep_freed_memory() -> None:
    """Let glibc keep large blocks for reuse: to map and zero them anew takes half of a training step on a CPU."""
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4   # <malloc.h>
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 64 * 2**20)


def fingerprint(state: dict[str, torch.Tensor]) -> str:
    """Return a digest of a state dict's values, 16 hexadecimal digits."""
    return digest(*(state[name].cpu().numpy() for name in sorted(state)))


def digest(*arrays: np.ndarray) -> str:
    """Return a digest of arrays' values, 16 hexadecimal digits."""
    hashed = hashlib.blake2b(digest_size=8)
    for array in arrays:
        hashed.update(np.ascontiguousarray(array).data)
    return hashed.hexdigest()


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it: a reader sees all of it or nothing.

    Raises:
        OSError: the file cannot be written (no room, no permission); nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            write(file)
        partial.replace(path)
    except OSError as error:   # a full disk's names no file, or the partial one
        raise OSError(error.errno, error.strerror, str(path)) from error
    except RuntimeError as error:   # torch.save's for a failed write
        raise OSError(errno.EIO, f"could not be written ({str(error).splitlines()[0]})", str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def environment(device: torch.device) -> dict:
    """Return what a result depends on besides the options: versions, commit, machine."""
    return {
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else
        f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "system": platform.platform(),
    }


def commit(*paths: str) -> str:
    """Return the commit that runs, marked if it has edits, or "unknown" without a readable repository.

    Args:
        paths: git's names of the files in which edits count; all tracked ones by default.
    """
    git = ["git", "-C", str(ROOT)]
    try:
        head, edits = (subprocess.run([*git, *words], capture_output=True, check=True, text=True).stdout.strip()
                       for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno", "--", *paths)))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head[:12] + (" with edits" if edits else "")
