// Python class RowPlan and the assembly of rows.
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <memory>
#include <vector>

#include "bindings.h"
#include "plan_builder.h"
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

Pack ParsePack(const std::string& pack) {
  for (const Pack known : {Pack::kBfd, Pack::kConcat, Pack::kNone}) {
    if (pack == PackName(known)) return known;
  }
  throw std::invalid_argument("pack is '" + pack + "'; it must be 'bfd', 'concat' or 'none'");
}

void BuildPlan(const TokenFile& file, const std::filesystem::path& path, int64_t first_document,
               int64_t end_document, int64_t seq_length, const std::string& pack,
               const std::string& specials, int64_t min_doc_tokens, int64_t max_segments_per_row,
               int64_t block_documents, bool bodies, int64_t threads, const py::object& progress) {
  const RowRules rules{seq_length,     ParsePack(pack),      ParseSpecials(specials),
                       min_doc_tokens, max_segments_per_row, block_documents};
  const PlanRequest request{first_document, end_document, rules, bodies};
  const auto tick = [&progress](int64_t documents_done) {
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();  // Ctrl-C ends the build
    if (!progress.is_none()) progress(documents_done);
  };
  const py::gil_scoped_release release;
  BuildRowPlan(file, path.string(), request, threads, tick);
}

py::tuple SegmentArrays(const RowPlan& plan, const Input<int64_t>& rows) {
  const int64_t* numbers = Values(rows, "rows");
  const int64_t num_rows = rows.size();
  auto splits = NewArray<int64_t>(num_rows + 1);
  int64_t* split = splits.mutable_data();
  std::vector<Segment> all;
  {
    const py::gil_scoped_release release;
    std::vector<Segment> segments;
    split[0] = 0;
    for (int64_t r = 0; r < num_rows; ++r) {
      plan.Segments(numbers[r], &segments);
      all.insert(all.end(), segments.begin(), segments.end());
      split[r + 1] = static_cast<int64_t>(all.size());
    }
  }
  const auto count = static_cast<int64_t>(all.size());
  auto document = NewArray<int64_t>(count);
  auto offset = NewArray<int64_t>(count);
  auto length = NewArray<int32_t>(count);
  auto cls = NewArray<bool>(count);
  auto sep = NewArray<bool>(count);
  auto ends_document = NewArray<bool>(count);
  int64_t* document_out = document.mutable_data();
  int64_t* offset_out = offset.mutable_data();
  int32_t* length_out = length.mutable_data();
  bool* cls_out = cls.mutable_data();
  bool* sep_out = sep.mutable_data();
  bool* ends_out = ends_document.mutable_data();
  for (int64_t i = 0; i < count; ++i) {
    document_out[i] = all[i].document;
    offset_out[i] = all[i].offset;
    length_out[i] = all[i].length;
    cls_out[i] = all[i].cls;
    sep_out[i] = all[i].sep;
    ends_out[i] = all[i].ends_document;
  }
  return py::make_tuple(splits, document, offset, length, cls, sep, ends_document);
}

py::array_t<int32_t> RowTokenArray(const RowPlan& plan, const Input<int64_t>& rows) {
  const int64_t* numbers = Values(rows, "rows");
  auto tokens = NewArray<int32_t>(rows.size());
  int32_t* out = tokens.mutable_data();
  const py::gil_scoped_release release;
  for (py::ssize_t r = 0; r < rows.size(); ++r) {
    out[r] = static_cast<int32_t>(plan.RowTokens(numbers[r]));
  }
  return tokens;
}

py::array_t<int64_t> FindRows(const RowPlan& plan, int64_t document) {
  std::vector<int64_t> rows;
  {
    const py::gil_scoped_release release;
    plan.Find(document, &rows);
  }
  return py::array_t<int64_t>(static_cast<py::ssize_t>(rows.size()), rows.data());
}

py::tuple AssembleRowArrays(const std::vector<const RowPlan*>& plans,
                            const Input<int32_t>& source_slot, const Input<int64_t>& row,
                            int64_t seq_length, int64_t max_segments_per_row, int64_t cls_id,
                            int64_t sep_id, int64_t pad_id) {
  for (const RowPlan* plan : plans) {
    if (plan == nullptr) throw py::type_error("a plan may not be None");
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
    AssembleRows(plans, slots, rows, num_rows, shape, batch);
  }
  return py::make_tuple(tokens, position_ids, cu_seqlens, segment_kind, num_tokens);
}

