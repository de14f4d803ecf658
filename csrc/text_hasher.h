// SHA-256 of many short texts, by the OpenSSL that Python's hashlib has loaded already: no headers
// and no second copy of the library are needed.
#ifndef MEGATRON_ETTIN_TEXT_HASHER_H_
#define MEGATRON_ETTIN_TEXT_HASHER_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace megatron_ettin {

class TextHasher {
 public:
  static constexpr size_t kDigestBytes = 32;

  // `library` is the path of a loaded library that is linked to libcrypto. Throws IoError if it is
  // not loaded or offers no SHA-256.
  explicit TextHasher(const std::string& library);

  // Writes kDigestBytes for each text. Threads may call it at the same time.
  void Hash(const std::vector<std::string_view>& texts, uint8_t* digests) const;

 private:
  // As <openssl/evp.h> declares them, with its structures left opaque.
  void* (*new_context_)();
  void (*free_context_)(void*);
  const void* (*sha256_)();
  int (*begin_)(void*, const void*, void*);
  int (*update_)(void*, const void*, size_t);
  int (*finish_)(void*, unsigned char*, unsigned int*);
};

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_TEXT_HASHER_H_
