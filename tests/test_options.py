"""Options: ranges, contradictions, errors of one line; each option is read, and each documented flag exists."""
import dataclasses
import re

import pytest
from conftest import ROOT

import methods
import options
import parsing
import report
from attack import membership, mi_attack
from engine.stacks import draws_of
from methods import METHODS, PRIOR
from options import args_parser, make_parser, readers
from runs import setup


def refused(line, capsys):
    """The one line that answers a command line."""
    with pytest.raises(SystemExit, match="2"):
        args_parser(line.split())
    answer, = capsys.readouterr().err.splitlines()
    return answer


@pytest.mark.parametrize("line, named", [
    ("--num_users 0", "--num_users"), ("--num_users two", "num_users"), ("--rounds -3", "--rounds"),
    ("--frac 0", "--frac"), ("--frac nan", "--frac"), ("--lr inf", "--lr"), ("--seed -1", "--seed"),
    ("--method nbafl --clip 0", "--clip"), ("--method nbafl --delta 0.9", "--delta"),
    ("--method client_dp --epsilon 1 --noise_multiplier 1", "--noise_multiplier"),
    ("--save_rounds 101", "--save_rounds"), ("--optimizer sgd --momentum 1", "--momentum"),
    ("--method best", "--method"), ("--preset flower", "--preset"), ("--test_share 1", "--test_share"),
    ("--partition rounds", "--partition"), ("--precision fp8", "--precision"),
    ("--device tpu", "--device"), ("--dataset ../etc/passwd", "--dataset"), ("--run_name a/b", "--run_name"),
    ("--run_name ..", "--run_name"), ("--resume --overwrite", "--resume"), ("--resplit --validate", "--resplit"),
    ("--full_sharing_rounds 5 --rounds 5", "--full_sharing_rounds"), ("--num_user 3", "--num_users"),
    ("extra", "extra"), ("--malicious_frac 2", "between"), ("--malicious_behaviour nun", "choose from"),
    ("--malicious_frac 0.05", "of 10 clients that is none"),
    ("--method nbafl --aggregation threat_aware", "accounting"),
    ("--method local --malicious_frac 0.2", "shares nothing"), ("--method local_cnn --new_clients 0.2", "nothing"),
    ("--new_clients 0.05", "of 10 clients that is none"), ("--new_clients 1", "no client would be left"),
    ("--method fedper --malicious_frac 0.5 --malicious_behaviour gan_poison", "whole head")])
def test_a_bad_option_is_one_line_and_status_2(line, named, capsys):
    assert named in refused(line, capsys)


@pytest.mark.parametrize("line, setting", [
    ("--prior_apart 0.3", "--prior normal"), ("--kl_weight 0 --kl_warmup 3", "--kl_weight 0"),
    ("--method ressfl --stack 4", "--method ressfl"), ("--prior class --stack 2", "--prior class"),
    ("--momentum 0.5", "--optimizer adam"), ("--test_share 0.2 --keep_split", "--keep_split True"),
    ("--alpha 1 --partition iid", "--partition iid"),
    ("--malicious_behaviour passive", "--malicious_frac 0"), ("--clip_noise 0.1", "--aggregation threat_aware"),
    ("--aggregation median --tolerate 0.1", "--aggregation median"), ("--method nbafl --prox 1", "--method nbafl"),
    ("--private_init --full_sharing_rounds 2", "--full_sharing_rounds 2"),
    ("--private_init --encoders_from a", "--encoders_from a"),
    ("--private_init --method fedavg", "--method fedavg"),
    ("--encoders_from a --kl_weight 1", "--encoders_from a"), ("--epsilon 3", "--method rve_pfl"),
    ("--local_ep 2 --local_steps 5", "--local_steps 5"), ("--new_ep 3", "--new_clients 0"),
    ("--private_ep 2", "--method rve_pfl"), ("--method fedrep --stack 2", "--private_ep 5"),
    ("--unequal --partition file", "--partition file"), ("--method local --aggregation mean", "--method local")])
def test_an_option_that_nothing_reads_is_refused_with_the_reason(line, setting, capsys):
    answer = refused(line, capsys)
    assert setting in answer and "does not read it; leave it out" in answer
    named = answer.split("error: ")[1].split(":")[0].split()[0]   # the option, and not the setting
    assert named in line and not setting.startswith(f"{named} ")


@pytest.mark.parametrize("line", [
    "--prior class --prior_apart 0.3 --kl_warmup 2", "--method ressfl --stack 1", "--optimizer sgd --momentum 0.5",
    "--momentum 0", "--malicious_frac 0.1 --malicious_behaviour passive", "--kl_weight 0 --kl_warmup 0",
    "--aggregation krum --tolerate 0.1"])
