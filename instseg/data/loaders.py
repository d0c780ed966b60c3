"""Build the loaders of data sets for a configuration."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.utils import comm
from torch.utils.data import DataLoader

from instseg.data.build import check_files, check_records, training_records
from instseg.data.dataset import DataSet
from instseg.data.mappers import build_test_mapper, build_train_mapper
from instseg.data.proposal_files import check_proposal_files, with_proposals
from instseg.data.records import Record
from instseg.data.samples import build_sample_loader
from instseg.data.sampling import build_sampler
from instseg.data.semantic import with_semantic_files
from instseg.data.video_mapper import check_video
from instseg.errors import ConfigError
from instseg.processes import end_with_starter

Loader = Iterable[list[dict[str, Any]]]
_BATCHES_AHEAD = 2


def build_train_loader(cfg: CfgNode, datasets: Sequence[DataSet]) -> Loader:
    """Endless batches of ``datasets``, those of ``DATASETS.TRAIN``.

    Raises:
        ConfigError, DatasetError: a problem that would stop the training later.
    """
    if not datasets:
        raise ConfigError("DATASETS.TRAIN is empty; name a data set, e.g. ('shapes_train',)")
    records = _annotated_records(
        cfg,
        datasets,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        proposals=("DATASETS.PROPOSAL_FILES_TRAIN", cfg.DATASETS.PROPOSAL_FILES_TRAIN),
    )
    if cfg.INPUT.SAMPLES:
        if cfg.TEST.VAL_LOSS_PERIOD > 0:
            raise ConfigError(
                "TEST.VAL_LOSS_PERIOD needs losses of whole images, this model trains on "
                f"INPUT.SAMPLES {cfg.INPUT.SAMPLES}; set TEST.VAL_LOSS_PERIOD 0"
            )
        return _ending_with_this_process(build_sample_loader(cfg, records))
    loader: Loader = build_detection_train_loader(
        cfg,
        dataset=records,
        mapper=build_train_mapper(cfg, augment=True),
        sampler=build_sampler(cfg, records),
        **_prefetching(cfg),
    )
    return _ending_with_this_process(loader)


def _ending_with_this_process(loader: Loader) -> Loader:
    """The same loader, whose processes end with this one even if it is killed."""
    batches = loader if isinstance(loader, DataLoader) else getattr(loader, "dataset", None)
    if isinstance(batches, DataLoader):  # Detectron2 groups the images of some loaders
        batches.worker_init_fn = partial(_begin, batches.worker_init_fn)
    return loader


def _begin(then: Callable[[int], None] | None, number: int) -> None:
    end_with_starter()
    if then is not None:
        then(number)


def _prefetching(cfg: CfgNode) -> dict[str, Any]:
    """Options of a torch ``DataLoader`` of training images by which no step waits for data.

    The order of images does not depend on them.
    """
    options: dict[str, Any] = {"pin_memory": cfg.MODEL.DEVICE.startswith("cuda")}
    workers = cfg.DATALOADER.NUM_WORKERS
    if workers and cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        # Workers then send images and no batches; torch would have each prepare two of them.
        images = _BATCHES_AHEAD * cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
        options["prefetch_factor"] = max(2, -(-images // workers))
    return options


def build_test_loader(cfg: CfgNode, dataset: DataSet) -> Loader:
    """One pass over ``dataset``, which is one of ``DATASETS.TEST``.

    Asks for masks as ``TEST.MASKS`` says.  Adds the proposals, and the ground truth
    (``INPUT.TRUTH_TEST``) and semantic maps (``INPUT.SEMANTIC_ROOT``) if the configuration asks for
    them.

    Raises:
        ConfigError, DatasetError: images or proposals have no file.
    """
    records: Sequence[Record] = dataset.records
    if cfg.MODEL.LOAD_PROPOSALS:
        key, files = "DATASETS.PROPOSAL_FILES_TEST", cfg.DATASETS.PROPOSAL_FILES_TEST
        check_proposal_files(key, files, cfg.DATASETS.TEST)
    check_files(dataset.name, records)
    if cfg.MODEL.LOAD_PROPOSALS:
        records = with_proposals(records, files[list(cfg.DATASETS.TEST).index(dataset.name)])
    records = with_semantic_files(cfg, records)
    records = [{**record, "masks": cfg.TEST.MASKS} for record in records]
    with_annotations = cfg.INPUT.TRUTH_TEST
    mapper = build_train_mapper(cfg, augment=False) if with_annotations else build_test_mapper(cfg)
    return _once(cfg, records, mapper)


def loss_records(cfg: CfgNode, datasets: Sequence[DataSet]) -> list[Record]:
    """Records of ``DATASETS.TEST``, checked, to compute losses on."""
    files = cfg.DATASETS.PROPOSAL_FILES_TEST
    proposals = "DATASETS.PROPOSAL_FILES_TEST", files
    return _annotated_records(cfg, datasets, filter_empty=False, proposals=proposals)


def build_loss_loader(cfg: CfgNode, records: Sequence[Record]) -> Loader:
    """One pass over :func:`loss_records`, with annotations."""
    return _once(cfg, records, build_train_mapper(cfg, augment=False))


def _once(cfg: CfgNode, records: Sequence[Record], mapper: Any) -> Loader:
    loader: Loader = build_detection_test_loader(
        list(records), mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS
    )
    return _ending_with_this_process(loader)


def _annotated_records(
    cfg: CfgNode,
    datasets: Sequence[DataSet],
    *,
    filter_empty: bool,
    proposals: tuple[str, Sequence[str]],
) -> list[Record]:
    """Checked records of ``datasets`` to compute losses on.

    Args:
        filter_empty: leave out images without instances.
        proposals: the key that names the proposal files, and its value; for
            ``MODEL.LOAD_PROPOSALS``.
    """
    names = [dataset.name for dataset in datasets]
    if cfg.MODEL.LOAD_PROPOSALS:
        check_proposal_files(*proposals, names)
        records = [
            record
            for dataset, file in zip(datasets, proposals[1], strict=True)
            for record in with_proposals(
                training_records([dataset], filter_empty=filter_empty), file
            )
        ]
    else:
        records = training_records(datasets, filter_empty=filter_empty)
    check_records(cfg, ", ".join(names), records)
    check_video(cfg, ", ".join(names), records)
    return with_semantic_files(cfg, records)
