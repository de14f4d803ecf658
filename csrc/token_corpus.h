// A corpus: one .bin/.idx pair or several, its shards, whose documents are numbered through.
#ifndef MEGATRON_ETTIN_TOKEN_CORPUS_H_
#define MEGATRON_ETTIN_TOKEN_CORPUS_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "token_file.h"

namespace megatron_ettin {

class TokenCorpus {
 public:
  using Shards = std::vector<std::shared_ptr<const TokenFile>>;

  // A document of the corpus as its shard knows it.
  struct Place {
    const TokenFile& shard;
    int64_t document;
  };

  // Shards may be empty, and may have different types of tokens. Throws std::invalid_argument if
  // there is none.
  explicit TokenCorpus(Shards shards);

  const Shards& shards() const { return shards_; }
  int64_t num_documents() const { return begins_.back(); }
  int64_t num_tokens() const { return num_tokens_; }

  // Names the corpus in messages: the prefix of its shard, or of the first and the last, each with
  // this suffix.
  std::string Name(const std::string& suffix = "") const;

  // The document must be one of the corpus. A corpus of one pair costs one comparison.
  Place Find(int64_t document) const {
    if (only_ != nullptr) return {*only_, document};
    const auto shard = FindShard(document);
    return {*shards_[shard], document - begins_[shard]};
  }

  // As those of TokenFile.
  int64_t DocumentLength(int64_t document) const {
    const Place place = Find(document);
    return place.shard.DocumentLength(place.document);
  }
  int64_t PlannedLength(int64_t document) const {
    const Place place = Find(document);
    return place.shard.PlannedLength(place.document);
  }
  void CopyLengths(int64_t first, int64_t last, int64_t* to) const;

  // True if the last batch of this corpus was in memory: a guess for the next one.
  bool in_memory() const { return in_memory_.load(std::memory_order_relaxed); }
  void set_in_memory(bool value) const { in_memory_.store(value, std::memory_order_relaxed); }

 private:
  // The last shard that begins at or before the document: empty ones before it begin there too.
  int64_t FindShard(int64_t document) const {
    return std::upper_bound(begins_.begin(), begins_.end(), document) - begins_.begin() - 1;
  }

  const Shards shards_;
  const TokenFile* const only_;  // null if there are several
  std::vector<int64_t> begins_;  // the first document of each shard, then num_documents()
  int64_t num_tokens_ = 0;
  mutable std::atomic<bool> in_memory_{false};
};

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_TOKEN_CORPUS_H_
