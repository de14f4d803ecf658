// XXH3-64 and XXH3-128 with seed 0 and the default secret, written from the specification that
// xxHash publishes (doc/xxhash_spec.md, version 0.2.0; the algorithms are Yann Collet's). Fast, not
// cryptographic.
#ifndef MEGATRON_ETTIN_XXH3_H_
#define MEGATRON_ETTIN_XXH3_H_

#include <cstddef>
#include <cstdint>

namespace megatron_ettin {

struct Hash128 {
  uint64_t low;
  uint64_t high;
};

uint64_t Xxh3_64(const void* data, size_t size);
Hash128 Xxh3_128(const void* data, size_t size);

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_XXH3_H_
