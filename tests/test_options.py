"""Options: ranges, contradictions, errors of one line; each is read, and each flag in the README is real."""
import argparse
import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

import options
import parsing
import report
from attack import membership, mi_attack
from engine.stacks import draws_of
from methods import METHODS, PRIOR
from options import args_parser, make_parser, of_rows, readers
from server.robust import RULES

BAD = [
    ("--num_users 0", "--num_users"), ("--num_users -3", "--num_users"), ("--num_users two", "num_users"),
    ("--rounds 0", "--rounds"), ("--frac 0", "--frac"), ("--frac 1.5", "--frac"), ("--frac nan", "--frac"),
    ("--local_ep 0", "--local_ep"), ("--local_bs 0", "--local_bs"), ("--lr 0", "--lr"),
    ("--lr inf", "--lr"), ("--lr -1", "--lr"), ("--lr_decay -1", "--lr_decay"),
    ("--lr_warmup 2", "--lr_warmup"), ("--head_lr -1", "--head_lr"), ("--stack 0", "--stack"),
    ("--epsilon 3", "method rve_pfl does not read it"), ("--method nbafl --clip 0", "--clip"),
    ("--method nbafl --noise_multiplier 1", "--noise_multiplier"), ("--method fedavg --clip 1", "--clip"),
    ("--method client_dp --epsilon 1 --noise_multiplier 1", "--noise_multiplier"),
    ("--method client_dp --exposures 2", "--exposures"), ("--method nbafl --delta 0.9", "--delta"),
    ("--method nbafl --epsilon 0", "--epsilon"),
    ("--kl_weight -1", "--kl_weight"), ("--kl_warmup -1", "--kl_warmup"),
    ("--eval_samples 0", "--eval_samples"),
    ("--init_logvar 99", "--init_logvar"), ("--eval_every 0", "--eval_every"), ("--seed -1", "--seed"),
    ("--classes_per_client 0", "--classes_per_client"), ("--alpha 0 --partition dirichlet", "--alpha"),
    ("--checkpoint_seconds -1", "--checkpoint_seconds"), ("--rendezvous_seconds -1", "--rendezvous_seconds"),
    ("--save_rounds 0", "--save_rounds"),
    ("--save_rounds 101", "--save_rounds"), ("--optimizer sgd --momentum 1", "--momentum"),
    ("--momentum 0.5", "--momentum"), ("--method best", "--method"), ("--partition rounds", "--partition"),
    ("--precision fp8", "--precision"), ("--optimizer lion", "--optimizer"),
    ("--augment cutout", "--augment"), ("--device tpu", "--device"),
    ("--dataset ../etc/passwd", "--dataset"), ("--run_name a/b", "--run_name"),
    ("--run_name ..", "--run_name"),
    ("--alpha 1", "--alpha"), ("--classes_per_client 2 --partition iid", "--classes_per_client"),
    ("--method fedavg --kl_weight 1e-4", "--kl_weight"),
    ("--method lg_fedavg --init_logvar 0", "--init_logvar"),
    ("--method fedavg --head_lr 0.5", "--head_lr"), ("--resume --overwrite", "--resume"),
    ("--resplit --validate", "--resplit"), ("--num_user 3", "--num_users"), ("extra", "extra"),
]


@pytest.mark.parametrize("line, named", BAD, ids=[line for line, _ in BAD])
def test_bad_option_is_one_line_and_status_2(line, named, capsys):
    with pytest.raises(SystemExit) as stop:
        args_parser(line.split())
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1 and named in lines[0], lines


