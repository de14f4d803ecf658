#include "corpus_scan.h"

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>

namespace megatron_ettin {
namespace {

constexpr int64_t kMaxThreads = 1024;
// A block of uint16 tokens and its copy from the page cache fit in the second-level cache.
constexpr int64_t kBlockTokens = int64_t{1} << 17;
constexpr int64_t kLengthsAtOnce = int64_t{1} << 16;

int64_t TokenAt(const TokenBlock& block, int64_t token) {
  if (block.shard->type() == TokenType::kUint16) return block.tokens<uint16_t>()[token];
  return block.tokens<int32_t>()[token];
}

}  // namespace

void TokenBlock::RefuseToken(int64_t token, int64_t vocab_size) const {
  // The last document that begins at or before the token: empty ones before it begin there too.
  const auto after = std::upper_bound(begins.begin(), begins.end(), token);
  const int64_t document = after - begins.begin() - 1;
  throw std::invalid_argument(
      BinPath(shard->prefix()) + ": document " + std::to_string(first_in_shard + document) +
      ", position " + std::to_string(token - begins[document]) + ": token id " +
      std::to_string(TokenAt(*this, token)) + " is outside the vocabulary of " +
      std::to_string(vocab_size) + "; name the tokenizer that the corpus was made with");
}

BlockQueue::BlockQueue(const TokenCorpus& corpus, int64_t first, int64_t last)
    : corpus_(corpus), last_(last), next_(first), lengths_begin_(first) {
  if (first < 0 || last < first || last > corpus.num_documents()) {
    throw std::out_of_range(corpus.Name() + ": documents [" + std::to_string(first) + ", " +
                            std::to_string(last) + ") of " +
                            std::to_string(corpus.num_documents()));
  }
}

void BlockQueue::ReadLengths() {
  lengths_begin_ = next_;
  lengths_.resize(std::min(kLengthsAtOnce, last_ - next_));
  corpus_.CopyLengths(next_, next_ + static_cast<int64_t>(lengths_.size()), lengths_.data());
}

bool BlockQueue::TakeDocuments(TokenBlock* block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (next_ == last_) return false;
  const TokenCorpus::Place place = corpus_.Find(next_);
  const int64_t end = std::min(last_, next_ + place.shard.num_documents() - place.document);
  block->index = next_index_++;
  block->shard = &place.shard;
  block->first_in_shard = place.document;
  block->first_document = next_;
  block->begins.assign(1, 0);
  while (next_ < end && block->num_tokens() < kBlockTokens) {
    if (next_ - lengths_begin_ >= static_cast<int64_t>(lengths_.size())) ReadLengths();
    block->begins.push_back(block->num_tokens() + lengths_[next_ - lengths_begin_]);
    ++next_;
  }
  return true;
}

bool BlockQueue::Take(TokenBlock* block) {
  if (!TakeDocuments(block)) return false;
  block->bytes.resize(block->num_tokens() * ItemSize(block->shard->type()));
  block->shard->ReadTokens(block->shard->DocumentBegin(block->first_in_shard), block->num_tokens(),
                           block->bytes.data());
  return true;
}

void BlockQueue::Stop() {
  const std::lock_guard<std::mutex> lock(mutex_);
  next_ = last_;
}

void RunThreads(int64_t threads, const std::function<void()>& work,
                const std::function<void()>& stop) {
  if (threads < 0 || threads > kMaxThreads) {
    throw std::invalid_argument("threads is " + std::to_string(threads) + "; it must be 0 to " +
                                std::to_string(kMaxThreads));
  }
  if (threads == 0) threads = std::max(1u, std::thread::hardware_concurrency());
  std::mutex mutex;
  std::exception_ptr error;
  const auto fail = [&] {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!error) error = std::current_exception();
    stop();
  };
  std::vector<std::thread> pool;
  // The threads must be joined even if one cannot be started.
  try {
    for (int64_t i = 0; i < threads; ++i) {
      pool.emplace_back([&] {
        try {
          work();
        } catch (...) {
          fail();
        }
      });
    }
  } catch (...) {
    fail();
  }
  for (std::thread& thread : pool) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace megatron_ettin
