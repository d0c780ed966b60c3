"""Schemas of the operators for an installation without compiled ones; as in csrc/register.cpp."""

SCHEMAS = {
    "psroi_pool": "(Tensor maps, Tensor rois, float spatial_scale, int group_size, "
    "int pooled_size) -> Tensor",
    "psroi_pool_backward": "(Tensor grad, Tensor rois, float spatial_scale, int group_size, "
    "SymInt[] maps_shape) -> Tensor",
    "fcis_head": "(Tensor maps, Tensor rois, Tensor? classes, float spatial_scale, "
    "int group_size, int pooled_size) -> (Tensor scores, Tensor logits, Tensor classes)",
    "fcis_head_backward": "(Tensor grad_scores, Tensor grad_logits, Tensor maps, Tensor rois, "
    "Tensor classes, float spatial_scale, int group_size, int pooled_size) -> Tensor",
    "assemble_instances": "(Tensor maps, Tensor? windows, int parts, int size, float fill) "
    "-> Tensor",
    "assemble_instances_backward": "(Tensor grad, Tensor? windows, int parts, "
    "SymInt[] maps_shape) -> Tensor",
    "nms_per_class": "(Tensor boxes, Tensor scores, float iou_threshold, float score_threshold, "
    "int max_kept) -> Tensor",
    "average_masks": "(Tensor boxes, Tensor masks, Tensor weights, float mask_threshold, "
    "int height, int width, bool from_image) -> (Tensor boxes, Tensor masks)",
    "assemble_masks": "(Tensor prototypes, Tensor coefficients, Tensor boxes, SymInt height, "
    "SymInt width) -> Tensor",
    "shift_seeds": "(Tensor embeddings, Tensor seeds, float bandwidth, int max_iterations, "
    "float tolerance) -> (Tensor modes, Tensor counts)",
    "nearest_centres": "(Tensor embeddings, Tensor centres, float radius) -> Tensor",
    "peel_clusters": "(Tensor embeddings, Tensor bins, float bandwidth, int max_iterations, "
    "float tolerance, int min_points, int max_clusters) -> (Tensor labels, Tensor centres)",
    "decode_lines": "(Tensor labels, Tensor semantic, bool widened) -> Tensor",
    "group_lines": "(Tensor pairs, Tensor touches) -> Tensor",
    "roi_align": "(Tensor[] maps, Tensor rois, Tensor? levels, float[] scales, int height, "
    "int width, int sampling_ratio, bool aligned) -> Tensor",
    "roi_align_backward": "(Tensor grad, Tensor rois, Tensor? levels, float[] scales, "
    "SymInt[] heights, SymInt[] widths, SymInt images, int sampling_ratio, bool aligned, "
    "bool channels_last) -> Tensor[]",
    "fast_nms": "(Tensor boxes, Tensor scores, float iou_threshold, int top_k, float min_score) "
    "-> (Tensor rows, Tensor survives)",
}
"""Name of an operator → its arguments and results."""
