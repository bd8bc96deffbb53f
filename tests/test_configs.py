"""A run's config.json: what is written is accepted, what is not an option's value is refused in one line."""
import itertools
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
    def make(options, **others):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"format": configs.FORMAT, "status": "finished", "protocol": "held-out",
                                    "options": options, **others}))
        return path
    return make


FLAGS = [["--method", method, *more] for method, more in itertools.product(METHODS, (
    [], ["--partition", "dirichlet", "--resplit"], ["--save_rounds", "1", "5", "--validate", "--unequal"],
    ["--dataset", "cifar", "--partition", "iid", "--optimizer", "sgd", "--momentum", "0.5"]))]
FLAGS += [["--method", "fedavg", "--aggregation", rule, "--malicious_frac", "0.3"] for rule in RULES]
FLAGS += [["--encoders_from", "other run", "--lr_decay", "0", "--device", "cuda:1", "--stack", "3"],
          ["--method", "client_dp", "--noise_multiplier", "1", "--data_dir", "/tmp/é ü", "--run_name", "a=b"]]


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_whatever_is_written_is_accepted(write, flags):
    options = stored(*flags)
    assert read(write(options, server={"epsilon": float("inf")}), *options)["options"] == options


def test_what_an_older_version_lacks_is_no_fault_unless_needed(write):
    options = stored()
    for name in options:
        less = {key: value for key, value in options.items() if key != name}
        assert name not in read(write(less))["options"]
        with pytest.raises(InputError, match=f"not of this version .*--{name}"):
            read(write(less), name)
    assert read(write({**options, "of_the_future": [1]}))["options"]["of_the_future"] == [1]


NAMES = [action.dest for action in make_parser()._actions if action.dest != "help"]


@pytest.mark.parametrize("name", NAMES)
def test_each_option_is_held_against_its_declaration(write, name):
    """Of another type, each is refused, in one line that names it."""
    for wrong in ({}, [[]], [None]):
        with pytest.raises(InputError, match=f"--{name} ") as caught:
            read(write({**stored(), name: wrong}))
        assert "\n" not in str(caught.value) and "config.json" in str(caught.value)


@pytest.mark.parametrize("name, wrong", [
    ("seed", "1"), ("seed", 1.5), ("seed", True), ("seed", -1), ("seed", 10**400), ("rounds", 0),
    ("rounds", None), ("num_users", "<script>"), ("num_users", 100_001), ("local_ep", "2\n"),
    ("kl_weight", float("nan")), ("kl_weight", float("inf")), ("kl_weight", "small"), ("kl_weight", None),
    ("kl_weight", True), ("init_logvar", None), ("classes_per_client", "two"), ("method", "quantum"),
    ("method", None), ("method", ["rve_pfl"]), ("partition", "halves"), ("dataset", "../../etc/x"),
    ("dataset", "a/b"), ("dataset", "a\n"), ("dataset", ""), ("run_name", ".."), ("run_name", "a/b"),
    ("device", "tpu"), ("resplit", 1), ("resplit", "yes"), ("save_rounds", 3), ("save_rounds", [0]),
    ("save_rounds", ["1"]), ("data_dir", 3), ("aggregation", "vote")])
def test_values_that_are_none_of_an_option(write, name, wrong):
    with pytest.raises(InputError, match=f"not of this version .*--{name} ") as caught:
        read(write({**stored(), name: wrong}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [None, 0, 2, "1", True, 1.0, [1]])
def test_another_format_is_another_program_s(write, number):
    path = write(stored())
    config = json.loads(path.read_text())
    assert config.pop("format") == 1   # a change of the format changes every committed run
    path.write_text(json.dumps(config if number is None else {**config, "format": number}))
    with pytest.raises(InputError, match="not of this version .*format"):
        read(path)


@pytest.mark.parametrize("part, wrong", [
    ("status", "done"), ("status", ["finished"]), ("status", None), ("protocol", {}), ("protocol", "mine"),
    ("options", []), ("options", None)])
def test_parts_that_are_none(write, part, wrong):
    path = write(stored())
    path.write_text(json.dumps({**json.loads(path.read_text()), part: wrong}))
    with pytest.raises(InputError, match=f"not of this version .*{part}"):
        read(path)


DAMAGED = [b"", b"{", b"[]", b"null", b'"options"', b"\xff\xfe\xfa", b"\x80abc", b"1" * 5000, b"[" * 200_000,
           b'{"options": ' * 50_000, b"{}\x00"]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: repr(content[:20]))
def test_what_is_no_object(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match="config.json is damaged") as caught:
        read(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


def test_what_is_no_file(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "none.json")
    with pytest.raises(InputError, match="no plain file"):
        read(tmp_path)
    monkeypatch.setattr(configs, "LARGEST", 3)
    (tmp_path / "config.json").write_text("{}  ")
    with pytest.raises(InputError, match="over 3 bytes"):
        read(tmp_path / "config.json")


def test_a_nested_value_is_not_printed(tmp_path):
    """Deep enough for JSON's reader, too deep for printing."""
    path = tmp_path / "config.json"
    for depth in range(300, 1000, 20):
        path.write_text('{"format": 1, "status": "finished", "protocol": "held-out", "options": {"seed": '
                        + "[" * depth + "]" * depth + "}}")
        with pytest.raises(InputError, match=r"--seed a list: must be a whole number|nested too deeply"):
            read(path)


def test_resume_and_borrowed_encoders_say_what_is_wrong(place, capsys):
    assert place.main("--rounds", 1) == 0
    config = place.results / "config.json"
    whole, before = config.read_text(), place.clients_csv()
    for text, reason in ((whole.replace('"seed": 1', '"seed": "x"'), "--seed x"),
                         (whole.replace('"finished"', "[]"), "status"), ("[" * 9999, "nested")):
        config.write_text(text)
        line = place.refuses(capsys, "--rounds", 1, "--resume")
        assert reason in line and ("--overwrite" in line) == (reason != "nested")   # which nobody knows as ours
        line = place.refuses(capsys, "--rounds", 1, "--encoders_from", "run",
                             "--run_name", "heads", "--overwrite")
        assert reason in line and "--encoders_from run" in line
    config.write_text(whole)
    assert place.main("--rounds", 1, "--resume") == 0 and place.clients_csv() == before
