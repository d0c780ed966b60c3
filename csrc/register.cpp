// Schemas of the operators torch.ops.instseg.*, and the Python module that loads them.
// instseg/ops/<operator>.py says what each operator does.

#include <Python.h>
#include <torch/library.h>
#include <torch/version.h>

#ifdef INSTSEG_WITH_CUDA
#include "can_run.h"
#endif

TORCH_LIBRARY(instseg, m) {
  m.def(
      "psroi_pool(Tensor maps, Tensor rois, float spatial_scale, int group_size, int pooled_size) "
      "-> Tensor");
  m.def(
      "psroi_pool_backward(Tensor grad, Tensor rois, float spatial_scale, int group_size, "
      "SymInt[] maps_shape) -> Tensor");
  m.def(
      "fcis_head(Tensor maps, Tensor rois, Tensor? classes, float spatial_scale, int group_size, "
      "int pooled_size) -> (Tensor scores, Tensor logits, Tensor classes)");
  m.def(
      "fcis_head_backward(Tensor grad_scores, Tensor grad_logits, Tensor maps, Tensor rois, "
      "Tensor classes, float spatial_scale, int group_size, int pooled_size) -> Tensor");
  m.def(
      "assemble_instances(Tensor maps, Tensor? windows, int parts, int size, float fill) "
      "-> Tensor");
  m.def(
      "assemble_instances_backward(Tensor grad, Tensor? windows, int parts, SymInt[] maps_shape) "
      "-> Tensor");
  m.def(
      "nms_per_class(Tensor boxes, Tensor scores, float iou_threshold, float score_threshold, "
      "int max_kept) -> Tensor");
  m.def(
      "average_masks(Tensor boxes, Tensor masks, Tensor weights, float mask_threshold, int height, "
      "int width, bool from_image) -> (Tensor boxes, Tensor masks)");
  m.def(
      "assemble_masks(Tensor prototypes, Tensor coefficients, Tensor boxes, SymInt height, "
      "SymInt width) -> Tensor");
  m.def(
      "shift_seeds(Tensor embeddings, Tensor seeds, float bandwidth, int max_iterations, "
      "float tolerance) -> (Tensor modes, Tensor counts)");
  m.def("nearest_centres(Tensor embeddings, Tensor centres, float radius) -> Tensor");
  m.def(
      "peel_clusters(Tensor embeddings, Tensor bins, float bandwidth, int max_iterations, "
      "float tolerance, int min_points, int max_clusters) -> (Tensor labels, Tensor centres)");
  m.def("decode_lines(Tensor labels, Tensor semantic, bool widened) -> Tensor");
  m.def("group_lines(Tensor pairs, Tensor touches) -> Tensor");
  m.def(
      "roi_align(Tensor[] maps, Tensor rois, Tensor? levels, float[] scales, int height, int "
      "width, "
      "int sampling_ratio, bool aligned) -> Tensor");
  m.def(
      "roi_align_backward(Tensor grad, Tensor rois, Tensor? levels, float[] scales, "
      "SymInt[] heights, SymInt[] widths, SymInt images, int sampling_ratio, bool aligned, "
      "bool channels_last) -> Tensor[]");
  m.def(
      "fast_nms(Tensor boxes, Tensor scores, float iou_threshold, int top_k, float min_score) "
      "-> (Tensor rows, Tensor survives)");
}

namespace {

// _C.can_run_on(device: int) -> bool
PyObject* can_run_on(PyObject* /*module*/, PyObject* device) {
  const long index = PyLong_AsLong(device);
  if (PyErr_Occurred() != nullptr) return nullptr;
#ifdef INSTSEG_WITH_CUDA
  return PyBool_FromLong(instseg::can_run_on(static_cast<int>(index)));
#else
  (void)index;
  Py_RETURN_FALSE;
#endif
}

PyMethodDef methods[] = {
    {"can_run_on", can_run_on, METH_O, "Whether the CUDA kernels run on the GPU of that index."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  PyModule_AddStringConstant(module, "torch_version", TORCH_VERSION);
#ifdef INSTSEG_WITH_CUDA
  PyModule_AddIntConstant(module, "with_cuda", 1);
#else
  PyModule_AddIntConstant(module, "with_cuda", 0);
#endif
  return module;
}
