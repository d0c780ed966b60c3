"""Ship the weights of a training: round them to half precision, measure them, list them.

    python tools/zoo_add.py output/a/model_final.pth --name a_nuclei --minutes 66
        --config-file a/a_nuclei.yaml [KEY VALUE ...]
    python tools/zoo_add.py --measure a_nuclei [NAME ...]
    python tools/zoo_add.py output/b/model_final.pth --other-seed-of a_nuclei --command '...'

The first command writes ``zoo/a_nuclei.safetensors`` and its entry in ``zoo/manifest.json``, in
place of an earlier one.  The second one measures shipped models anew.  The third one measures a
training with another seed, of which only the numbers are shipped.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from instseg import shipped
from instseg.benchmark.peak import processor
from instseg.benchmark.shipped import CHECK_IMAGES, check_shipped, evaluate_shipped
from instseg.checkpoint import read_weights, save_safetensors
from instseg.checkpoint.half import Halved, halve
from instseg.config.nodes import load_cfg
from instseg.console import Parser
from instseg.errors import CheckpointError, ConfigError, InstsegError, one_line
from instseg.files import atomic_write
from instseg.inference.predictor import Predictor
from instseg.shipped import Measurement, ShippedModel

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
BESIDE_WEIGHTS = ("categories", "class_names", "largest_instance")
"""Entries of a checkpoint that prediction uses."""
LICENCES = {"nuclei_train": "CC0 1.0 (BBBC038v1)", "shapes": "Apache-2.0 (drawn by instseg)"}
"""Beginning of the name of a data set -> its licence."""


@dataclass(frozen=True)
class Origin:
    """Where weights come from; see :class:`instseg.shipped.ShippedModel`."""

    name: str
    system: str
    config: str
    overrides: tuple[str, ...]
    minutes: float
    trunk: str
    command: str
    licence: str
    machine: str
    commit: str


def limit_of(name: str) -> int:
    """Largest size in bytes of the weights of a model."""
    return (3 if name.endswith("_shapes") else 6) * MIB


def add(checkpoint: Path, origin: Origin) -> tuple[ShippedModel, Halved]:
    """Write the weights and the entry, without measurements; returns the entry too.

    Raises:
        CheckpointError: the weights do not fit the model, half precision, or the largest size.
    """
    content = read_weights(checkpoint)
    halved = halve(content["model"])
    beside = {key: content[key] for key in BESIDE_WEIGHTS if content.get(key)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"{origin.name}.safetensors")
        save_safetensors(file, halved.weights, beside)
        data = file.read_bytes()
        if len(data) > limit_of(origin.name):
            raise CheckpointError(
                f"{origin.name} takes {len(data) / MIB:.2f} MiB in half precision; expected at "
                f"most {limit_of(origin.name) // MIB}: train a narrower network"
            )
        cfg = load_cfg(origin.config, [*origin.overrides, "MODEL.DEVICE", "cpu"])
        predictor = Predictor(cfg, file)  # refuses weights that do not fit
        entry = ShippedModel(
            name=origin.name,
            system=origin.system,
            file=file.name,
            sha256=hashlib.sha256(data).hexdigest(),
            size=len(data),
            config=origin.config,
            overrides=origin.overrides,
            data=", ".join(cfg.DATASETS.TRAIN),
            licence=origin.licence or licence_of(cfg.DATASETS.TRAIN),
            commit=origin.commit or commit(),
            command=origin.command or training_command(origin),
            minutes=origin.minutes,
            machine=origin.machine or machine(),
            classes=predictor.categories.names,
            trunk=origin.trunk,
            parameters=sum(p.numel() for p in predictor.model.parameters()),
            measurements=(),
            other_seeds=(),
            check={},
            check_images=CHECK_IMAGES,
        )
    atomic_write(shipped.zoo_folder() / entry.file, lambda stream: stream.write(data))
    list_entry(entry)
    return entry, halved


def list_entry(entry: ShippedModel) -> None:
    """Put an entry into the manifest, in place of one with its name."""
    models = {model.name: model for model in shipped.shipped_models()} | {entry.name: entry}
    shipped.write_manifest(shipped.zoo_folder(), sorted(models.values(), key=lambda m: m.name))


def measure(name: str) -> ShippedModel:
    """Measure a shipped model and write the numbers into its entry."""
    entry = shipped.shipped_model(name)
    check = check_shipped(entry.address, entry.check_images)
    time = Measurement(f"python tools/zoo_add.py --measure {name}", {"ms": round(check["ms"], 1)})
    evaluation = Measurement(evaluation_command(entry.address), evaluate_shipped(entry.address))
    entry = replace(
        entry,
        measurements=(evaluation, time),
        check={key: value for key, value in check.items() if key != "ms"},
    )
    list_entry(entry)
    return entry


def add_other_seed(checkpoint: Path, name: str, command: str) -> ShippedModel:
    """Measure the weights of a training with another seed, rounded alike; list the numbers."""
    entry = shipped.shipped_model(name)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "other.safetensors")
        content = read_weights(checkpoint)
        save_safetensors(file, halve(content["model"]).weights)
        values = evaluate_shipped(entry.address, ["MODEL.WEIGHTS", str(file)])
    entry = replace(entry, other_seeds=(*entry.other_seeds, Measurement(command, values)))
    list_entry(entry)
    return entry


def training_command(origin: Origin) -> str:
    words = ["python train_net.py --config-file", f"configs/{origin.config}", *origin.overrides]
    if origin.trunk and "MODEL.WEIGHTS" not in origin.overrides:
        words += ["MODEL.WEIGHTS", f"{shipped.SCHEME}{origin.trunk}"]
    return " ".join(words)


def evaluation_command(address: str) -> str:
    return f"python train_net.py --config-file {address} --eval-only OUTPUT_DIR output/zoo"


def licence_of(names: Sequence[str]) -> str:
    """The licence of data sets of ours.

    Raises:
        ConfigError: there is no single known one.
    """
    known = {licence for name in names for key, licence in LICENCES.items() if name.startswith(key)}
    if len(known) != 1:
        raise ConfigError(f"the licence of {', '.join(names)} is not known; pass --licence TEXT")
    return known.pop()


def commit() -> str:
    """The commit of the checkout."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError("this is no checkout of git; pass --commit HASH")
    return done.stdout.strip()


