#include "text_hasher.h"

#include <dlfcn.h>

#include <cerrno>
#include <memory>
#include <stdexcept>

#include "file_io.h"

namespace megatron_ettin {
namespace {

// Finds a function in `library` or in a library that it is linked to.
template <typename Function>
void Find(void* handle, const std::string& library, const char* name, Function** function) {
  *function = reinterpret_cast<Function*>(dlsym(handle, name));
  if (*function == nullptr) throw IoError(ENOSYS, std::string("no function ") + name, library);
}

void Check(int is_done) {
  if (is_done != 1) throw std::runtime_error("OpenSSL cannot compute SHA-256");
}

}  // namespace

TextHasher::TextHasher(const std::string& library) {
  // The library stays loaded: Python never unloads a module.
  void* handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (handle == nullptr) throw IoError(ENOENT, "not loaded", library);
  Find(handle, library, "EVP_MD_CTX_new", &new_context_);
  Find(handle, library, "EVP_MD_CTX_free", &free_context_);
  Find(handle, library, "EVP_sha256", &sha256_);
  Find(handle, library, "EVP_DigestInit_ex", &begin_);
  Find(handle, library, "EVP_DigestUpdate", &update_);
  Find(handle, library, "EVP_DigestFinal_ex", &finish_);
}

void TextHasher::Hash(const std::vector<std::string_view>& texts, uint8_t* digests) const {
  const std::unique_ptr<void, void (*)(void*)> context(new_context_(), free_context_);
  if (context == nullptr) throw std::bad_alloc();
  const void* algorithm = sha256_();
  for (const std::string_view text : texts) {
    // Naming the algorithm again would look it up anew.
    Check(begin_(context.get(), algorithm, nullptr));
    algorithm = nullptr;
    Check(update_(context.get(), text.data(), text.size()));
    Check(finish_(context.get(), digests, nullptr));
    digests += kDigestBytes;
  }
}

}  // namespace megatron_ettin
