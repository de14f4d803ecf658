// Python classes TokenBytes, TextFinder, WordRules and GramFinder: passes over the tokens of a
// corpus.
#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "bindings.h"
#include "gram_finder.h"
#include "text_finder.h"
#include "token_bytes.h"
#include "token_corpus.h"
#include "word_rules.h"

namespace py = pybind11;

namespace megatron_ettin {
namespace {

using Columns = py::array_t<int64_t>;

std::shared_ptr<TokenBytes> MakeTokenBytes(
    const py::typing::Iterable<py::typing::Optional<py::bytes>>& tokens) {
  std::vector<std::optional<std::string>> bytes;
  for (const py::handle token : tokens) {
    if (token.is_none()) {
      bytes.emplace_back();
    } else {
      if (!py::isinstance<py::bytes>(token)) throw py::type_error("a token must be bytes or None");
      bytes.emplace_back(py::cast<std::string>(token));
    }
  }
  return std::make_shared<TokenBytes>(bytes);
}

// Returns the fields of structures of int64, one row each. Needs the GIL.
template <typename Item>
Columns AsRows(const std::vector<Item>& items) {
  constexpr auto kFields = static_cast<py::ssize_t>(sizeof(Item) / sizeof(int64_t));
  Columns rows({static_cast<py::ssize_t>(items.size()), kFields});
  if (!items.empty()) std::memcpy(rows.mutable_data(), items.data(), items.size() * sizeof(Item));
  return rows;
}

Columns FindText(const TextFinder& finder, const TokenCorpus& corpus, int64_t first, int64_t end,
                 int64_t threads) {
  std::vector<TextFinder::Hit> hits;
  {
    const py::gil_scoped_release release;
    hits = finder.Find(corpus, first, end, threads);
  }
  return AsRows(hits);
}

Columns FindTextIn(const TextFinder& finder, const TokenCorpus& corpus, int64_t document) {
  std::vector<TextFinder::Occurrence> found;
  {
    const py::gil_scoped_release release;
    found = finder.FindIn(corpus, document);
  }
  return AsRows(found);
}

Columns FindGrams(const GramFinder& finder, const TokenCorpus& corpus, int64_t first, int64_t end,
                  int64_t threads) {
  std::vector<GramFinder::Match> matches;
  {
    const py::gil_scoped_release release;
    matches = finder.Find(corpus, first, end, threads);
  }
  return AsRows(matches);
}

std::shared_ptr<TextFinder> MakeTextFinder(const std::shared_ptr<TokenBytes>& vocabulary,
                                           const py::bytes& text, const Input<int64_t>& counts) {
  const int64_t* values = Values(counts, "counts", vocabulary->size());
  std::string bytes = text;
  const py::gil_scoped_release release;
  return std::make_shared<TextFinder>(vocabulary, std::move(bytes), values);
}

std::shared_ptr<WordRules> MakeWordRules(const Input<uint8_t>& rules,
                                         const std::map<uint32_t, std::string>& replaced) {
  return std::make_shared<WordRules>(Values(rules, "rules", WordRules::kCharacters), replaced);
}

std::shared_ptr<GramFinder> MakeGramFinder(const std::shared_ptr<TokenBytes>& vocabulary,
                                           const std::shared_ptr<WordRules>& rules,
                                           const std::vector<std::string>& passages, int64_t n) {
  const py::gil_scoped_release release;
  return std::make_shared<GramFinder>(
      vocabulary, rules, std::vector<std::string_view>(passages.begin(), passages.end()), n);
}

py::str WordsOf(const GramFinder& finder, int64_t passage) {
  const WordGrams& grams = finder.grams();
  if (passage < 0 || passage >= grams.num_passages()) {
    throw std::out_of_range("passage " + std::to_string(passage) + " of " +
                            std::to_string(grams.num_passages()));
  }
  const std::string_view words = grams.words(passage);
  return py::str(words.data(), words.size());
}

Columns GramsOf(const GramFinder& finder, int64_t passage) {
  const WordGrams& grams = finder.grams();
  if (passage < 0 || passage >= grams.num_passages()) {
    throw std::out_of_range("passage " + std::to_string(passage) + " of " +
                            std::to_string(grams.num_passages()));
  }
  const int64_t begin = grams.number_begins()[passage];
  const int64_t size = grams.number_begins()[passage + 1] - begin;
  auto numbers = NewArray<int64_t>(size);
  std::copy_n(grams.numbers().begin() + begin, size, numbers.mutable_data());
  return numbers;
}

void BindTextFinder(py::module_& module) {
  py::class_<TokenBytes, std::shared_ptr<TokenBytes>>(module, "TokenBytes", R"(
The bytes of each token of a vocabulary, whose texts are the joined bytes of their tokens.

None stands for an id without text: a special token, or a hole.)")
      .def(py::init(&MakeTokenBytes), py::arg("tokens"))
      .def("__len__", &TokenBytes::size);
  py::class_<TextFinder, std::shared_ptr<TextFinder>>(module, "TextFinder", R"(
Find the documents of a corpus that contain a text, however it was cut into tokens.

counts: int64, one for each token: how often it occurs, roughly; for speed only. ValueError if the
text is empty.)")
      .def(py::init(&MakeTextFinder), py::arg("vocabulary"), py::arg("text"), py::arg("counts"))
      .def("find", &FindText, py::arg("corpus"), py::arg("first"), py::arg("end"),
           py::arg("threads") = 0, R"(
Return [n, 2]: each of the documents [first, end) that contains the text, and how often it does.

Occurrences may overlap. A token without text is part of none. threads: 0 for one a core. ValueError
naming file, document, position and id of a token outside the vocabulary; IndexError outside.)")
      .def("find_in", &FindTextIn, py::arg("corpus"), py::arg("document"), R"(
Return [n, 2]: for each occurrence in a document its tokens [begin, end), the fewest that hold it.)");
}

void BindGramFinder(py::module_& module) {
  py::class_<WordRules, std::shared_ptr<WordRules>>(module, "WordRules", R"(
Rules by which a text becomes words, character by character.

rules: uint8[0x110000], for each character 0: a letter of a word, 1: ends a word, 2: left out, 3: a
word of its own. replaced: what stands in a word in place of a character.)")
      .def(py::init(&MakeWordRules), py::arg("rules"), py::arg("replaced"))
      .def("words", &WordRules::Normalise, py::arg("text"), R"(
Return the words of a text with a space between two of them.)");
  py::class_<GramFinder, std::shared_ptr<GramFinder>>(module, "GramFinder", R"(
Find sequences of n words of some passages in the documents of a corpus, all in one pass.

Equal sequences have one number; they are counted from 0 in the order in which they first occur.
Memory: 24 bytes, 8 to 16 of a table and 2 to 4 of a filter for each, and the words of the passages.
ValueError if n is not 1 to 1,024.)")
      .def(py::init(&MakeGramFinder), py::arg("vocabulary"), py::arg("rules"), py::arg("passages"),
           py::arg("n"))
      .def_property_readonly(
          "num_grams", [](const GramFinder& finder) { return finder.grams().size(); },
          "Number of different sequences.")
      .def("words", &WordsOf, py::arg("passage"), R"(
Return the words of a passage with a space between two of them.)")
      .def("grams", &GramsOf, py::arg("passage"), R"(
Return int64[max(0, words - n + 1)]: the number of the sequence that begins at each word.)")
      .def("find", &FindGrams, py::arg("corpus"), py::arg("first"), py::arg("end"),
           py::arg("threads") = 0, R"(
Return [m, 4]: document, number of the sequence, tokens [begin, end), for each occurrence.

By documents [first, end), then by the last word; the tokens are the fewest that hold it. A token
without text ends a sequence. threads and errors as in TextFinder.find.)");
}

}  // namespace

void BindScans(py::module_& module) {
  BindTextFinder(module);
  BindGramFinder(module);
}

}  // namespace megatron_ettin