def machine() -> str:
    """Processor and number of usable cores of this machine."""
    return f"{len(os.sched_getaffinity(0))} cores of {processor()}"


def parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("words", nargs="*", metavar="FILE [KEY VALUE ...]", help="checkpoint, then overrides")
    add("--measure", nargs="+", default=[], metavar="NAME", help="measure these models only")
    add("--other-seed-of", metavar="NAME", help="list the numbers alone, for the spread")
    add("--name", help="of the model, such as PAPER_nuclei")
    add("--system", help="name of its project (default: the folder of the configuration)")
    add("--config-file", metavar="NAME", help="in configs/")
    add("--minutes", type=float, help="wall time of the training")
    add("--trunk", default="", metavar="NAME", help="model that the training started from")
    add("--command", default="", help="that trained it (default: train_net.py with the above)")
    add("--licence", default="", help="of the data (default: that of nuclei and shapes)")
    add("--machine", default="", help="of the training (default: this one)")
    add("--commit", default="", help="of the training (default: that of this checkout)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run(parser().parse_args(argv))
    except InstsegError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    if args.measure:
        for name in args.measure:
            tell(measure(name))
        return
    if not args.words:
        raise ConfigError("no checkpoint; type: tools/zoo_add.py FILE --name NAME ...")
    checkpoint, *overrides = args.words
    if args.other_seed_of:
        if not args.command:
            raise ConfigError("--other-seed-of needs --command TEXT, the training's")
        tell(add_other_seed(Path(checkpoint), args.other_seed_of, args.command))
        return
    needed = {"name": args.name, "config-file": args.config_file, "minutes": args.minutes}
    if missing := [f"--{key}" for key, value in needed.items() if value is None]:
        raise ConfigError(f"{', '.join(missing)} missing; see --help")
    config = args.config_file.removeprefix("configs/")
    origin = Origin(
        name=args.name,
        system=args.system or Path(config).parent.name,
        config=config,
        overrides=tuple(overrides),
        minutes=args.minutes,
        trunk=args.trunk,
        command=args.command,
        licence=args.licence,
        machine=args.machine,
        commit=args.commit,
    )
    entry, halved = add(Path(checkpoint), origin)
    print(f"{entry.file}: {entry.size / MIB:.2f} MiB, {entry.parameters} parameters")
    print(f"largest change: {halved.change:.2g} of the largest value of {halved.changed or '-'}")
    print(f"kept in single precision: {', '.join(halved.kept) or 'nothing'}")
    tell(measure(entry.name))


def tell(entry: ShippedModel) -> None:
    for part in (*entry.measurements, *entry.other_seeds):
        values = ", ".join(f"{name} {value:.1f}" for name, value in part.values.items())
        print(f"{entry.name}: {values}   ({part.command})")


if __name__ == "__main__":
    sys.exit(main())
