// Python functions of lists of texts.
#include <string_view>
#include <vector>

#include "bindings.h"
#include "text_hasher.h"
#include "text_search.h"

namespace py = pybind11;

namespace megatron_ettin {
namespace {

using Texts = py::typing::List<py::str>;

// Returns the UTF-8 of each text; valid while the list holds the texts. Needs the GIL.
std::vector<std::string_view> Utf8(const Texts& texts) {
  std::vector<std::string_view> views;
  views.reserve(texts.size());
  for (const py::handle text : texts) {
    Py_ssize_t size = 0;
    // Python keeps these bytes with the string, where the tokenizer finds them again.
    const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    if (data == nullptr) throw py::error_already_set();
    views.emplace_back(data, static_cast<size_t>(size));
  }
  return views;
}

py::array_t<uint8_t> HashTexts(const TextHasher& hasher, const Texts& texts) {
  const std::vector<std::string_view> views = Utf8(texts);
  py::array_t<uint8_t> digests(
      {static_cast<py::ssize_t>(views.size()), static_cast<py::ssize_t>(TextHasher::kDigestBytes)});
  uint8_t* to = digests.mutable_data();
  const py::gil_scoped_release release;
  hasher.Hash(views, to);
  return digests;
}

std::vector<int64_t> FindTextsWith(const Texts& texts, const Input<bool>& characters) {
  const bool* is_searched = Values(characters, "characters", kCodePoints);
  for (int64_t code = 0; code < 0x80; ++code) {
    if (is_searched[code]) throw std::invalid_argument("characters must leave out ASCII");
  }
  const std::vector<std::string_view> views = Utf8(texts);
  const py::gil_scoped_release release;
  return FindTexts(views, is_searched);
}

}  // namespace

void BindTexts(py::module_& module) {
  py::class_<TextHasher>(module, "TextHasher", R"(
SHA-256 of many texts in one call, by the OpenSSL that `library`, a loaded library, is linked to.

OSError if it is not loaded or offers no SHA-256. The path is that of Python's own `_hashlib`.)")
      .def(py::init<const std::string&>(), py::arg("library"))
      .def("sha256", &HashTexts, py::arg("texts"), R"(
Return [n, 32]: the SHA-256 of the UTF-8 of each text. The list must not change meanwhile.)");
  module.def("find_texts", &FindTextsWith, py::arg("texts"), py::arg("characters"), R"(
Return the indices of the texts with a character whose entry in bool[0x110000] is true.

No ASCII character may be among them; the list must not change meanwhile.)");
}

}  // namespace megatron_ettin
