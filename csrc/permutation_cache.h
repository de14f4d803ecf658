// Keeps the permutations used last: a small one is a table that takes about 0.3 ms to fill, and
// queries jump between the epochs of small pools.
#ifndef MEGATRON_ETTIN_PERMUTATION_CACHE_H_
#define MEGATRON_ETTIN_PERMUTATION_CACHE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "permutation.h"

namespace megatron_ettin {

class PermutationCache {
 public:
  using Shared = std::shared_ptr<const Permutation>;

  // Returns the permutation of [0, n) with that key. Thread-safe; the result stays valid when the
  // cache drops it.
  Shared Get(uint64_t n, uint64_t key);

 private:
  // Tables of 2^16 entries, there and back, are 256 KiB: at most 16 MiB in all.
  static constexpr size_t kMaxEntries = 64;

  struct Entry {
    uint64_t n;
    uint64_t key;
    uint64_t last_use;
    Shared permutation;
  };

  Shared Find(uint64_t n, uint64_t key);
  Shared Keep(uint64_t n, uint64_t key, Shared permutation);

  std::mutex mutex_;
  uint64_t uses_ = 0;
  std::vector<Entry> entries_;
};

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_PERMUTATION_CACHE_H_
