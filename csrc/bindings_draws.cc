// Python functions of masks, dropout and initial weights.
#include <optional>
#include <vector>

#include "bindings.h"
#include "dropout.h"
#include "initial_weights.h"
#include "masking.h"

namespace py = pybind11;

namespace megatron_ettin {
namespace {

using MaskedColumns = py::typing::Tuple<py::array_t<int64_t>, py::array_t<bool>>;

MaskedColumns MaskTokenArrays(const Input<int64_t>& tokens, const Input<int64_t>& g,
                              int64_t seq_length, uint64_t mask_seed, double mask_rate,
                              int64_t mask_id, int64_t vocab_size,
                              const std::vector<int64_t>& special_ids) {
  const int64_t* rows = Values(g, "g");
  const int64_t num_rows = g.size();
  const int64_t* ids = Values(tokens, "tokens", num_rows * seq_length);
  const MaskRules rules{mask_seed, mask_rate, mask_id, vocab_size, special_ids};
  auto masked = NewArray<int64_t>(num_rows * seq_length);
  auto selected = NewArray<bool>(num_rows * seq_length);
  int64_t* masked_out = masked.mutable_data();
  bool* selected_out = selected.mutable_data();
  {
    const py::gil_scoped_release release;
    MaskTokens(ids, rows, num_rows, seq_length, rules, masked_out, selected_out);
  }
  return py::make_tuple(masked, selected);
}

py::array_t<float> DrawDropoutArray(const Input<int64_t>& g, int64_t seq_length, int64_t channels,
                                    uint64_t seed, int64_t layer, double rate, int64_t first_slot,
                                    std::optional<int64_t> num_slots) {
  const int64_t* rows = Values(g, "g");
  const SlotRange slots{seq_length, channels, first_slot,
                        num_slots.value_or(g.size() * seq_length - first_slot)};
  CheckSlots(slots, g.size());
  auto factors = NewArray<float>(slots.count * channels);
  float* to = factors.mutable_data();
  const py::gil_scoped_release release;
  WriteDropoutFactors(rows, slots, {seed, layer, rate}, to);
  return factors;
}

py::array_t<float> DrawInitialWeightArray(const std::string& name, uint64_t seed, int64_t begin,
                                          int64_t count, double std, double cutoff_std) {
  auto weights = NewArray<float>(count);
  float* to = weights.mutable_data();
  const py::gil_scoped_release release;
  DrawTruncatedNormal(name, seed, begin, count, std, cutoff_std, to);
  return weights;
}

py::array_t<float> DrawUniformWeightArray(const std::string& name, uint64_t seed, int64_t begin,
                                          int64_t count, double low, double high) {
  auto weights = NewArray<float>(count);
  float* to = weights.mutable_data();
  const py::gil_scoped_release release;
  DrawUniform(name, seed, begin, count, low, high, to);
  return weights;
}

void BindRowDraws(py::module_& module) {
  module.def("mask_tokens", &MaskTokenArrays, py::arg("tokens"), py::arg("g"), py::kw_only(),
             py::arg("seq_length"), py::arg("mask_seed"), py::arg("mask_rate"), py::arg("mask_id"),
             py::arg("vocab_size"), py::arg("special_ids"), R"(
Mask m rows of L = seq_length slots by (mask_seed, g, position in the row) alone.

A token of `tokens`, int64[m*L], is selected with probability `mask_rate` unless it is in
`special_ids`, which must hold the padding id. Of the selected, 80 % become `mask_id`, 10 % a
random id in [0, vocab_size), and 10 % stay. A row with g < 0, int64[m], is idle and stays as it is
(docs/order.md, section 7).

Returns:
    masked: int64[m*L], the input with its replacements.
    selected: bool[m*L]; the labels are the input tokens there.

Raises:
    ValueError: naming the argument that is out of range or has another size.)");
  module.def("dropout_factors", &DrawDropoutArray, py::arg("g"), py::kw_only(),
             py::arg("seq_length"), py::arg("channels"), py::arg("seed"), py::arg("layer"),
             py::arg("rate"), py::arg("first_slot") = 0, py::arg("num_slots") = py::none(), R"(
Return the factors of a layer's dropout for a stream of m rows of L = seq_length slots.

A factor is a function of (seed, layer, g, position in the row, channel) alone: 0 with probability
`rate` (rounded up to a multiple of 2^-16), else the reciprocal of the probability to be kept. In
an idle row, g < 0 of int64[m], it is 1 (docs/order.md, section 7).

Returns:
    float32[n * channels], slot by slot, for the n = num_slots slots from first_slot on; without
    num_slots, for all that follow first_slot.

Raises:
    ValueError: naming the argument that is out of range.)");
}

void BindWeights(py::module_& module) {
  module.def("initial_weights", &DrawInitialWeightArray, py::arg("name"), py::arg("seed"),
             py::arg("begin"), py::arg("count"), py::kw_only(), py::arg("std"),
             py::arg("cutoff_std") = 2.0, R"(
Return elements [begin, begin + count) of a tensor drawn from a truncated normal: float32[count].

The tensor is a function of (seed, name) alone: a slice equals the same range of the whole. The
distribution is N(0, std^2) cut at +-cutoff_std * std; the cut lowers the variance, which is not
corrected (docs/order.md, section 8).

Raises:
    ValueError: begin or count is < 0, std is <= 0, or cutoff_std is outside (0, 7].)");
  module.def("uniform_weights", &DrawUniformWeightArray, py::arg("name"), py::arg("seed"),
             py::arg("begin"), py::arg("count"), py::arg("low"), py::arg("high"), R"(
Return elements [begin, begin + count) of a tensor uniform on [low, high]: float32[count].

Raises:
    ValueError: begin or count is < 0, or low <= high does not hold.)");
}

}  // namespace

void BindDraws(py::module_& module) {
  BindRowDraws(module);
  BindWeights(module);
}

}  // namespace megatron_ettin
