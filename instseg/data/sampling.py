"""Draw training images by groups, so that the most frequent kind of image does not dominate.

``DATALOADER.SAMPLER_TRAIN GroupedTrainingSampler`` draws from a group of n images in proportion to
n^power.  Power 1 is the data as they are, 0 draws from all groups equally often.  A rare kind is
then seen more often, at the price of its images being repeated sooner, which is why values between
are usual: 1/2 for languages (Conneau and Lample, 2019, arXiv 1901.07291), and 1 / temperature in
general (Arivazhagan et al., 2019, arXiv 1907.05019).
"""

import logging
from collections import Counter
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data.samplers import RepeatFactorTrainingSampler
from torch import Tensor

from instseg.data.records import Record

logger = logging.getLogger(__name__)

GROUPED = "GroupedTrainingSampler"
"""Value of ``DATALOADER.SAMPLER_TRAIN``."""


def group_of(record: Record) -> str:
    """The key ``group`` of an image, in COCO's format a key of its entry; else its size."""
    return str(record.get("group", f"{record['width']} x {record['height']}"))


def repeat_factors(records: Sequence[Record], power: float) -> Tensor:
    """(N,) how often each image is drawn in a pass over the data, at least once.

    Args:
        power: see above.
    """
    counts = Counter(map(group_of, records))
    factors = torch.tensor([float(counts[group_of(record)]) ** (power - 1) for record in records])
    return factors / factors.min()


def group_factors(cfg: CfgNode, records: Sequence[Record]) -> Tensor | None:
    """:func:`repeat_factors` if the configuration asks for groups, else None; logs the groups."""
    if cfg.DATALOADER.SAMPLER_TRAIN != GROUPED:
        return None
    power = cfg.DATALOADER.GROUP_POWER
    counts = Counter(map(group_of, records)).most_common()
    total = sum(count**power for _, count in counts)
    shares = [f"{name}: {n} images, {n**power / total:.1%} of draws" for name, n in counts[:5]]
    more = f"; and {len(counts) - 5} more" if len(counts) > 5 else ""
    logger.info(f"{len(counts)} groups of training images: {'; '.join(shares)}{more}")
    return repeat_factors(records, power)


def build_sampler(cfg: CfgNode, records: Sequence[Record]) -> RepeatFactorTrainingSampler | None:
    """The sampler of groups; None leaves the choice to Detectron2.

    All processes draw from one order, which follows from ``SEED``; an image whose factor is not
    whole is repeated at random.
    """
    factors = group_factors(cfg, records)
    return None if factors is None else RepeatFactorTrainingSampler(factors)
