#include "permutation_cache.h"

#include <algorithm>
#include <utility>

namespace megatron_ettin {

PermutationCache::Shared PermutationCache::Get(uint64_t n, uint64_t key) {
  // Without a table there is nothing worth keeping.
  if (n > Permutation::kTableLimit) return std::make_shared<const Permutation>(n, key);
  if (Shared found = Find(n, key)) return found;
  // Filled without the lock: threads that need others do not wait.
  return Keep(n, key, std::make_shared<const Permutation>(n, key));
}

PermutationCache::Shared PermutationCache::Find(uint64_t n, uint64_t key) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Entry& entry : entries_) {
    if (entry.key == key && entry.n == n) {
      entry.last_use = ++uses_;
      return entry.permutation;
    }
  }
  return nullptr;
}

// Another thread may have kept the same meanwhile; twice in the cache does no harm.
PermutationCache::Shared PermutationCache::Keep(uint64_t n, uint64_t key, Shared permutation) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Entry entry{n, key, ++uses_, permutation};
  if (entries_.size() < kMaxEntries) {
    entries_.push_back(std::move(entry));
  } else {
    *std::min_element(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) {
      return a.last_use < b.last_use;
    }) = std::move(entry);
  }
  return permutation;
}

}  // namespace megatron_ettin
