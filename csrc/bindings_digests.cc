// Python functions of hashes and of the digests of rows.
#include <optional>
#include <vector>

#include "bindings.h"
#include "digest.h"
#include "row_plan.h"
#include "xxh3.h"

namespace py = pybind11;

namespace megatron_ettin {
namespace {

static_assert(sizeof(Hash128) == 2 * sizeof(uint64_t), "an array of them is an array of lanes");

template <typename Hash>
auto HashBuffer(const py::buffer& data, Hash hash) {
  const py::buffer_info view = data.request();
  py::ssize_t packed = view.itemsize;
  for (py::ssize_t d = view.ndim - 1; d >= 0; --d) {
    if (view.shape[d] > 1 && view.strides[d] != packed) {
      throw std::invalid_argument("data must lie in one piece");
    }
    packed *= view.shape[d];
  }
  const py::gil_scoped_release release;
  return hash(view.ptr, static_cast<size_t>(view.size * view.itemsize));
}

py::array_t<uint64_t> NewLanes(int64_t rows) {
  return py::array_t<uint64_t>({static_cast<py::ssize_t>(rows), py::ssize_t{2}});
}

Hash128* Values128(py::array_t<uint64_t>& lanes) {
  return reinterpret_cast<Hash128*>(lanes.mutable_data());
}

DigestedRows CheckedRows(const Input<int64_t>& g, const Input<int64_t>& num_tokens,
                         int64_t seq_length) {
  if (seq_length < 1) throw std::invalid_argument("seq_length must be > 0");
  const int64_t* rows = Values(g, "g");
  return {g.size(), seq_length, rows, Values(num_tokens, "num_tokens", g.size())};
}

py::array_t<uint64_t> DigestOrderArrays(const std::vector<const RowPlan*>& plans,
                                        const Input<int64_t>& g, const Input<uint64_t>& source_ids,
                                        const Input<int32_t>& source_index,
                                        const Input<int64_t>& epoch, const Input<int64_t>& row) {
  const auto num_sources = static_cast<py::ssize_t>(plans.size());
  const uint64_t* ids = Values(source_ids, "source_ids", num_sources);
  std::vector<OrderedSource> sources;
  for (py::ssize_t s = 0; s < num_sources; ++s) {
    if (plans[s] == nullptr) throw py::type_error("a plan may not be None");
    sources.push_back({plans[s], ids[s]});
  }
  const int64_t* numbers = Values(g, "g");
  const int64_t count = g.size();
  const RowOrigins origins{numbers, Values(source_index, "source_index", count),
                           Values(epoch, "epoch", count), Values(row, "row", count)};
  auto lanes = NewLanes(count);
  Hash128* values = Values128(lanes);
  const py::gil_scoped_release release;
  DigestOrder(sources, origins, count, values);
  return lanes;
}

py::array_t<uint64_t> DigestTokenArrays(const Input<int64_t>& g, const Input<int64_t>& tokens,
                                        const Input<int32_t>& cu_seqlens,
                                        const Input<int64_t>& num_tokens, int64_t seq_length) {
  const DigestedRows rows = CheckedRows(g, num_tokens, seq_length);
  const int64_t* ids = Values(tokens, "tokens", rows.count * seq_length);
  const int32_t* boundaries = Values(cu_seqlens, "cu_seqlens");
  const int64_t segments = cu_seqlens.size() - 1;
  const int64_t per_row = rows.count == 0 ? 0 : segments / rows.count;
  if (segments != per_row * rows.count || (rows.count > 0 && per_row < 1)) {
    throw std::invalid_argument("cu_seqlens has " + std::to_string(segments) + " segments for " +
                                std::to_string(rows.count) +
                                " rows; every row needs the same number");
  }
  auto lanes = NewLanes(rows.count);
  Hash128* values = Values128(lanes);
  const py::gil_scoped_release release;
  DigestTokens(rows, ids, boundaries, per_row, values);
  return lanes;
}

py::array_t<uint64_t> DigestMaskArrays(const Input<int64_t>& g, const Input<int64_t>& inputs,
                                       const Input<int64_t>& labels, const Input<bool>& loss_mask,
                                       const Input<int64_t>& num_tokens, int64_t seq_length,
                                       const std::optional<Input<float>>& weights) {
  const DigestedRows rows = CheckedRows(g, num_tokens, seq_length);
  const py::ssize_t slots = rows.count * seq_length;
  const int64_t* input_ids = Values(inputs, "inputs", slots);
  const int64_t* label_ids = Values(labels, "labels", slots);
  const bool* scored = Values(loss_mask, "loss_mask", slots);
  const float* factors = weights ? Values(*weights, "weights", slots) : nullptr;
  auto lanes = NewArray<uint64_t>(rows.count);
  uint64_t* values = lanes.mutable_data();
  const py::gil_scoped_release release;
  DigestMasks(rows, input_ids, label_ids, scored, factors, values);
  return lanes;
}

void BindHashes(py::module_& module) {
  module.def(
      "xxh3_64", [](const py::buffer& data) { return HashBuffer(data, Xxh3_64); }, py::arg("data"),
      R"(
Return XXH3-64 (seed 0) of bytes or of any buffer that lies in one piece; else ValueError.)");
  module.def(
      "xxh3_128",
      [](const py::buffer& data) {
        const Hash128 hash = HashBuffer(data, Xxh3_128);
        return py::int_(py::int_(hash.high) << py::int_(64) | py::int_(hash.low));
      },
      py::arg("data"), R"(
Return XXH3-128 (seed 0) of bytes or of any buffer that lies in one piece; else ValueError.)");
}

void BindRowDigests(py::module_& module) {
  module.def("order_digests", &DigestOrderArrays, py::arg("plans"), py::arg("g"),
             py::arg("source_ids"), py::arg("source_index"), py::arg("epoch"), py::arg("row"), R"(
Hash where each of m rows comes from: uint64[m, 2], low lane first; no token is read.

`plans` and `source_ids` (uint64) hold one entry per source. Row i of the batch, number g[i] of the
run, is row[i] of plans[source_index[i]] in epoch[i]: int64[m], but int32[m] for `source_index`. An
idle row (g < 0) has value 0. The bytes are those of docs/order.md, section 10.

Raises:
    ValueError: naming the entry that is out of range.
    IndexError: `row` is outside of its plan.)");
  module.def("token_digests", &DigestTokenArrays, py::arg("g"), py::arg("tokens"),
             py::arg("cu_seqlens"), py::arg("num_tokens"), py::arg("seq_length"), R"(
Hash the unmasked tokens of each of m rows: uint64[m, 2], low lane first.

tokens: int64[m*L], with L = seq_length. cu_seqlens (int32[m*K + 1], the same number of segments K
in each row) and num_tokens (int64[m]) are those of `assemble_rows`. Padding is left out, and an
idle row (g < 0, int64[m]) has value 0. The bytes are those of docs/order.md, section 10.

Raises:
    ValueError: naming the row whose segments do not end at its num_tokens, or whose token is no
        u32.)");
  module.def("mask_digests", &DigestMaskArrays, py::arg("g"), py::arg("inputs"), py::arg("labels"),
             py::arg("loss_mask"), py::arg("num_tokens"), py::arg("seq_length"),
             py::arg("weights") = py::none(), R"(
Hash what each of m rows shows a model and scores: uint64[m], low lanes.

inputs, labels: int64[m*L]; loss_mask: bool[m*L]; g, num_tokens: int64[m]; weights: float32[m*L],
all 1 if not given. Labels and weights are read where loss_mask is set. Padding is left out, and an
idle row (g < 0) has value 0. The bytes are those of docs/order.md, section 10.

Raises:
    ValueError: naming the row and slot of an id that is no u32, or of a scored label 2^32 - 1.)");
}

}  // namespace

void BindDigests(py::module_& module) {
  BindHashes(module);
  BindRowDigests(module);
}

}  // namespace megatron_ettin
