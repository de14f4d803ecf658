// Python classes TokenFileBuilder, TokenFile and TokenCorpus, and the headers of Parquet pages.
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <vector>

#include "bindings.h"
#include "page_headers.h"
#include "token_corpus.h"
#include "token_file.h"
#include "token_file_builder.h"

namespace py = pybind11;

namespace megatron_ettin {
namespace {

using TokenArray = py::typing::Union<py::array_t<uint16_t>, py::array_t<int32_t>,
                                     py::array_t<uint32_t>, py::array_t<int64_t>>;
using LengthArray = py::typing::Union<py::array_t<int32_t>, py::array_t<int64_t>>;

// Tokens of several pages.
constexpr int64_t kFetchedTokens = 4096;

TokenType ParseTokenType(const std::string& dtype) {
  if (dtype == "uint16") return TokenType::kUint16;
  if (dtype == "int32") return TokenType::kInt32;
  throw std::invalid_argument("dtype is '" + dtype + "'; it must be 'uint16' or 'int32'");
}

template <typename T>
void AddTyped(TokenFileBuilder& builder, const py::array& tokens,
              const std::vector<int64_t>& lengths) {
  const auto typed = Input<T>::ensure(tokens);
  if (!typed) throw py::type_error("tokens cannot be read as a contiguous array");
  const T* data = Values(typed, "tokens");
  const int64_t size = typed.size();
  const py::gil_scoped_release release;
  builder.AddMany(data, size, lengths.data(), static_cast<int64_t>(lengths.size()));
}

py::array ToArray(const TokenArray& tokens) {
  if (!py::isinstance<py::array>(tokens)) throw py::type_error("tokens must be a numpy array");
  return py::reinterpret_borrow<py::array>(tokens);
}

void AddDocuments(TokenFileBuilder& builder, const py::array& tokens,
                  const std::vector<int64_t>& lengths) {
  const char kind = tokens.dtype().kind();
  const py::ssize_t size = tokens.itemsize();
  if (kind == 'u' && size == 2) return AddTyped<uint16_t>(builder, tokens, lengths);
  if (kind == 'i' && size == 4) return AddTyped<int32_t>(builder, tokens, lengths);
  if (kind == 'u' && size == 4) return AddTyped<uint32_t>(builder, tokens, lengths);
  if (kind == 'i' && size == 8) return AddTyped<int64_t>(builder, tokens, lengths);
  throw py::type_error("tokens must be uint16, int32, uint32 or int64, not " +
                       py::cast<std::string>(py::str(tokens.dtype())));
}

LengthArray ViewLengths(const py::object& self) {
  const auto& file = self.cast<const TokenFile&>();
  const int64_t count = file.num_documents();
  if (file.one_sequence_per_document()) {
    return ReadOnlyView(reinterpret_cast<const int32_t*>(file.raw_lengths()), count, self);
  }
  auto lengths = NewArray<int64_t>(count);
  int64_t* out = lengths.mutable_data();
  {
    const py::gil_scoped_release release;
    for (int64_t document = 0; document < count; ++document) {
      out[document] = file.DocumentLength(document);
    }
  }
  lengths.attr("setflags")(py::arg("write") = false);
  return lengths;
}

py::array_t<int64_t> ReadLengths(const TokenFile& file, int64_t first, int64_t end) {
  if (first < 0 || end < first || end > file.num_documents()) {
    throw std::out_of_range(file.prefix() + ": documents [" + std::to_string(first) + ", " +
                            std::to_string(end) + ") of " + std::to_string(file.num_documents()));
  }
  auto lengths = NewArray<int64_t>(end - first);
  int64_t* out = lengths.mutable_data();
  const py::gil_scoped_release release;
  file.CopyLengths(first, end, out);
  return lengths;
}

py::array_t<int64_t> CopyDocumentTokens(const TokenFile& file, int64_t document, int64_t offset,
                                        std::optional<int64_t> length) {
  if (document < 0 || document >= file.num_documents()) {
    throw std::out_of_range(file.prefix() + ": document " + std::to_string(document) + " of " +
                            std::to_string(file.num_documents()));
  }
  const int64_t available = file.DocumentLength(document);
  const int64_t count = length.value_or(available - offset);
  if (offset < 0 || count < 0 || offset > available || count > available - offset) {
    throw std::out_of_range(file.prefix() + ": document " + std::to_string(document) + " has " +
                            std::to_string(available) + " tokens; there are no " +
                            std::to_string(count) + " at offset " + std::to_string(offset));
  }
  auto tokens = NewArray<int64_t>(count);
  const int64_t begin = file.DocumentBegin(document) + offset;
  // Pages that are touched are read one by one; a few in one go.
  if (count >= kFetchedTokens) file.FetchTokens(begin, count);
  file.CopyTokens(begin, count, tokens.mutable_data());
  return tokens;
}

using SharedFile = std::shared_ptr<TokenFile>;

std::shared_ptr<TokenCorpus> MakeCorpus(const std::vector<SharedFile>& shards) {
  for (const SharedFile& shard : shards) {
    if (shard == nullptr) throw py::type_error("a shard may not be None");
  }
  return std::make_shared<TokenCorpus>(TokenCorpus::Shards(shards.begin(), shards.end()));
}

std::string WidestType(const TokenCorpus& corpus) {
  TokenType widest = TokenType::kUint16;
  for (const auto& shard : corpus.shards()) {
    if (shard->type() == TokenType::kInt32) widest = TokenType::kInt32;
  }
  return TypeName(widest);
}

TokenCorpus::Place FindDocument(const TokenCorpus& corpus, int64_t document) {
  if (document < 0 || document >= corpus.num_documents()) {
    throw std::out_of_range(corpus.Name() + ": document " + std::to_string(document) + " of " +
                            std::to_string(corpus.num_documents()));
  }
  return corpus.Find(document);
}

py::array_t<int64_t> ReadCorpusLengths(const TokenCorpus& corpus, int64_t first, int64_t end) {
  if (first < 0 || end < first || end > corpus.num_documents()) {
    throw std::out_of_range(corpus.Name() + ": documents [" + std::to_string(first) + ", " +
                            std::to_string(end) + ") of " + std::to_string(corpus.num_documents()));
  }
  auto lengths = NewArray<int64_t>(end - first);
  int64_t* out = lengths.mutable_data();
  const py::gil_scoped_release release;
  corpus.CopyLengths(first, end, out);
  return lengths;
}

void BindBuilder(py::module_& module) {
  py::class_<TokenFileBuilder>(module, "TokenFileBuilder", R"(
Write a Megatron .bin/.idx pair, streaming, in constant memory.

PREFIX.bin.tmp and PREFIX.idx.tmp are written; commit() renames them, the .idx last. An object that
is destroyed uncommitted removes them. dtype: 'uint16' or 'int32'. For one thread at a time. Raises
OSError for the file system, ValueError if another writer holds the prefix.)")
      .def(py::init([](const std::filesystem::path& prefix, const std::string& dtype) {
             return std::make_unique<TokenFileBuilder>(prefix.string(), ParseTokenType(dtype));
           }),
           py::arg("prefix"), py::arg("dtype"))
      .def(
          "add",
          [](TokenFileBuilder& builder, const TokenArray& tokens) {
            const py::array ids = ToArray(tokens);
            AddDocuments(builder, ids, {static_cast<int64_t>(ids.size())});
          },
          py::arg("tokens"), R"(
Add one document: its token ids, 1-D.

Raises ValueError naming document, position and id if an id does not fit the dtype; nothing is added
then.)")
      .def(
          "add_many",
          [](TokenFileBuilder& builder, const TokenArray& tokens, const Input<int64_t>& lengths) {
            const int64_t* values = Values(lengths, "lengths");
            AddDocuments(builder, ToArray(tokens),
                         std::vector<int64_t>(values, values + lengths.size()));
          },
          py::arg("tokens"), py::arg("lengths"), R"(
Add documents stored end to end: ids as in add(), lengths that sum to their number.)")
      .def(
          "commit",
          [](TokenFileBuilder& builder, const std::optional<std::filesystem::path>& companion) {
            const py::gil_scoped_release release;
            builder.Commit(companion.value_or("").string());
          },
          py::arg("companion") = py::none(), R"(
Publish the pair durably, the .idx last; replaces an existing pair.

companion: a file of the same folder that describes the pair. COMPANION.tmp, written and synced by
the caller, takes its name before the .idx does.)")
      .def("abort", &TokenFileBuilder::Abort, py::call_guard<py::gil_scoped_release>(), R"(
Remove what was written; no effect after commit() or a second time.)")
      .def_property_readonly("num_documents", &TokenFileBuilder::num_documents)
      .def_property_readonly("num_tokens", &TokenFileBuilder::num_tokens);
}

void BindReader(py::module_& module) {
  py::class_<TokenFile, SharedFile>(module, "TokenFile", R"(
Read a Megatron .bin/.idx pair through memory maps.

Opening checks the index against itself and the size of the .bin; check=False reads the header and
the sizes only, for a pair that was checked before. Raises OSError if a file cannot be opened,
ValueError naming file, byte and remedy if the pair is not valid.)")
      .def(py::init([](const std::filesystem::path& prefix, bool check) {
             const py::gil_scoped_release release;
             return std::make_shared<TokenFile>(prefix.string(), check);
           }),
           py::arg("prefix"), py::kw_only(), py::arg("check") = true)
      .def_property_readonly("prefix", &TokenFile::prefix)
      .def_property_readonly("num_documents", &TokenFile::num_documents)
      .def_property_readonly("num_tokens", &TokenFile::num_tokens)
      .def_property_readonly(
          "dtype", [](const TokenFile& file) { return std::string(TypeName(file.type())); },
          "'uint16' or 'int32'.")
      .def_property_readonly("lengths", &ViewLengths, R"(
Tokens per document, read-only.

An int32 view of the .idx if each document is one sequence, else int64 sums that are computed on
each access. For single documents: each page that is touched is read alone.)")
      .def("read_lengths", &ReadLengths, py::arg("first"), py::arg("end"), R"(
Copy the tokens per document of documents [first, end): int64[end - first].

For passes over many: the file is read ahead and stays out of this process's memory. IndexError
outside.)")
      .def("tokens", &CopyDocumentTokens, py::arg("document"), py::arg("offset") = 0,
           py::arg("length") = py::none(), R"(
Copy `length` tokens of one document from `offset` on, or all that follow: int64[length].

IndexError outside of the document.)")
      .def("check_tokens", &TokenFile::CheckTokens, py::arg("vocab_size"),
           py::call_guard<py::gil_scoped_release>(), R"(
Read the whole .bin; ValueError naming file, byte, document, position and id of the first id outside
[0, vocab_size).)");
}

void BindCorpus(py::module_& module) {
  py::class_<TokenCorpus, std::shared_ptr<TokenCorpus>>(module, "TokenCorpus", R"(
Read one .bin/.idx pair or several, its shards, as one corpus: documents are numbered through.

Shards may be empty, and may have different dtypes. ValueError if there is none.)")
      .def(py::init(&MakeCorpus), py::arg("shards"))
      .def_property_readonly(
          "shards",
          [](const TokenCorpus& corpus) {
            std::vector<SharedFile> shards;
            for (const auto& shard : corpus.shards()) {
              shards.push_back(std::const_pointer_cast<TokenFile>(shard));
            }
            return shards;
          },
          "The pairs, in the order of their documents.")
      .def_property_readonly("num_documents", &TokenCorpus::num_documents)
      .def_property_readonly("num_tokens", &TokenCorpus::num_tokens)
      .def_property_readonly("dtype", &WidestType, "'int32' if a shard has it, else 'uint16'.")
      .def(
          "length",
          [](const TokenCorpus& corpus, int64_t document) {
            const TokenCorpus::Place place = FindDocument(corpus, document);
            return place.shard.DocumentLength(place.document);
          },
          py::arg("document"), R"(
Return the tokens of one document; IndexError if there is no such document.)")
      .def("read_lengths", &ReadCorpusLengths, py::arg("first"), py::arg("end"), R"(
Copy the tokens per document of documents [first, end), as TokenFile.read_lengths does.)")
      .def(
          "tokens",
          [](const TokenCorpus& corpus, int64_t document, int64_t offset,
             std::optional<int64_t> length) {
            const TokenCorpus::Place place = FindDocument(corpus, document);
            return CopyDocumentTokens(place.shard, place.document, offset, length);
          },
          py::arg("document"), py::arg("offset") = 0, py::arg("length") = py::none(), R"(
Copy tokens of one document, as TokenFile.tokens does.)");
}

py::array_t<int64_t> ReadPageHeaderArray(const std::filesystem::path& path, int64_t begin,
                                         int64_t end) {
  std::vector<PageHeader> headers;
  {
    const py::gil_scoped_release release;
    headers = ReadPageHeaders(path.string(), begin, end);
  }
  constexpr py::ssize_t kFields = 5;
  py::array_t<int64_t> table({static_cast<py::ssize_t>(headers.size()), kFields});
  int64_t* to = table.mutable_data();
  for (const PageHeader& header : headers) {
    for (const int64_t value : {header.offset, header.header_bytes, header.compressed_bytes,
                                header.uncompressed_bytes, header.num_rows}) {
      *to++ = value;
    }
  }
  return table;
}

void BindPageHeaders(py::module_& module) {
  module.def("page_headers", &ReadPageHeaderArray, py::arg("path"), py::arg("begin"),
             py::arg("end"), R"(
Read the headers of the data pages of a column chunk, the bytes [begin, end) of a Parquet file.

Returns:
    int64[n, 5]: the header's first byte in the file, its bytes, those of the page after it,
    compressed and not, and the page's rows.

Raises:
    ValueError: naming the byte where no header of a data page is.
    OSError: the file cannot be read.)");
}

}  // namespace

void BindTokenFiles(py::module_& module) {
  BindBuilder(module);
  BindReader(module);
  BindCorpus(module);
  BindPageHeaders(module);
}

}  // namespace megatron_ettin