@pytest.mark.parametrize("line", [
    "--prior_apart 0.3|--prior normal", "--method local --prior_apart 0.5|--prior normal",
    "--kl_weight 0 --kl_warmup 3|--kl_weight 0", "--method ressfl --stack 4|--method ressfl",
    "--method nbafl_prox --stack 2|--method nbafl_prox", "--prior class --stack 2|--prior class",
    "--momentum 0.5|--optimizer adam", "--alpha 1 --partition iid|--partition iid",
    "--classes_per_client 3 --partition dirichlet|--partition dirichlet",
    "--malicious_behaviour passive|--malicious_frac 0", "--clip_noise 0.1|--aggregation threat_aware",
    "--aggregation median --tolerate 0.1|--aggregation median", "--method local --aggregation mean|--method local",
    "--method fedavg --full_sharing_rounds 1|--method fedavg", "--method nbafl --prox 1|--method nbafl",
    "--encoders_from a --init_logvar -4|--encoders_from a", "--encoders_from a --kl_weight 1|--encoders_from a",
    "--encoders_from a --kl_warmup 2|--encoders_from a", "--method client_dp --loss_weight 1|--method client_dp",
    "--prior class --encoders_from a --prior_apart 0.3|--encoders_from a",
    "--unequal --partition file|--partition file",
    "--partition file --alpha 1|--partition file"])
def test_what_nothing_reads_is_refused_with_its_reason(line, capsys):
    words, setting = line.split("|")
    with pytest.raises(SystemExit, match="2"):
        args_parser(words.split())
    said, = capsys.readouterr().err.splitlines()
    assert f"{setting}" in said and "does not read it; leave it out" in said
    named = said.split("error: ")[1].split(":")[0].split()[0]   # the option, and not the setting
    assert named in words and not setting.startswith(f"{named} ")


@pytest.mark.parametrize("words", [
    "--prior class --prior_apart 0.3 --kl_warmup 2", "--stack 1 --prior class", "--method ressfl --stack 1",
    "--optimizer sgd --momentum 0.5", "--momentum 0", "--malicious_frac 0.1 --malicious_behaviour passive",
    "--kl_weight 0 --kl_warmup 0", "--encoders_from a --lr 0.1 --prior class", "--method fedavg --stack 4",
    "--aggregation norm_clipping --clip_noise 0.1", "--aggregation krum --tolerate 0.1"])
def test_what_something_reads_is_not(words):
    args = vars(args_parser(words.split()))
    for flag, value in zip(words.split()[::2], words.split()[1::2], strict=True):
        assert str(args[flag[2:]]) in (value, f"{value}.0")


def test_what_is_not_given_has_its_own_default_or_that_of_no_reader():
    first, other = args_parser(["--malicious_frac", "0.5"]), args_parser(["--partition", "dirichlet"])
    assert (first.classes_per_client, first.alpha, first.malicious_behaviour) == (2, None, "label_flip")
    assert (other.classes_per_client, other.alpha, other.malicious_behaviour) == (None, 0.1, None)
    assert (first.momentum, args_parser(["--optimizer", "sgd"]).momentum, first.stack) == (0, 0, None)


@pytest.mark.parametrize("nobody, somebody, clients", [(0.05, 0.1, 10), (0.3, 0.34, 3)])
def test_a_share_of_clients_that_is_nobody_is_refused(nobody, somebody, clients, capsys):
    words = ["--num_users", str(clients), "--malicious_frac"]
    assert args_parser([*words, str(somebody)]).malicious_behaviour == "label_flip"
    with pytest.raises(SystemExit, match="2"):
        args_parser([*words, str(nobody)])
    assert f"--malicious_frac {nobody}: of --num_users {clients} that is nobody" in capsys.readouterr().err


@pytest.mark.parametrize("method, more", [(name, ()) for name in METHODS] + [
    (name, ("--prior", "class")) for name in readers(PRIOR, METHODS)])
def test_stack_is_refused_where_clients_are_never_stacked(method, more, place, driver):
    """As engine/clients.py decides it, of the trainer that the driver makes."""
    words = place.argv("--method", method, *more)
    trainer = driver.make_trainer(args_parser(words), driver.datasets.load("tiny", place.folder / "data"),
                                  driver.torch.device("cpu"))
    if trainer.method.loss is None and draws_of(trainer) is not None:
        args_parser([*words, "--stack", "3"])
    else:
        with pytest.raises(SystemExit, match="2"):
            args_parser([*words, "--stack", "3"])


