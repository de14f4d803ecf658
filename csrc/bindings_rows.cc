// Python class RowPlan, the assembly of rows and their losses.
#include <pybind11/stl/filesystem.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>
#include <variant>
#include <vector>

#include "bindings.h"
#include "plan_builder.h"
#include "row_batch.h"
#include "row_losses.h"
#include "row_plan.h"
#include "token_corpus.h"
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

// A pair by itself is a corpus too.
using AnyCorpus = std::variant<std::shared_ptr<TokenFile>, std::shared_ptr<TokenCorpus>>;

std::shared_ptr<const TokenCorpus> ToCorpus(const AnyCorpus& any) {
  if (const auto* corpus = std::get_if<std::shared_ptr<TokenCorpus>>(&any)) return *corpus;
  return std::make_shared<TokenCorpus>(TokenCorpus::Shards{std::get<0>(any)});
}

// Called with the number of documents done.
using Progress = py::typing::Callable<py::object(py::int_)>;

void BuildPlan(const AnyCorpus& corpus, const std::filesystem::path& path, int64_t first_document,
               int64_t end_document, int64_t seq_length, const std::string& pack,
               const std::string& specials, int64_t min_doc_tokens, int64_t max_segments_per_row,
               int64_t block_documents, bool bodies, int64_t threads,
               const std::optional<Progress>& progress) {
  const RowRules rules{seq_length,     ParsePack(pack),      ParseSpecials(specials),
                       min_doc_tokens, max_segments_per_row, block_documents};
  const PlanRequest request{first_document, end_document, rules, bodies};
  const auto tick = [&progress](int64_t documents_done) {
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();  // Ctrl-C ends the build
    if (progress) (*progress)(documents_done);
  };
  const py::gil_scoped_release release;
  BuildRowPlan(*ToCorpus(corpus), path.string(), request, threads, tick);
}

struct RowPieces {
  py::array_t<int64_t> splits;
  py::array_t<int64_t> document;
  py::array_t<int64_t> offset;
  py::array_t<int32_t> length;
  py::array_t<bool> cls;
  py::array_t<bool> sep;
  py::array_t<bool> ends_document;
};

// Turns pieces, an array of structs, into one array per field.
RowPieces ToColumns(const std::vector<Piece>& pieces, py::array_t<int64_t> splits) {
  const auto count = static_cast<int64_t>(pieces.size());
  RowPieces columns{std::move(splits),        NewArray<int64_t>(count), NewArray<int64_t>(count),
                    NewArray<int32_t>(count), NewArray<bool>(count),    NewArray<bool>(count),
                    NewArray<bool>(count)};
  int64_t* document = columns.document.mutable_data();
  int64_t* offset = columns.offset.mutable_data();
  int32_t* length = columns.length.mutable_data();
  bool* cls = columns.cls.mutable_data();
  bool* sep = columns.sep.mutable_data();
  bool* ends_document = columns.ends_document.mutable_data();
  for (int64_t i = 0; i < count; ++i) {
    document[i] = pieces[i].document;
    offset[i] = pieces[i].offset;
    length[i] = pieces[i].length;
    cls[i] = pieces[i].cls;
    sep[i] = pieces[i].sep;
    ends_document[i] = pieces[i].ends_document;
  }
  return columns;
}

RowPieces ListRowPieces(const RowPlan& plan, const Input<int64_t>& rows) {
  const int64_t* numbers = Values(rows, "rows");
  const int64_t num_rows = rows.size();
  auto splits = NewArray<int64_t>(num_rows + 1);
  int64_t* split = splits.mutable_data();
  std::vector<Piece> all;
  {
    const py::gil_scoped_release release;
    std::vector<Piece> pieces;
    split[0] = 0;
    for (int64_t r = 0; r < num_rows; ++r) {
      plan.ListPieces(numbers[r], &pieces);
      all.insert(all.end(), pieces.begin(), pieces.end());
      split[r + 1] = static_cast<int64_t>(all.size());
    }
  }
  return ToColumns(all, std::move(splits));
}

py::array_t<int32_t> CountRowTokenArray(const RowPlan& plan, const Input<int64_t>& rows) {
  const int64_t* numbers = Values(rows, "rows");
  auto tokens = NewArray<int32_t>(rows.size());
  int32_t* out = tokens.mutable_data();
  const py::gil_scoped_release release;
  for (py::ssize_t r = 0; r < rows.size(); ++r) {
    out[r] = static_cast<int32_t>(plan.CountRowTokens(numbers[r]));
  }
  return tokens;
}

py::array_t<int64_t> FindRowArray(const RowPlan& plan, int64_t document) {
  std::vector<int64_t> rows;
  {
    const py::gil_scoped_release release;
    plan.FindRows(document, &rows);
  }
  return py::array_t<int64_t>(static_cast<py::ssize_t>(rows.size()), rows.data());
}

struct PackedRows {
  py::array_t<int64_t> tokens;
  py::array_t<int64_t> position_ids;
  py::array_t<int32_t> cu_seqlens;
  py::array_t<uint8_t> segment_kind;
  py::array_t<int64_t> num_tokens;
};

