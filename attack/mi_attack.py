"""Attack a trained run, and report for each attack whether it beats its control.

    python attack/mi_attack.py --run mnist10k-shards-rve_pfl-seed1
    python attack/mi_attack.py --model net.py:Net --weights w.pt ...   # of another program

Every adversary runs those of four attacks that fit it, or with --attack all each one. Written to results/<run>/:
attack.csv, a row for each reconstruction and each control; attack.json, the options; attack_summary.csv, means and
95 % bootstrap intervals; attack_latents.csv, the noise of the latents and the bound; a picture of each attack.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the project, whatever the folder

from attack.run_command import MiAttack
from engine.signals import steady_output
from utils import Late

if TYPE_CHECKING:
    from attack import model_command
    from parsing import Parser
else:
    model_command = Late("attack.model_command")


def command_of(words: Sequence[str]) -> type[MiAttack]:
    """Return the command that a command line calls: --model is an attack on a model of another program."""
    of_model = any(word.split("=")[0] == "--model" for word in words)
    return model_command.ModelAttack if of_model else MiAttack


def make_parser(argv: Sequence[str] = ()) -> Parser:
    """Build the parser of a command line."""
    return command_of(argv).parser()


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return the exit status."""
    return command_of(sys.argv[1:] if argv is None else argv).main(argv)


if __name__ == "__main__":
    with steady_output("mi_attack.py"):
        sys.exit(main())