def test_an_option_that_something_reads_is_not(line):
    args, words = vars(args_parser(line.split())), line.split()
    for flag, value in zip(words[::2], words[1::2], strict=True):
        assert str(args[flag[2:]]) in (value, f"{value}.0")


@pytest.mark.parametrize("method, more", [(name, ()) for name in METHODS] + [
    (name, ("--prior", "class")) for name in readers(PRIOR, METHODS)])
def test_stack_is_refused_where_clients_are_never_stacked(method, more, place, driver):
    """The engine decides it, from the trainer that the driver makes."""
    words = place.argv("--method", method, *more)
    trainer = setup.make_trainer(args_parser(words), setup.datasets.load("tiny", place.folder / "data"),
                                  setup.torch.device("cpu"))
    if not trainer.method.sequential and draws_of(trainer) and len(trainer.training.phases()) == 1:
        args_parser([*words, "--stack", "3"])
    else:
        with pytest.raises(SystemExit, match="2"):
            args_parser([*words, "--stack", "3"])


@pytest.mark.parametrize("attacks, words, meant", [
    (False, "--learning_rate 0.1", "--lr"), (False, "--Learning-Rate=0.1", "--lr"), (False, "-lr 0.1", "--lr"),
    (False, "--num-users 3", "--num_users"), (False, "--beta 1", "--kl_weight"), (False, "--weight_decay 1", ""),
    (False, "num_users", ""), (True, "--epochs 3", "--train_epochs"), (True, "--learning_rate 3", "")])
def test_an_unknown_flag_is_answered_by_an_option_of_this_program_or_none(attacks, words, meant, capsys):
    with pytest.raises(SystemExit, match="2"):
        (mi_attack if attacks else options).make_parser().parse(words.split() + ["--run", "run"] * attacks)
    line, = capsys.readouterr().err.splitlines()
    assert f"error: unknown argument {words.split()[0]}" in line
    assert "".join(re.findall(r"did you mean (--\w+)\?", line)) == meant


def test_edited_defaults_are_checked_too(monkeypatch, capsys):
    row = METHODS["fedavg"]
    for name, value, answer in (("lr", -1.0, "--lr -1.0: must be between"),
                                ("aggregation", "nosuch", "--aggregation nosuch: choose from")):
        reads = {key: value if key.name == name else old for key, old in row.reads.items()}
        edited = dataclasses.replace(row, reads=reads, by_dataset={}, by_partition={})
        monkeypatch.setitem(METHODS, "fedavg", edited)
        assert answer in refused("--method fedavg", capsys)
    monkeypatch.setitem(METHODS, "fedavg", row)
    parser = make_parser()
    parser.set_defaults(num_users=0)
    with pytest.raises(SystemExit):
        args_parser([], parser)
    assert "--num_users 0" in capsys.readouterr().err


def test_defaults_are_the_papers_and_depend_on_data_set_partition_and_method():
    args = args_parser([])
    assert (args.dataset, args.partition, args.method) == ("mnist", "shards", "rve_pfl")
    assert (args.num_users, args.rounds, args.local_ep, args.local_bs) == (10, 100, 10, 256)
    assert (args.optimizer, args.lr, args.lr_decay, args.classes_per_client) == ("adam", 1e-3, 1e-3, 2)
    assert (args.alpha, args.malicious_behaviour, args.stack, args.momentum) == (None, None, None, 0)
    assert args.run_name == "mnist-shards-rve_pfl-seed1"
    assert args_parser(["--resplit"]).run_name.endswith("-resplit")
    assert args_parser(["--validate"]).run_name.endswith("-validate")
    assert args_parser(["--epochs", "7"]).rounds == 7   # the authors' name
    assert args_parser(["--malicious_frac", "0.5"]).malicious_behaviour == "label_flip"
    assert args_parser(["--dataset", "cifar"]).augment == "flip+shift"
    assert args_parser(["--dataset", "my_own"]).augment == "none"
    plain = args_parser(["--dataset", "cifar", "--method", "fedavg"])
    assert (plain.augment, plain.lr, plain.kl_weight, plain.eval_samples) == ("flip", 3e-3, 0.0, 1)
    rates = {m: args_parser(["--method", m, "--partition", "iid"]).lr for m in ("nbafl", "dropout", "local")}
    assert rates == {"nbafl": 3e-3, "dropout": 3e-3, "local": 1e-3}
    prox = [args_parser(["--method", "nbafl_prox", "--partition", p]).prox for p in ("shards", "dirichlet", "iid")]
    assert prox == [1, 0.1, 0]
    assert args_parser(["--method", "client_dp", "--num_users", "100"]).delta == pytest.approx(100**-1.1)
    assert args_parser(["--method", "client_dp", "--num_users", "2"]).delta == 0.1


