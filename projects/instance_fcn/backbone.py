"""ResNets with small cells, by the hole algorithm."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock, ResNet

_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
# Detectron2's ResNet can only dilate res5, so its cells have at least sixteen pixels.
_STRIDES = (1, 2, 1, 1)
_DILATIONS = (1, 1, 2, 4)


@BACKBONE_REGISTRY.register()
def build_stride8_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """ResNet by ``cfg.MODEL.RESNETS``, res4 and res5 dilated instead of strided (hole algorithm).

    Parameters have the names and shapes of Detectron2's ResNet, so its ImageNet weights fit.
    """
    node = cfg.MODEL.RESNETS
    stem = BasicStem(input_shape.channels, node.STEM_OUT_CHANNELS, norm=node.NORM)
    stages = []
    channels = node.STEM_OUT_CHANNELS
    for index, blocks in enumerate(_BLOCKS[node.DEPTH]):
        outputs = node.RES2_OUT_CHANNELS * 2**index
        stages.append(
            ResNet.make_stage(
                BottleneckBlock,
                blocks,
                stride_per_block=[_STRIDES[index]] + [1] * (blocks - 1),
                in_channels=channels,
                out_channels=outputs,
                bottleneck_channels=node.NUM_GROUPS * node.WIDTH_PER_GROUP * 2**index,
                num_groups=node.NUM_GROUPS,
                norm=node.NORM,
                stride_in_1x1=node.STRIDE_IN_1X1,
                dilation=_DILATIONS[index],
            )
        )
        channels = outputs
    return ResNet(
        stem, stages, out_features=node.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT
    )
