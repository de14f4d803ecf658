// The extension module: its parts, and C++ errors as Python exceptions.
#include "bindings.h"

#include "file_io.h"

namespace py = pybind11;
namespace me = megatron_ettin;

PYBIND11_MODULE(_native, module) {
  module.doc() = "C++ algorithms of megatron_ettin; use megatron_ettin.native.";
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const me::IoError& error) {
      // OSError picks the subclass (FileNotFoundError, ...) from the code.
      py::set_error(PyExc_OSError, py::make_tuple(error.code(), error.reason(), error.path()));
    }
  });
  me::BindTokenFiles(module);
  me::BindOrder(module);
  me::BindRows(module);
  me::BindDraws(module);
  me::BindDigests(module);
  me::BindTexts(module);
  me::BindScans(module);
}