def test_a_preset_sets_defaults_and_flags_win():
    """PFLlib's -nc, train_ratio, -gr, -jr, -ls, -lbs and -lr, plain SGD, and no augmentation."""
    args = args_parser(["--preset", "pfllib"])
    assert (args.num_users, args.test_share, args.rounds, args.frac) == (20, 0.25, 2000, 1)
    assert (args.local_ep, args.local_bs, args.lr, args.optimizer) == (1, 10, 0.005, "sgd")
    assert (args.lr_decay, args.lr_warmup, args.momentum, args.augment) == (0, 0, 0, "none")
    assert (args.dataset, args.partition, args.classes_per_client) == ("mnist", "pathological", 2)
    assert (args.method, args.preset) == ("rve_pfl", "pfllib")
    line = "--lr 0.1 --preset pfllib --rounds 3 --dataset cifar --augment flip --test_share 0.1"
    args = args_parser(line.split())
    assert (args.lr, args.rounds, args.augment, args.test_share, args.num_users) == (0.1, 3, "flip", 0.1, 20)
    args = args_parser(["--preset", "pfllib", "--local_steps", "5", "--keep_split"])   # they leave two unread
    assert (args.local_ep, args.local_steps, args.test_share) == (None, 5, 0.1)
    assert args_parser([]).num_users == 10 and args_parser([]).preset is None   # nothing is left of it
    assert all(args_parser(["--preset", "pfllib", "--method", name]).lr == 0.005 for name in METHODS)


def test_help_states_the_readers_of_an_option_and_its_default():
    text = " ".join(make_parser().format_help().split())
    assert ("[beta] (rve_pfl, local, fedsr, rve_pfl_trunk; default: 0.001 with fedsr, else 1e-05; "
            "1.0 with --prior class; 1.0 with --prior categorical)") in text
    assert "None" not in text
    assert "(all but local, local_cnn; default: threat_aware with rve_pfl, else mean)" in text
    assert "(nbafl, nbafl_prox; default: 1)" in text and "CEB" in text


def test_help_shows_defaults_as_they_are_typed():
    parser = parsing.Parser("any.py", "any")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12], help="of the runs")
    parser.add_argument("--kinds", nargs="+", choices=("a", "b"), default=["a", "b"], help="of attacks")
    for name, default in (("match", ""), ("rounds", []), ("dry", False), ("lr", 0.5)):
        parser.add_argument(f"--{name}", default=default, help=name)
    text = " ".join(parser.format_help().split())
    assert "of the runs (default: 11 12)" in text and "of attacks (default: all)" in text
    assert text.count("default") == 3 and "lr (default: 0.5)" in text


def test_documented_flags_exist():
    parsers = (make_parser(), mi_attack.make_parser(), mi_attack.make_parser(["--model"]),
               membership.make_parser(), report.make_parser())
    declared = {flag for parser in parsers for a in parser._actions for flag in a.option_strings}
    assert {f"--{name}" for name in parsing.SYNONYMS.values()} <= declared
    text = "".join(path.read_text() for path in (
        ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md", ROOT / "docs" / "options.md"))
    text = re.sub(r"pip install[^\n]*|python -m venv[^\n]*|torchrun [^\n]*RVE-PFL.py", "", text)
    text = re.sub(r"experiments/\w+\.py(?:\\\n|[^`\n])*", "", text)   # with options of their own
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z_]+", text))
    assert len(flags) > 5 and flags <= declared, flags - declared


def test_the_table_of_defaults_is_that_of_the_rows():
    """The page docs/options.md lists the defaults that depend on the method, the partition or the data set."""
    settings = [(data, partition) for data in ("mnist", "cifar") for partition in ("shards", "dirichlet", "iid")]
    lines = []
    for option in (methods.AUGMENT, methods.HEAD_LR, methods.LR, methods.PRIVATE_EP, methods.PROX):
        groups = {}
        for name in readers(option, METHODS):
            values = tuple(METHODS[name].default(option, *setting) for setting in settings)
            groups.setdefault(values, []).append(f"`{name}`")
        lines += [f"| `--{option.name}` | {', '.join(names)} | {' | '.join(map(str, values))} |"
                  for values, names in groups.items()]
    page = (ROOT / "docs" / "options.md").read_text()
    assert page.split("| --- |\n")[1].split("<!-- end -->")[0].splitlines() == lines, "\n".join(lines)
