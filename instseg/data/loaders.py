"""Build the loaders of data sets for a configuration."""

from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader

from instseg.data.build import check_files, check_records, training_records
from instseg.data.dataset import DataSet
from instseg.data.mappers import build_test_mapper, build_train_mapper
from instseg.data.proposal_files import check_proposal_files, with_proposals
from instseg.data.records import Record
from instseg.data.samples import build_sample_loader
from instseg.data.semantic import with_semantic_files
from instseg.data.video_mapper import check_video
from instseg.errors import ConfigError

Loader = Iterable[list[dict[str, Any]]]


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
        return build_sample_loader(cfg, records)
    loader: Loader = build_detection_train_loader(
        cfg, dataset=records, mapper=build_train_mapper(cfg, augment=True)
    )
    return loader


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
    return loader


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
