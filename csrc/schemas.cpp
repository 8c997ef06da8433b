// The ops of the hot path. What each computes, its shapes and units stand in kdmos/ops/<op>.py; the arithmetic is
// specified by kdmos/ops/reference.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(kdmos, m) {
  m.def(
      "polar_grid(Tensor points, Tensor offsets, float[] lower, float[] upper, float[] interval, int[] bins, "
      "bool fixed_size=False, int max_cells=-1) -> (Tensor features, Tensor cell_rank, Tensor cells, Tensor cell_start, "
      "Tensor voxel_rank, Tensor voxels, Tensor voxel_start, Tensor order)");
  m.def("sort_by_cell(Tensor cell, int num_cells) -> (Tensor order, Tensor start)");
  m.def("voxel_label(Tensor labels, Tensor order, Tensor voxel_start, int num_classes) -> Tensor");
  m.def("polar_scatter(Tensor features, Tensor? order, Tensor start) -> (Tensor maximum, Tensor argmax)");
  m.def("cell_max(Tensor features, Tensor? order, Tensor start) -> Tensor");
  m.def(
      "polar_scatter_backward(Tensor gradient, Tensor argmax, Tensor? order, Tensor start, int num_points) -> Tensor");
  m.def(
      "polar_scatter_bev(Tensor features, Tensor? order, Tensor start, Tensor cells, int num_places) -> Tensor");
  m.def("mlp_max(Tensor points, Tensor[] weights, Tensor[] biases, Tensor order, Tensor start) -> Tensor");
  m.def("cells_to_bev(Tensor values, Tensor cells, int num_places) -> Tensor");
  m.def(
      "cells_to_image(Tensor values, Tensor cells, Tensor factor, Tensor background, int num_places, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "height_residual(Tensor[] scans, Tensor transforms, int[] bins, float[] limits, int[] windows, int[] read, "
      "Tensor(a!)[] out, int[] channels) -> ()");
  m.def(
      "height_residual_sequence(Tensor[] scans, Tensor transforms, int[] bins, float[] limits) -> Tensor");
  m.def("dysample(Tensor x, Tensor offset, int scale, int groups, bool circular) -> Tensor");
  m.def(
      "dysample_backward(Tensor gradient, Tensor x, Tensor offset, int scale, int groups, bool circular) -> "
      "(Tensor x, Tensor offset)");
  m.def("voxel_head(Tensor features, Tensor voxels, Tensor weight, Tensor bias, int heights) -> Tensor");
  m.def(
      "voxel_head_backward(Tensor gradient, Tensor features, Tensor voxels, Tensor weight, int heights) -> "
      "(Tensor features, Tensor weight, Tensor bias)");
  m.def(
      "wdcd_loss(Tensor student, Tensor teacher, Tensor labels, Tensor tables, Tensor? offsets, float temperature, "
      "int normaliser, float floor, bool with_gradient) -> (Tensor loss, Tensor gradient)");
  m.def("copy_scan(Tensor points, Tensor(a!) out, float most) -> Tensor");
  m.def(
      "label_points(Tensor logits, int moving, int[] raw, Tensor(a!) labels, Tensor(b!) probability) -> ()");
  m.def("bias_activation(Tensor(a!) x, Tensor bias, float slope) -> ()");
  m.def("add_rows(Tensor(a!) to, Tensor index, Tensor rows) -> ()");
  m.def(
      "selective_scan(Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor skip, Tensor? gate, "
      "Tensor delta_bias, Tensor offsets, bool with_states) -> (Tensor y, Tensor states)");
  m.def(
      "selective_scan_backward(Tensor gradient, Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor skip, "
      "Tensor? gate, Tensor delta_bias, Tensor offsets, Tensor states) -> (Tensor u, Tensor delta, Tensor a, Tensor b, "
      "Tensor c, Tensor skip, Tensor gate, Tensor delta_bias)");
  m.def(
      "masked_conv(Tensor[] parts, Tensor weight, Tensor bias, float slope, Tensor distance, int near, bool fill) -> "
      "Tensor");
  m.def("winograd_conv(Tensor[] parts, Tensor weight, Tensor bias, float slope) -> Tensor");
  m.def(
      "co_attention(Tensor appearance, Tensor motion, Tensor fused, Tensor gate, Tensor gate_bias, Tensor spatial, "
      "Tensor spatial_bias, Tensor channel, Tensor channel_bias) -> "
      "(Tensor attended, Tensor appearance, Tensor motion)");
  m.def("wrap_around(Tensor[] parts, int halo) -> Tensor");
  m.def("wrap_around_backward(Tensor gradient, int[] shapes, int halo) -> Tensor[]");
  m.def(
      "norm_activation(Tensor x, Tensor weight, Tensor bias, float eps, float slope) -> "
      "(Tensor out, Tensor mean, Tensor variance)");
  m.def(
      "norm_activation_again(Tensor x, Tensor mean, Tensor variance, Tensor weight, Tensor bias, float eps, "
      "float slope) -> Tensor");
  m.def(
      "norm_activation_backward(Tensor gradient, Tensor x, Tensor mean, Tensor variance, Tensor weight, Tensor bias, "
      "float eps, float slope) -> (Tensor x, Tensor weight, Tensor bias)");
}