PackedRows AssemblePackedRows(const std::vector<const RowPlan*>& plans,
                              const Input<int32_t>& source_index, const Input<int64_t>& row,
                              int64_t seq_length, int64_t max_segments_per_row, int64_t cls_id,
                              int64_t sep_id, int64_t pad_id) {
  for (const RowPlan* plan : plans) {
    if (plan == nullptr) throw py::type_error("a plan may not be None");
  }
  const int32_t* indices = Values(source_index, "source_index");
  const int64_t num_rows = source_index.size();
  const int64_t* rows = Values(row, "row", num_rows);
  const RowShape shape{seq_length, max_segments_per_row, cls_id, sep_id, pad_id};
  CheckRowShape(shape, num_rows);
  const int64_t slots = num_rows * seq_length;
  const int64_t segments = num_rows * (max_segments_per_row + 1);
  PackedRows packed{NewArray<int64_t>(slots), NewArray<int64_t>(slots),
                    NewArray<int32_t>(segments + 1), NewArray<uint8_t>(segments),
                    NewArray<int64_t>(num_rows)};
  const RowBatch batch{packed.tokens.mutable_data(), packed.position_ids.mutable_data(),
                       packed.cu_seqlens.mutable_data(), packed.segment_kind.mutable_data(),
                       packed.num_tokens.mutable_data()};
  {
    const py::gil_scoped_release release;
    AssembleRows(plans, indices, rows, num_rows, shape, batch);
  }
  return packed;
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
          "Count of slots that are not padding: corpus tokens and added specials.")
      .def_property_readonly(
          "num_documents", [](const RowPlan& p) { return p.counts().documents; },
          "Number of documents that were kept.")
      .def_property_readonly("dropped_documents",
                             [](const RowPlan& p) { return p.counts().dropped_documents; })
      .def_property_readonly("dropped_tokens",
                             [](const RowPlan& p) { return p.counts().dropped_tokens; })
      .def_property_readonly(
          "cut_documents", [](const RowPlan& p) { return p.counts().cut_documents; },
          "Number of documents of more than one piece.");
}

void BindPlan(py::module_& module) {
  py::class_<RowPieces>(module, "RowPieces", R"(
Pieces of m rows, by document inside a row: n pieces in all.

Row i has the pieces splits[i] to splits[i + 1].)")
      .def_readonly("splits", &RowPieces::splits, "int64[m + 1]: first piece of each row, then n.")
      .def_readonly("document", &RowPieces::document, "int64[n]: document of the corpus.")
      .def_readonly("offset", &RowPieces::offset, "int64[n]: its first token of the document.")
      .def_readonly("length", &RowPieces::length, "int32[n]: its corpus tokens, without specials.")
      .def_readonly("cls", &RowPieces::cls, "bool[n]: it carries an added [CLS] too.")
      .def_readonly("sep", &RowPieces::sep, "bool[n]: it carries an added [SEP] too.")
      .def_readonly("ends_document", &RowPieces::ends_document,
                    "bool[n]: it holds the last slot of its document.");
  py::class_<RowPlan> plan(module, "RowPlan", R"(
A plan file, memory-mapped, with the corpus whose documents it packs into rows.

Opening checks all but the rows themselves; those of 65,536 documents are checked when first used.
Raises OSError if the file cannot be opened, ValueError naming file, byte and remedy if it is
damaged or was built for other documents. Threads may share a plan.)");
  plan.def(py::init([](const std::filesystem::path& path, const AnyCorpus& corpus) {
             const py::gil_scoped_release release;
             return std::make_unique<RowPlan>(path.string(), ToCorpus(corpus));
           }),
           py::arg("path"), py::arg("corpus").none(false));
  BindRules(plan);
  BindCounts(plan);
  plan.def("pieces", &ListRowPieces, py::arg("rows"), R"(
Return the pieces of rows, int64[m]; IndexError outside the plan.)")
      .def("row_tokens", &CountRowTokenArray, py::arg("rows"), R"(
Count the slots of rows, int64[m], that are not padding: int32[m].)")
      .def("find", &FindRowArray, py::arg("document"), R"(
Return the rows that hold a piece of a document, ascending: int64[k], empty if it was dropped.

IndexError if the plan is for other documents.)");
}

