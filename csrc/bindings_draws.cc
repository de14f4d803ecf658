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

py::tuple MaskTokenArrays(const Input<int64_t>& tokens, const Input<int64_t>& g, int64_t seq_length,
                          uint64_t mask_seed, double mask_rate, int64_t mask_id, int64_t vocab_size,
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

py::array_t<float> DropoutFactorArray(const Input<int64_t>& g, int64_t seq_length, int64_t channels,
                                      uint64_t seed, int64_t layer, double rate, int64_t first_slot,
                                      std::optional<int64_t> num_slots) {
  const int64_t* rows = Values(g, "g");
  const SlotRange slots{seq_length, channels, first_slot,
                        num_slots.value_or(g.size() * seq_length - first_slot)};
  CheckSlots(slots, g.size());
  auto factors = NewArray<float>(slots.count * channels);
  float* to = factors.mutable_data();
  const py::gil_scoped_release release;
  DropoutFactors(rows, slots, {seed, layer, rate}, to);
  return factors;
}

py::array_t<float> InitialWeightArray(const std::string& name, uint64_t seed, int64_t begin,
                                      int64_t count, double std, double cutoff_std) {
  auto weights = NewArray<float>(count);
  float* to = weights.mutable_data();
  const py::gil_scoped_release release;
  TruncatedNormalWeights(name, seed, begin, count, std, cutoff_std, to);
  return weights;
}

py::array_t<float> UniformWeightArray(const std::string& name, uint64_t seed, int64_t begin,
                                      int64_t count, double low, double high) {
  auto weights = NewArray<float>(count);
  float* to = weights.mutable_data();
  const py::gil_scoped_release release;
  UniformWeights(name, seed, begin, count, low, high, to);
  return weights;
}

}  // namespace

void BindDraws(py::module_& module) {
  module.def("mask_tokens", &MaskTokenArrays, py::arg("tokens"), py::arg("g"), py::kw_only(),
             py::arg("seq_length"), py::arg("mask_seed"), py::arg("mask_rate"), py::arg("mask_id"),
             py::arg("vocab_size"), py::arg("special_ids"));
  module.def("dropout_factors", &DropoutFactorArray, py::arg("g"), py::kw_only(),
             py::arg("seq_length"), py::arg("channels"), py::arg("seed"), py::arg("layer"),
             py::arg("rate"), py::arg("first_slot") = 0, py::arg("num_slots") = py::none());
  module.def("initial_weights", &InitialWeightArray, py::arg("name"), py::arg("seed"),
             py::arg("begin"), py::arg("count"), py::kw_only(), py::arg("std"),
             py::arg("cutoff_std") = 2.0);
  module.def("uniform_weights", &UniformWeightArray, py::arg("name"), py::arg("seed"),
             py::arg("begin"), py::arg("count"), py::arg("low"), py::arg("high"));
}

}  // namespace megatron_ettin