void BindRules(py::class_<RowPlan>& plan) {
  plan.def_property_readonly("seq_length", [](const RowPlan& p) { return p.rules().seq_length; })
      .def_property_readonly("pack",
                             [](const RowPlan& p) { return std::string(PackName(p.rules().pack)); })
      .def_property_readonly(
          "specials",
          [](const RowPlan& p) { return p.rules().specials == Specials::kAdd ? "add" : "present"; })
      .def_property_readonly("min_doc_tokens",
                             [](const RowPlan& p) { return p.rules().min_doc_tokens; })
      .def_property_readonly("max_segments_per_row",
                             [](const RowPlan& p) { return p.rules().max_segments_per_row; })
      .def_property_readonly("block_documents",
                             [](const RowPlan& p) { return p.rules().block_documents; })
      .def_property_readonly("first_document",
                             [](const RowPlan& p) { return p.range().first_document; })
      .def_property_readonly("end_document",
                             [](const RowPlan& p) { return p.range().end_document; });
}

void BindCounts(py::class_<RowPlan>& plan) {
  plan.def_property_readonly("num_rows", [](const RowPlan& p) { return p.counts().rows; })
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
          "Documents of more than one piece.");
}

}  // namespace

void BindRows(py::module_& module) {
  py::class_<RowPlan> plan(
      module, "RowPlan",
      "A plan file, memory-mapped, with the token file whose documents it packs into rows.\n\n"
      "Opening checks all but the rows themselves; those of 65,536 documents are checked when "
      "first\n"
      "used. Raises OSError if the file cannot be opened, ValueError naming file, byte and remedy "
      "if\n"
      "it is damaged or was built for other documents. Threads may share a plan.");
  plan.def(py::init([](const std::filesystem::path& path, const TokenFile& file) {
             const py::gil_scoped_release release;
             return std::make_unique<RowPlan>(path.string(), file);
           }),
           py::arg("path"), py::arg("file"), py::keep_alive<1, 3>());
  BindRules(plan);
  BindCounts(plan);
  plan.def(
          "segments", &SegmentArrays, py::arg("rows"),
          "Pieces of rows (int64[m]; IndexError outside the plan), by document inside a row:\n"
          "(splits int64[m+1], document int64[n], offset int64[n], length int32[n], cls bool[n],\n"
          "sep bool[n], ends_document bool[n]). Row i has pieces splits[i] to splits[i+1]. length\n"
          "counts corpus tokens only; cls and sep: the piece carries an added [CLS] or [SEP] too.")
      .def("row_tokens", &RowTokenArray, py::arg("rows"),
           "Slots of rows (int64[m]) that are not padding: int32[m].")
      .def("find", &FindRows, py::arg("document"),
           "Rows that hold a piece of a document, ascending: int64[k], empty if it was dropped.\n\n"
           "IndexError if the plan is for other documents.");
  module.def(
      "build_row_plan", &BuildPlan, py::arg("file"), py::arg("path"), py::kw_only(),
      py::arg("first_document"), py::arg("end_document"), py::arg("seq_length"), py::arg("pack"),
      py::arg("specials"), py::arg("min_doc_tokens"), py::arg("max_segments_per_row"),
      py::arg("block_documents") = kMaxBlockDocuments, py::arg("bodies") = true,
      py::arg("threads") = 0, py::arg("progress") = py::none(),
      "Plan the rows of documents [first_document, end_document) of a file, into the file\n"
      "`path`.\n\n"
      "It appears when it is complete; a file that is there already stays. Its bytes depend on\n"
      "the lengths and the rules alone, whatever the number of threads (0: one per\n"
      "processor). Memory does not grow with the corpus: at most 32 bytes per document of the\n"
      "blocks at work, one of 65,536 documents per thread.\n\n"
      "pack: 'bfd' (best-fit decreasing), 'concat' (one stream, cut into rows) or 'none' (each\n"
      "piece is a row). specials: 'add' puts [CLS] and [SEP] around pieces (concat: documents),\n"
      "'present' nothing. max_segments_per_row must be 1 for concat and none. bodies=False\n"
      "stores a table of the blocks only; RowPlan then computes their rows when they are\n"
      "needed. progress is called now and then with the number of documents done, and may\n"
      "raise to give up. Raises ValueError naming the rule that is out of range or the document\n"
      "with an impossible length, OSError if the file cannot be written; nothing is left then.\n"
      "docs/order.md, sections 5 and 11.");
  module.def("assemble_rows", &AssembleRowArrays, py::arg("plans"), py::arg("source_slot"),
             py::arg("row"), py::kw_only(), py::arg("seq_length"), py::arg("max_segments_per_row"),
             py::arg("cls_id"), py::arg("sep_id"), py::arg("pad_id"));
}

}  // namespace megatron_ettin
