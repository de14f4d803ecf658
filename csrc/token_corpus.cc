#include "token_corpus.h"

#include <stdexcept>
#include <utility>

namespace megatron_ettin {

TokenCorpus::TokenCorpus(Shards shards)
    : shards_(std::move(shards)), only_(shards_.size() == 1 ? shards_[0].get() : nullptr) {
  if (shards_.empty()) throw std::invalid_argument("a corpus needs at least one shard");
  begins_.push_back(0);
  for (const auto& shard : shards_) {
    begins_.push_back(begins_.back() + shard->num_documents());
    num_tokens_ += shard->num_tokens();
  }
}

std::string TokenCorpus::Name(const std::string& suffix) const {
  if (only_ != nullptr) return only_->prefix() + suffix;
  return shards_.front()->prefix() + suffix + " to " + shards_.back()->prefix() + suffix + " (" +
         std::to_string(shards_.size()) + " shards)";
}

void TokenCorpus::CopyLengths(int64_t first, int64_t last, int64_t* to) const {
  while (first < last) {
    const int64_t shard = FindShard(first);
    const int64_t end = std::min(last, begins_[shard + 1]);
    shards_[shard]->CopyLengths(first - begins_[shard], end - begins_[shard], to);
    to += end - first;
    first = end;
  }
}

}  // namespace megatron_ettin