void BindPlanBuilder(py::module_& module) {
  module.def("build_row_plan", &BuildPlan, py::arg("corpus").none(false), py::arg("path"),
             py::kw_only(), py::arg("first_document"), py::arg("end_document"),
             py::arg("seq_length"), py::arg("pack"), py::arg("specials"), py::arg("min_doc_tokens"),
             py::arg("max_segments_per_row"), py::arg("block_documents") = kMaxBlockDocuments,
             py::arg("bodies") = true, py::arg("threads") = 0, py::arg("progress") = py::none(),
             R"(
Plan the rows of documents [first_document, end_document) of a corpus, into the file `path`.

It appears when it is complete; a file that is there already stays. Its bytes depend on the lengths
and the rules alone, whatever the number of threads (0: one per processor). Memory does not grow
with the corpus: at most 32 bytes per document of the blocks at work, one of 65,536 documents per
thread (docs/order.md, sections 5 and 11).

Args:
    pack: 'bfd' (best-fit decreasing), 'concat' (one stream, cut into rows) or 'none' (each piece
        is a row).
    specials: 'add' puts [CLS] and [SEP] around pieces (concat: documents), 'present' nothing.
    max_segments_per_row: most pieces of a row; 1 for concat and none.
    bodies: False stores a table of the blocks only; RowPlan computes their rows when needed.
    progress: called about ten times a second with the number of documents done; may raise to
        give up.

Raises:
    ValueError: naming the rule that is out of range or the document with an impossible length.
    OSError: the file cannot be written. Nothing is left then.)");
}

void BindAssembly(py::module_& module) {
  py::class_<PackedRows>(module, "PackedRows", R"(
Packed stream of m rows of L slots, each of S + 1 segments.

The segments of a row are its pieces (one segment for all of them if its plan's pack is 'concat'),
its padding tail, and empty ones.)")
      .def_readonly("tokens", &PackedRows::tokens, "int64[m*L].")
      .def_readonly("position_ids", &PackedRows::position_ids,
                    "int64[m*L], from 0 in each segment, the padding tail included.")
      .def_readonly("cu_seqlens", &PackedRows::cu_seqlens,
                    "int32[m*(S+1) + 1], non-decreasing, over the whole stream.")
      .def_readonly("segment_kind", &PackedRows::segment_kind, R"(
uint8[m*(S+1)]: 0 padding or empty, 1 a piece that does not end its document, 2 one that does.)")
      .def_readonly("num_tokens", &PackedRows::num_tokens, "int64[m], slots that are not padding.");
  module.def("assemble_rows", &AssemblePackedRows, py::arg("plans"), py::arg("source_index"),
             py::arg("row"), py::kw_only(), py::arg("seq_length"), py::arg("max_segments_per_row"),
             py::arg("cls_id"), py::arg("sep_id"), py::arg("pad_id"), R"(
Build the packed stream of m rows of L = seq_length slots, S = max_segments_per_row.

`plans` holds one entry per source. Row r is row[r] (int64[m]) of plans[source_index[r]] (int32[m]),
or idle (padding only) where both are -1. Special tokens are added where the plan says so
(docs/order.md, section 6).

Raises:
    ValueError: naming the plan that disagrees with the shape, or the row without a source.
    IndexError: a row is outside of its plan.)");
}

using SplitLosses = py::typing::Tuple<py::array_t<float>, py::array_t<uint32_t>, bool>;

SplitLosses SplitTrainedLossArrays(const Input<uint64_t>& entries) {
  const uint64_t* from = Values(entries, "entries");
  const int64_t count = entries.size();
  auto sums = NewArray<float>(count);
  auto tokens = NewArray<uint32_t>(count);
  float* sums_out = sums.mutable_data();
  uint32_t* tokens_out = tokens.mutable_data();
  bool are_trained = false;
  {
    const py::gil_scoped_release release;
    are_trained = SplitTrainedLosses(from, count, sums_out, tokens_out);
  }
  return py::make_tuple(sums, tokens, are_trained);
}

using LossesAbove = py::typing::Tuple<py::array_t<int64_t>, bool>;

LossesAbove FindLossesAboveArray(const Input<uint64_t>& entries, const Input<float>& limits) {
  const uint64_t* from = Values(entries, "entries");
  const float* limits_from = Values(limits, "limits", entries.size());
  std::vector<int64_t> places;
  bool are_trained = false;
  {
    const py::gil_scoped_release release;
    are_trained = FindLossesAbove(from, entries.size(), limits_from, &places);
  }
  auto found = NewArray<int64_t>(static_cast<int64_t>(places.size()));
  std::copy(places.begin(), places.end(), found.mutable_data());
  return py::make_tuple(found, are_trained);
}

void BindLosses(py::module_& module) {
  module.def("split_trained_losses", &SplitTrainedLossArrays, py::arg("entries"), R"(
Split the entries of a file of row losses, uint64[n], in one pass (docs/ledger.md, section 7).

Returns:
    sums: float32[n], summed losses.
    tokens: uint32[n], the tokens over which they are averaged.
    are_trained: every row was trained on, and has tokens and a finite sum; if not, the arrays mean
        nothing.)");
  module.def("find_losses_above", &FindLossesAboveArray, py::arg("entries"), py::arg("limits"), R"(
Find rows by their mean loss in the entries of a file of row losses, uint64[n], in one pass.

Returns:
    places: int64[k], ascending: rows with sum > tokens * limits[place], in float32.
    are_trained: as of split_trained_losses.

Raises:
    ValueError: `limits`, float32[n], has another size.)");
}

}  // namespace

void BindRows(py::module_& module) {
  BindPlan(module);
  BindPlanBuilder(module);
  BindAssembly(module);
  BindLosses(module);
}

}  // namespace megatron_ettin
