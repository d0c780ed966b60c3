"""Memory and time that an evaluation takes beside the model; needs /proc (Linux).

The network has random weights, or those of MODEL.WEIGHTS, and keeps as many instances of any score
as it may.  Time is that of the processor, all threads together.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog

import instseg
from instseg.benchmark.rows import forget_peak, in_fresh_process, peak_resident
from instseg.projects import projects
from instseg.training.trainer import Trainer

ANY = [word for project in projects() for word in project.any_score]


def measure(config: str, dataset: str, overrides: Sequence[str], count: int) -> None:
    """Evaluate on the first ``count`` images of a data set, and print a line."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*ANY, "DATASETS.TEST", (dataset,), "OUTPUT_DIR", folder]
        cfg = instseg.load_cfg(config, [*words, "DATALOADER.NUM_WORKERS", 0, *overrides])
        records = list(DatasetCatalog.get(dataset))[:count]
        DatasetCatalog.data[dataset] = lambda: records
        torch.manual_seed(0)
        model = Trainer.build_model(cfg).eval()
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        forget_peak()
        before, start = peak_resident(), time.process_time()
        result = Trainer.test(cfg, model)
        seconds, peak = time.process_time() - start, peak_resident()
    mebibytes = 0 if before is None or peak is None else peak - before
    numbers = ", ".join(
        f"{key} {value['AP']:.3f}" for key, value in result.items() if "AP" in value
    )
    parts = (config, len(records), f"{mebibytes:.0f} MiB", f"{seconds:.1f} s", numbers)
    print(f"| {' | '.join(map(str, parts))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default="mask_rcnn/mask_rcnn_nuclei.yaml", metavar="FILE")
    parser.add_argument("--dataset", default="nuclei_val", metavar="NAME")
    parser.add_argument("--images", type=int, default=20, metavar="N")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE")
    args = parser.parse_args()
    print("| configuration | images | memory | time | result |\n|---|---|---|---|---|", flush=True)
    in_fresh_process(measure, args.config_file, args.dataset, args.overrides, args.images)


if __name__ == "__main__":
    main()
