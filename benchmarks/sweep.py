"""Choose the noise's options on validation images: one line a setting, on the first few clients of a run.

    python benchmarks/sweep.py 3 --dataset cifar --rounds 3 --local_ep 5 -- "--kl_weight 0" "--kl_weight 1e-4"

The first argument is how many of the clients take part, in every round; then options of RVE-PFL.py common
to all settings, `--`, and the settings. A setting ends where a client's loss does not stay finite. A tenth of each
client's training images, held out, is evaluated (`--validate`); test images are never looked at.
"""
import sys
import time

import numpy as np
from _path import Script, count, guarded, load_driver

import datasets
from options import args_parser
from server.base import Round
from update import ClientState, Diverged
from utils import choose_device, keep_freed_memory

driver = load_driver()


def sweep(args, clients: int) -> None:
    """Train the first ``clients`` clients under one setting and print a line a round."""
    data = datasets.load(args.dataset, args.data_dir)
    splits = driver.deal(args, data)[1][:clients]
    trainer = driver.make_trainer(args, data, choose_device(args.device))
    head, private = trainer.shared_and_private(trainer.state())
    kept = [ClientState(private)] * clients
    server = driver.make_server(vars(args), min(len(own) for own, _ in splits))
    for r in range(1, args.rounds + 1):
        start, uploads, accuracy = time.monotonic(), {}, {"training": [], "trained": [], "deployed": []}
        for k, (own, validation) in enumerate(splits):
            uploads[k], kept[k], metrics = trainer.train(k, r, own, head, kept[k])
            accuracy["training"].append(metrics["accuracy"])
            accuracy["trained"].append(trainer.evaluate(k, r, validation, uploads[k], kept[k])["accuracy"])
        sizes = {k: len(own) for k, (own, _) in enumerate(splits)}
        head = server(Round(r, head, uploads, sizes)).head
        held_out = [trainer.evaluate(k, r, validation, head, kept[k])
                    for k, (_, validation) in enumerate(splits)]
        accuracy["deployed"] = [metrics["accuracy"] for metrics in held_out]
        print(f"  round {r}: ", *(f"{name} {np.mean(values):.4f} " for name, values in accuracy.items()),
              f"KL {np.mean([metrics['kl_nats'] for metrics in held_out]):.0f} nats  "
              f"{time.monotonic() - start:.0f} s", flush=True)


@guarded
def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = Script(__file__, __doc__)
    parser.add_argument("clients", type=count, help="how many clients take part; then options of RVE-PFL.py")
    args, common = parser.parse_known_args(argv[:cut])
    settings = [args_parser([*common, "--validate", *setting.split()]) for setting in argv[cut + 1:]]
    if not settings:
        parser.error('no setting to compare; give them after --, as in -- "--lr 1e-3" "--lr 3e-3"')
    if args.clients > settings[0].num_users:
        parser.error(f"{args.clients} clients take part of --num_users {settings[0].num_users}; give fewer")
    keep_freed_memory()
    for setting, options in zip(argv[cut + 1:], settings, strict=True):
        print(" ".join(common), setting, flush=True)
        try:
            sweep(options, args.clients)
        except Diverged as error:
            print(f"  {error}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
