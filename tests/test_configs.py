"""A run's config.json: what is written is accepted; a value that is none of its option is refused in one line."""
import json

import pytest

from methods import METHODS
from options import args_parser, make_parser
from runs import configs
from runs.configs import read
from server.robust import RULES
from utils import InputError


def stored(*flags):
    """Options as RVE-PFL.py leaves them in config.json."""
    return json.loads(json.dumps(vars(args_parser(list(flags))), default=str))


@pytest.fixture
def write(tmp_path):
    """Leave a config.json of these options; its path."""
    def make(options, /, **others):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"format": configs.FORMAT, "status": "finished", "protocol": "held-out",
                                    "options": options, **others}))
        return path
    return make


def test_whatever_is_written_is_accepted(write):
    for flags in (*(["--method", method, "--partition", "dirichlet", "--resplit"] for method in METHODS),
                  *(["--method", "fedavg", "--aggregation", rule, "--malicious_frac", "0.3"] for rule in RULES),
                  ["--encoders_from", "other run", "--lr_decay", "0", "--device", "cuda:1", "--stack", "3"],
                  ["--method", "client_dp", "--noise_multiplier", "1", "--data_dir", "/tmp/é ü"]):
        options = stored(*flags)
        assert read(write(options, server={"epsilon": float("inf")}), *options)["options"] == options
        less = {key: value for key, value in options.items() if key != "seed"}
        with pytest.raises(InputError, match="not of this version .*--seed"):
            read(write(less), "seed")


def test_each_option_is_held_against_its_declaration(write):
    wrong = [(action.dest, value) for action in make_parser()._actions if action.dest != "help"
             for value in ({}, [[]])]
    wrong += [("seed", "1"), ("seed", 1.5), ("seed", True), ("seed", 10**400), ("rounds", 0), ("rounds", None),
              ("num_users", "<script>"), ("kl_weight", float("nan")), ("kl_weight", "small"), ("method", "x"),
              ("dataset", "../../etc/x"), ("dataset", "a\n"), ("run_name", ".."), ("device", "x"), ("resplit", 1),
              ("save_rounds", 3), ("save_rounds", ["1"]), ("data_dir", 3), ("aggregation", "vote")]
    for name, value in wrong:
        with pytest.raises(InputError, match=f"not of this version .*--{name} ") as caught:
            read(write({**stored(), name: value}))
        assert "\n" not in str(caught.value) and "config.json" in str(caught.value)


@pytest.mark.parametrize("part, wrong", [
    *(("format", number) for number in (None, 0, 2, "1", True, 1.0, [1])),
    ("status", "done"), ("status", ["finished"]), ("protocol", {}), ("options", []), ("options", None)])
def test_another_format_or_damage_is_another_programs(write, part, wrong):
    path = write(stored(), **{part: wrong})
    with pytest.raises(InputError, match=f"not of this version .*{part}"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"options"', b"\xff\xfe\xfa", b"1" * 5000, b"[" * 200_000,
                                     b"{}\x00"], ids=lambda content: repr(content[:20]))
def test_what_is_no_object(tmp_path, content):
    path = tmp_path / "config.json"
    with pytest.raises(InputError, match="cannot be read"):
        read(path)
    path.write_bytes(content)
    with pytest.raises(InputError, match="config.json is damaged") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no plain file"):
        read(tmp_path)