def test_the_program_runs_in_a_thread_of_another(place):
    """Where no signal handler can be set: notebooks, web servers and schedulers of jobs do this."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(place.main, "--rounds", 1).result() == 0
    assert place.clients_csv()


def suggested(parser, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        parser.parse(words.split())
    line, = capsys.readouterr().err.splitlines()
    assert f"error: unknown argument {words.split()[0]}" in line
    return "".join(re.findall(r"did you mean (--\w+)\?", line))


@pytest.mark.parametrize("words, meant", [
    ("--learning_rate 0.1", "--lr"), ("--Learning-Rate=0.1", "--lr"), ("-lr 0.1", "--lr"),
    ("--batch-size 8", "--local_bs"), ("--num_clients 3", "--num_users"), ("--beta 1", "--kl_weight"),
    ("--gpu 0", "--device"), ("--num-users 3", "--num_users"), ("--result_dir x", "--results_dir"),
    ("--epoch 3", "--epochs"), ("--weight_decay 1", ""), ("--tolerable 1", "--tolerate"), ("--rate 1", ""),
    ("--verbose", ""), ("num_users", "")])
def test_an_unknown_flag_is_answered_by_what_it_means_or_not_at_all(words, meant, capsys):
    assert suggested(make_parser(), words, capsys) == meant


@pytest.mark.parametrize("words, meant", [("--epochs 3", "--train_epochs"), ("--clients_ 3", "--clients"),
                                          ("--batch_size 3", ""), ("--learning_rate 3", ""), ("--gpu 0", "")])
def test_only_options_of_the_program_at_hand_are_suggested(words, meant, capsys):
    assert suggested(mi_attack.make_parser(), f"{words} --run run", capsys) == meant


def test_synonyms_lead_to_real_options():
    parsers = (make_parser(), mi_attack.make_parser(), membership.make_parser())
    declared = {flag for parser in parsers for flag in parser._option_string_actions}
    assert {f"--{name}" for name in parsing.SYNONYMS.values()} <= declared


def test_an_edited_default_is_checked_too(monkeypatch, capsys):
    def edited():
        parser = make_parser()
        parser.set_defaults(num_users=0)
        return parser
    monkeypatch.setattr(options, "make_parser", edited)
    with pytest.raises(SystemExit):
        args_parser([])
    assert "--num_users 0" in capsys.readouterr().err


def test_defaults_are_the_papers():
    args = args_parser([])
    assert (args.dataset, args.partition, args.method) == ("mnist", "shards", "rve_pfl")
    assert (args.num_users, args.rounds, args.local_ep, args.local_bs) == (10, 100, 10, 256)
    assert (args.optimizer, args.lr, args.lr_decay, args.classes_per_client) == ("adam", 1e-3, 1e-3, 2)
    assert args.run_name == "mnist-shards-rve_pfl-seed1"
    assert args_parser(["--epochs", "7"]).rounds == 7   # the authors' name


def test_what_depends_on_the_data_set_is_filled_in():
    assert args_parser(["--dataset", "cifar"]).augment == "flip+shift"
    assert args_parser(["--dataset", "cifar", "--augment", "none"]).augment == "none"
    simple = args_parser(["--dataset", "cifar", "--method", "fedavg"])
    assert (simple.augment, simple.lr) == ("flip", 3e-3)
    own = args_parser(["--dataset", "my_own"])
    assert (own.augment, own.head_lr, own.kl_weight) == ("none", 0.1, 1e-5)
    plain = args_parser(["--method", "fedavg"])
    assert (plain.kl_weight, plain.init_logvar, plain.eval_samples, plain.head_lr) == (0.0, None, 1, 1.0)
    rates = [args_parser(["--method", "fedper", *given]).lr for given in ([], ["--lr", "0.1"])]
    assert (plain.lr, *rates) == (1e-3, 3e-3, 0.1)
    mixed = {m: args_parser(["--method", m, "--partition", "iid"]).lr for m in ("nbafl", "dropout", "local")}
    assert mixed == {"nbafl": 3e-3, "dropout": 3e-3, "local": 1e-3}
    near = [args_parser(["--method", "nbafl_prox", "--partition", p]).prox for p in ("shards", "dirichlet", "iid")]
    assert near == [1, 0.1, 0]


def test_help_says_who_reads_an_option_and_its_default():
    text = " ".join(make_parser().format_help().split())
    assert "[beta] (rve_pfl, local, rve_pfl_trunk; default: 1e-05)" in text
    assert "default: 8.0 with" not in text and "None" not in text
    assert "(all but local; default: threat with rve_pfl, else mean)" in text
    assert re.search(r"--exposures EXPOSURES how often NbAFL .* \(nbafl, nbafl_prox; default: 1\)", text)


def test_delta_depends_on_the_clients():
    assert args_parser(["--method", "client_dp", "--num_users", "100"]).delta == pytest.approx(100**-1.1)
    assert args_parser(["--method", "client_dp", "--num_users", "2"]).delta == 0.1


@pytest.mark.parametrize("method, option, value, said", [
    ("fedavg", "lr", -1.0, "--lr -1.0: must be between"), ("fedavg", "lr", "abc", "--lr abc: must be a number"),
    ("fedavg", "aggregation", "nosuch", "--aggregation nosuch: choose from"),
    ("nbafl", "aggregation", "threat_aware", "accounting")])
def test_a_rows_edited_default_is_checked_too(monkeypatch, capsys, method, option, value, said):
    row = METHODS[method]
    reads = {key: value if key.name == option else old for key, old in row.reads.items()}
    monkeypatch.setitem(METHODS, method, dataclasses.replace(row, reads=reads, by_dataset={}, by_partition={}))
    with pytest.raises(SystemExit, match="2"):
        args_parser(["--method", method])
    line, = capsys.readouterr().err.splitlines()
    assert said in line


def test_marked_protocols_have_marked_names():
    assert args_parser(["--resplit"]).run_name.endswith("-resplit")
    assert args_parser(["--validate"]).run_name.endswith("-validate")


def test_every_option_is_read(place, driver, monkeypatch):
    read = set()

    class Recording(argparse.Namespace):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    def recorded(argv):
        before = set(read)
        args = Recording(**vars(args_parser(argv)))
        read.clear()   # of what the parser itself looked at
        read.update(before)
        return args
    monkeypatch.setattr(driver, "arguments", recorded)

    class Dictionary(dict):   # what Run reads of config["options"]
        def __getitem__(self, name):
            read.add(name)
            return super().__getitem__(name)

        def get(self, name, default=None):
            read.add(name)
            return super().get(name, default)
    monkeypatch.setattr(driver, "vars", lambda args: Dictionary(args.__dict__), raising=False)
    assert place.main() == 0 == place.main("--resume")
    for option in of_rows(METHODS):   # one that only a method's own loss looks at
        if option.name not in read:
            assert place.main("--method", readers(option, METHODS)[0], "--overwrite") == 0
    for option in of_rows(RULES):
        if option.name not in read:
            assert place.main("--method", "fedavg", "--aggregation", readers(option, RULES)[0], "--overwrite") == 0
    assert set(make_parser().options) - read == set()


def test_documented_flags_exist():
    parsers = (make_parser(), mi_attack.make_parser(), membership.make_parser(), report.make_parser())
    declared = {flag for parser in parsers for a in parser._actions for flag in a.option_strings}
    text = "".join(path.read_text() for path in (
        ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md", *ROOT.glob("docs/*.md")))
    scripts = r"benchmarks/(\w+\.py)((?:\\\n|[^`\n])*)"   # which may have options of their own
    for script, words in re.findall(scripts, text):
        own = set(re.findall(r'"(--[a-z][a-z_]+)"', (ROOT / "benchmarks" / script).read_text()))
        assert set(re.findall(r"--[a-z][a-z_]+", words)) <= own | declared, (script, words)
    text = re.sub(scripts, "", text)
    ours = re.sub(r"pip install[^\n]*|python -m venv[^\n]*|torchrun [^\n]*RVE-PFL.py", "", text)
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z_]+", ours))
    assert len(flags) > 5 and flags <= declared, flags - declared
