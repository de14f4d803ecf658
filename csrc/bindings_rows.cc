// Python class RowPlan and the assembly of rows.
#include <memory>
#include <utility>
#include <vector>

#include "bindings.h"
#include "row_batch.h"
#include "row_plan.h"
#include "token_file.h"

namespace py = pybind11;

namespace megatron_ettin {
namespace {

Specials ParseSpecials(const std::string& specials) {
  if (specials == "add") return Specials::kAdd;
  if (specials == "present") return Specials::kPresent;
  throw std::invalid_argument("specials is '" + specials + "'; it must be 'add' or 'present'");
}

// Borrows int32 and int64 lengths (they may be views of an .idx file), widens other integers.
LengthView BorrowLengths(py::array lengths) {
  const char kind = lengths.dtype().kind();
  const bool borrowed = kind == 'i' && (lengths.itemsize() == 4 || lengths.itemsize() == 8) &&
                        (lengths.flags() & py::array::c_style) != 0;
  if (!borrowed) {
    lengths = Input<int64_t>::ensure(lengths);
    if (!lengths) throw py::type_error("lengths must be an array of signed integers");
  }
  if (lengths.ndim() != 1) throw std::invalid_argument("lengths must be a 1-D array");
  const void* data = lengths.data();
  const int64_t count = lengths.size();
  const bool is_64_bit = lengths.itemsize() == 8;
  const std::shared_ptr<const void> owner(lengths.release().ptr(), [](const void* object) {
    const py::gil_scoped_acquire acquire;
    Py_DECREF(static_cast<PyObject*>(const_cast<void*>(object)));
  });
  return LengthView(data, count, is_64_bit, owner);
}

std::unique_ptr<RowPlan> NewRowPlan(const py::array& lengths, int64_t first_document,
                                    int64_t end_document, int64_t seq_length,
                                    const std::string& specials, int64_t min_doc_tokens,
                                    int64_t max_segments_per_row, int64_t block_documents) {
  const RowRules rules{seq_length, ParseSpecials(specials), min_doc_tokens, max_segments_per_row,
                       block_documents};
  LengthView view = BorrowLengths(lengths);
  const py::gil_scoped_release release;
  return std::make_unique<RowPlan>(std::move(view), first_document, end_document, rules);
}

py::tuple SegmentArrays(const RowPlan& plan, int64_t row) {
  std::vector<Segment> segments;
  plan.Segments(row, &segments);
  const auto count = static_cast<int64_t>(segments.size());
  auto document = NewArray<int64_t>(count);
  auto offset = NewArray<int64_t>(count);
  auto length = NewArray<int32_t>(count);
  auto ends_document = NewArray<bool>(count);
  for (int64_t i = 0; i < count; ++i) {
    document.mutable_data()[i] = segments[i].document;
    offset.mutable_data()[i] = segments[i].offset;
    length.mutable_data()[i] = segments[i].length;
    ends_document.mutable_data()[i] = segments[i].ends_document;
  }
  return py::make_tuple(document, offset, length, ends_document);
}

py::array RowTokenView(const py::object& self) {
  const std::vector<int32_t>& tokens = self.cast<const RowPlan&>().row_tokens();
  return ReadOnlyView(tokens.data(), static_cast<int64_t>(tokens.size()), self);
}

py::tuple AssembleRowArrays(const std::vector<const TokenFile*>& files,
                            const std::vector<const RowPlan*>& plans,
                            const Input<int32_t>& source_slot, const Input<int64_t>& row,
                            int64_t seq_length, int64_t max_segments_per_row, int64_t cls_id,
                            int64_t sep_id, int64_t pad_id) {
  if (files.size() != plans.size()) {
    throw std::invalid_argument("files and plans need one entry per source");
  }
  std::vector<RowSource> sources;
  for (size_t s = 0; s < files.size(); ++s) {
    if (files[s] == nullptr || plans[s] == nullptr)
      throw py::type_error("a source may not be None");
    sources.push_back({files[s], plans[s]});
  }
  const int32_t* slots = Values(source_slot, "source_slot");
  const int64_t num_rows = source_slot.size();
  const int64_t* rows = Values(row, "row", num_rows);
  const RowShape shape{seq_length, max_segments_per_row, cls_id, sep_id, pad_id};
  CheckRowShape(shape, num_rows);
  auto tokens = NewArray<int64_t>(num_rows * seq_length);
  auto position_ids = NewArray<int64_t>(num_rows * seq_length);
  auto cu_seqlens = NewArray<int32_t>(num_rows * (max_segments_per_row + 1) + 1);
  auto segment_kind = NewArray<uint8_t>(num_rows * (max_segments_per_row + 1));
  auto num_tokens = NewArray<int64_t>(num_rows);
  const RowBatch batch{tokens.mutable_data(), position_ids.mutable_data(),
                       cu_seqlens.mutable_data(), segment_kind.mutable_data(),
                       num_tokens.mutable_data()};
  {
    const py::gil_scoped_release release;
    AssembleRows(sources, slots, rows, num_rows, shape, batch);
  }
  return py::make_tuple(tokens, position_ids, cu_seqlens, segment_kind, num_tokens);
}

}  // namespace

void BindRows(py::module_& module) {
  py::class_<RowPlan>(
      module, "RowPlan",
      "Pack documents [first_document, end_document) into rows of seq_length slots.\n\n"
      "lengths: tokens of every document of the file (int32 or int64, borrowed). specials: 'add'\n"
      "puts [CLS] and [SEP] around each piece, 'present' adds nothing. Raises ValueError naming\n"
      "the field or the document.")
      .def(py::init(&NewRowPlan), py::arg("lengths"), py::arg("first_document"),
           py::arg("end_document"), py::arg("seq_length"), py::kw_only(), py::arg("specials"),
           py::arg("min_doc_tokens"), py::arg("max_segments_per_row"),
           py::arg("block_documents") = 65536)
      .def_property_readonly("num_rows", [](const RowPlan& p) { return p.counts().rows; })
      .def_property_readonly(
          "num_tokens", [](const RowPlan& p) { return p.counts().tokens; },
          "Slots that are not padding: corpus tokens and added specials.")
      .def_property_readonly(
          "num_documents", [](const RowPlan& p) { return p.counts().documents; },
          "Documents that were kept.")
      .def_property_readonly("dropped_documents",
                             [](const RowPlan& p) { return p.counts().dropped_documents; })
      .def_property_readonly("dropped_tokens",
                             [](const RowPlan& p) { return p.counts().dropped_tokens; })
      .def_property_readonly(
          "cut_documents", [](const RowPlan& p) { return p.counts().cut_documents; },
          "Documents of more than one piece.")
      .def_property_readonly(
          "row_tokens", &RowTokenView,
          "Slots of each row that are not padding, int32[num_rows]; computed on\n"
          "each access.")
      .def("segments", &SegmentArrays, py::arg("row"),
           "Pieces of a row, by ascending document: (document int64[k], offset int64[k],\n"
           "length int32[k], ends_document bool[k]); length counts corpus tokens only.");
  module.def("assemble_rows", &AssembleRowArrays, py::arg("files"), py::arg("plans"),
             py::arg("source_slot"), py::arg("row"), py::kw_only(), py::arg("seq_length"),
             py::arg("max_segments_per_row"), py::arg("cls_id"), py::arg("sep_id"),
             py::arg("pad_id"));
}

}  // namespace megatron_ettin
