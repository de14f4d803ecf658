// Python functions and classes of the order: counters, permutation, blend, phases.
#include <pybind11/native_enum.h>

#include <memory>
#include <utility>
#include <vector>

#include "bindings.h"
#include "blend_table.h"
#include "counter_rng.h"
#include "permutation.h"
#include "phase_order.h"

namespace py = pybind11;

namespace megatron_ettin {
namespace {

using LocatedColumns =
    py::typing::Tuple<py::array_t<int32_t>, py::array_t<int64_t>, py::array_t<int64_t>>;
using BlendColumns = py::typing::Tuple<py::array_t<int32_t>, py::array_t<int32_t>>;

template <uint64_t (Permutation::*Map)(uint64_t) const>
py::array_t<int64_t> MapAll(const Permutation& permutation, const Input<int64_t>& index) {
  const int64_t* from = Values(index, "index");
  const auto size = static_cast<int64_t>(permutation.size());
  auto result = NewArray<int64_t>(index.size());
  int64_t* to = result.mutable_data();
  const py::gil_scoped_release release;
  for (py::ssize_t i = 0; i < index.size(); ++i) {
    if (from[i] < 0 || from[i] >= size) {
      throw std::out_of_range("index " + std::to_string(from[i]) + " of a permutation of " +
                              std::to_string(size));
    }
    to[i] = static_cast<int64_t>((permutation.*Map)(static_cast<uint64_t>(from[i])));
  }
  return result;
}

py::array_t<uint64_t> DrawMany(uint64_t key, uint64_t first, int64_t count) {
  auto draws = NewArray<uint64_t>(count);
  uint64_t* to = draws.mutable_data();
  for (int64_t i = 0; i < count; ++i) to[i] = Draw(key, first + i);
  return draws;
}

BlendColumns TabulateBlend(const std::vector<int64_t>& quotas) {
  const BlendTable table(quotas);
  auto source = NewArray<int32_t>(table.period());
  auto rank = NewArray<int32_t>(table.period());
  for (int64_t j = 0; j < table.period(); ++j) {
    source.mutable_data()[j] = table.SourceAt(j);
    rank.mutable_data()[j] = table.RankAt(j);
  }
  return py::make_tuple(source, rank);
}

std::unique_ptr<PhaseOrder> NewPhaseOrder(uint64_t seed, const std::vector<uint64_t>& source_ids,
                                          const std::vector<int64_t>& quotas,
                                          const std::vector<int64_t>& rows,
                                          const std::vector<int64_t>& drawn) {
  const size_t count = source_ids.size();
  if (quotas.size() != count || rows.size() != count || drawn.size() != count) {
    throw std::invalid_argument("source_ids, quotas, rows and drawn need one value per source");
  }
  std::vector<PhaseOrder::Source> sources;
  for (size_t s = 0; s < count; ++s) {
    sources.push_back({source_ids[s], quotas[s], rows[s], drawn[s]});
  }
  const py::gil_scoped_release release;
  return std::make_unique<PhaseOrder>(seed, std::move(sources));
}

LocatedColumns Locate(const PhaseOrder& order, const Input<int64_t>& n) {
  const int64_t* numbers = Values(n, "n");
  const int64_t count = n.size();
  auto source_index = NewArray<int32_t>(count);
  auto epoch = NewArray<int64_t>(count);
  auto row = NewArray<int64_t>(count);
  int32_t* source_index_out = source_index.mutable_data();
  int64_t* epoch_out = epoch.mutable_data();
  int64_t* row_out = row.mutable_data();
  {
    const py::gil_scoped_release release;
    order.Locate(numbers, count, source_index_out, epoch_out, row_out);
  }
  return py::make_tuple(source_index, epoch, row);
}

py::array_t<int64_t> Find(const PhaseOrder& order, const Input<int32_t>& source_index,
                          const Input<int64_t>& epoch, const Input<int64_t>& row) {
  const int32_t* indices = Values(source_index, "source_index");
  const int64_t count = source_index.size();
  const int64_t* epochs = Values(epoch, "epoch", count);
  const int64_t* rows = Values(row, "row", count);
  auto n = NewArray<int64_t>(count);
  int64_t* out = n.mutable_data();
  const py::gil_scoped_release release;
  order.Find(indices, epochs, rows, count, out);
  return n;
}

py::array_t<int64_t> CountDrawnArray(const PhaseOrder& order, int64_t n) {
  const std::vector<int64_t> drawn = order.CountDrawnAfter(n);
  return py::array_t<int64_t>(static_cast<py::ssize_t>(drawn.size()), drawn.data());
}

void BindCounters(py::module_& module) {
  py::native_enum<Purpose>(module, "Purpose", "enum.IntEnum", R"(
Uses of a key of the counter generator (docs/order.md, section 1).

A purpose never changes its meaning; a new use takes a new number.)")
      .value("PERMUTATION", Purpose::kPermutation)
      .value("MASK", Purpose::kMask)
      .value("NORMAL_WEIGHTS", Purpose::kNormalWeights)
      .value("UNIFORM_WEIGHTS", Purpose::kUniformWeights)
      .value("DROPOUT", Purpose::kDropout)
      .value("UNSEEN", Purpose::kUnseen)
      .value("VERIFY", Purpose::kVerify)
      .value("NOISE", Purpose::kNoise)
      .value("MIXTURE", Purpose::kMixture)
      .finalize();
  module.def(
      "counter_key",
      [](uint64_t seed, uint64_t purpose, const std::vector<uint64_t>& words) {
        return CounterKey(seed, purpose, words.data(), words.size());
      },
      py::arg("seed"), py::arg("purpose"), py::arg("words"), R"(
Return the 64-bit key of a family of draws (docs/order.md, section 1).

All arguments are unsigned 64-bit; `purpose` is a Purpose.)");
  module.def("counter_draws", &DrawMany, py::arg("key"), py::arg("first"), py::arg("count"), R"(
Return draws number first, first + 1, ... of a key: uint64[count].)");
  module.def("permutation_key", &PermutationKey, py::arg("seed"), py::arg("source"),
             py::arg("epoch"), R"(
Return the key of the permutation that orders one epoch of one source (u64 each).)");
}

void BindPermutation(py::module_& module) {
  py::class_<Permutation>(module, "Permutation", R"(
Keyed permutation of [0, n), 1 <= n <= 2^62, with O(1) inverse (docs/order.md, section 2).

Raises ValueError for another n. Up to n = 65,536 it is a table that takes about 0.3 ms to fill.)")
      .def(py::init<uint64_t, uint64_t>(), py::arg("n"), py::arg("key"))
      .def("forward", &MapAll<&Permutation::Forward>, py::arg("index"), R"(
Map indices int64[m] in [0, n) to values int64[m]; IndexError outside.)")
      .def("inverse", &MapAll<&Permutation::Inverse>, py::arg("index"), R"(
Map values back to their indices: undo `forward`.)");
}

void BindPhaseOrder(py::module_& module) {
  module.def("blend_table", &TabulateBlend, py::arg("quotas"), R"(
Return (source, rank) at each position of a blend period: int32[sum(quotas)] each.

`rank` counts the earlier positions of the same source (docs/order.md, section 3).

Raises:
    ValueError: a quota is < 1, or they do not sum to a power of two <= 2^20.)");
  py::class_<PhaseOrder>(module, "PhaseOrder", R"(
The order of rows inside one phase: a blend table, then a keyed permutation per epoch.

One value per source: `source_ids` (u64, enter the key), `quotas` (rows per blend period; they
sum to the period, a power of two), `rows` (of the source's pool), `drawn` (rows drawn from that
pool before the phase). Raises ValueError naming the bad entry (docs/order.md, section 4).)")
      .def(py::init(&NewPhaseOrder), py::kw_only(), py::arg("seed"), py::arg("source_ids"),
           py::arg("quotas"), py::arg("rows"), py::arg("drawn"))
      .def("locate", &Locate, py::arg("n"), R"(
Return (source_index, epoch, row) of the rows n >= 0 of the phase, int64[m].

source_index: int32[m], which of the phase's sources. epoch: int64[m], passes over the source's pool
that were complete before. row: int64[m], row of the pool. ValueError names an n that is < 0.)")
      .def("find", &Find, py::arg("source_index"), py::arg("epoch"), py::arg("row"), R"(
Undo `locate`: n, int64[m], -1 where the row was drawn before the phase.

ValueError names the entry that is out of range.)")
      .def("drawn_after", &CountDrawnArray, py::arg("n"), R"(
Count the rows drawn from each pool after the first n rows of the phase, `drawn` included.)");
}

}  // namespace

void BindOrder(py::module_& module) {
  BindCounters(module);
  BindPermutation(module);
  BindPhaseOrder(module);
}

}  // namespace megatron_ettin
