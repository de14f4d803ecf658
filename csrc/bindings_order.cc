// Python functions and classes of the order: counters, permutation, blend, phases.
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

py::tuple BlendTableArrays(const std::vector<int64_t>& quotas) {
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

py::tuple Locate(const PhaseOrder& order, const Input<int64_t>& n) {
  const int64_t* numbers = Values(n, "n");
  const int64_t count = n.size();
  auto source_slot = NewArray<int32_t>(count);
  auto epoch = NewArray<int64_t>(count);
  auto row = NewArray<int64_t>(count);
  int32_t* slot_out = source_slot.mutable_data();
  int64_t* epoch_out = epoch.mutable_data();
  int64_t* row_out = row.mutable_data();
  {
    const py::gil_scoped_release release;
    order.Locate(numbers, count, slot_out, epoch_out, row_out);
  }
  return py::make_tuple(source_slot, epoch, row);
}

py::array_t<int64_t> Find(const PhaseOrder& order, const Input<int32_t>& source_slot,
                          const Input<int64_t>& epoch, const Input<int64_t>& row) {
  const int32_t* slots = Values(source_slot, "source_slot");
  const int64_t count = source_slot.size();
  const int64_t* epochs = Values(epoch, "epoch", count);
  const int64_t* rows = Values(row, "row", count);
  auto n = NewArray<int64_t>(count);
  int64_t* out = n.mutable_data();
  const py::gil_scoped_release release;
  order.Find(slots, epochs, rows, count, out);
  return n;
}

py::array_t<int64_t> ToArray(const std::vector<int64_t>& values) {
  return py::array_t<int64_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

void BindOrderClasses(py::module_& module) {
  py::class_<Permutation>(module, "Permutation", "A keyed permutation of [0, n) with O(1) inverse.")
      .def(py::init<uint64_t, uint64_t>(), py::arg("n"), py::arg("key"))
      .def("forward", &MapAll<&Permutation::Forward>, py::arg("index"),
           "Map int64 indices in [0, n); IndexError outside.")
      .def("inverse", &MapAll<&Permutation::Inverse>, py::arg("index"), "Undo forward().");

  py::class_<PhaseOrder>(
      module, "PhaseOrder",
      "The order of rows inside one phase: blend table, then a keyed permutation per epoch.\n\n"
      "One value per source: source_ids (u64, enter the key), quotas (rows per blend period; they\n"
      "sum to the period, a power of two), rows (of the source's pool), drawn (rows drawn from\n"
      "that pool before the phase). Raises ValueError naming the bad entry.")
      .def(py::init(&NewPhaseOrder), py::kw_only(), py::arg("seed"), py::arg("source_ids"),
           py::arg("quotas"), py::arg("rows"), py::arg("drawn"))
      .def("locate", &Locate, py::arg("n"),
           "Map row numbers n >= 0 of the phase (int64[m]) to (source slot int32[m],\n"
           "epoch int64[m], row of the pool int64[m]).")
      .def("find", &Find, py::arg("source_slot"), py::arg("epoch"), py::arg("row"),
           "Undo locate(): the n of each entry, or -1 where it was drawn before the phase.")
      .def(
          "drawn_after",
          [](const PhaseOrder& order, int64_t n) { return ToArray(order.DrawnAfter(n)); },
          py::arg("n"),
          "Rows drawn from each pool after the first n rows of the phase, `drawn` included.");
}

}  // namespace

void BindOrder(py::module_& module) {
  module.def(
      "counter_key",
      [](uint64_t seed, uint64_t purpose, const std::vector<uint64_t>& words) {
        return CounterKey(seed, purpose, words.data(), words.size());
      },
      py::arg("seed"), py::arg("purpose"), py::arg("words"));
  module.def(
      "counter_draws",
      [](uint64_t key, uint64_t first, int64_t count) {
        auto draws = NewArray<uint64_t>(count);
        uint64_t* to = draws.mutable_data();
        for (int64_t i = 0; i < count; ++i) to[i] = Draw(key, first + i);
        return draws;
      },
      py::arg("key"), py::arg("first"), py::arg("count"));
  module.def("permutation_key", &PermutationKey, py::arg("seed"), py::arg("source"),
             py::arg("epoch"));
  module.def("blend_table", &BlendTableArrays, py::arg("quotas"));
  BindOrderClasses(module);
}

}  // namespace megatron_ettin
