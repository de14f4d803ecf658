// The part that the bindings_*.cc files share; they alone know Python. numpy arrays in and out, the
// GIL released around the work. Signatures and docstrings are stated here and nowhere else:
// `make stub` writes megatron_ettin/_native.pyi from the built module.
#ifndef MEGATRON_ETTIN_BINDINGS_H_
#define MEGATRON_ETTIN_BINDINGS_H_

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace megatron_ettin {

void BindTokenFiles(pybind11::module_& module);
void BindOrder(pybind11::module_& module);
void BindRows(pybind11::module_& module);
void BindDraws(pybind11::module_& module);
void BindDigests(pybind11::module_& module);
void BindTexts(pybind11::module_& module);
void BindScans(pybind11::module_& module);

// Without forcecast: an array that does not convert without loss is refused with a TypeError.
template <typename T>
using Input = pybind11::array_t<T, pybind11::array::c_style>;

// Returns the data of a 1-D input, of `size` values if size >= 0.
template <typename T>
const T* Values(const Input<T>& array, const char* name, pybind11::ssize_t size = -1) {
  if (array.ndim() != 1) throw std::invalid_argument(std::string(name) + " must be a 1-D array");
  if (size >= 0 && array.size() != size) {
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(array.size()) +
                                " values, expected " + std::to_string(size));
  }
  return array.data();
}

// Allocates an uninitialised 1-D result. Needs the GIL.
template <typename T>
pybind11::array_t<T> NewArray(int64_t size) {
  if (size < 0) throw std::invalid_argument("a count must be >= 0, got " + std::to_string(size));
  return pybind11::array_t<T>(static_cast<pybind11::ssize_t>(size));
}

// Wraps memory that `owner` keeps alive in a read-only array; it may be unaligned.
template <typename T>
pybind11::array ReadOnlyView(const T* data, int64_t size, const pybind11::object& owner) {
  pybind11::array view(pybind11::dtype::of<T>(), {static_cast<pybind11::ssize_t>(size)},
                       {static_cast<pybind11::ssize_t>(sizeof(T))}, data, owner);
  view.attr("setflags")(pybind11::arg("write") = false);
  return view;
}

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_BINDINGS_H_
