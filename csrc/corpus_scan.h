// A pass over documents of a corpus by several threads, block by block, in memory that does not
// grow with the corpus.
#ifndef MEGATRON_ETTIN_CORPUS_SCAN_H_
#define MEGATRON_ETTIN_CORPUS_SCAN_H_

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "token_corpus.h"

namespace megatron_ettin {

// Documents of one shard with their tokens.
struct TokenBlock {
  int64_t index = 0;  // of the block in the pass
  const TokenFile* shard = nullptr;
  int64_t first_in_shard = 0;   // the first document, as the shard numbers it
  int64_t first_document = 0;   // the same, as the corpus numbers it
  std::vector<int64_t> begins;  // the first token of each document in the block, then their end
  std::vector<char> bytes;

  int64_t num_documents() const { return static_cast<int64_t>(begins.size()) - 1; }
  int64_t num_tokens() const { return begins.back(); }
  template <typename T>
  const T* tokens() const {
    return reinterpret_cast<const T*>(bytes.data());
  }

  // Says that a token id is outside the vocabulary, and where. `token` is its place in the block.
  [[noreturn]] void RefuseToken(int64_t token, int64_t vocab_size) const;
};

// Hands out blocks of whole documents, one thread at a time for the lengths only.
class BlockQueue {
 public:
  // Documents [first, last) of the corpus.
  BlockQueue(const TokenCorpus& corpus, int64_t first, int64_t last);

  // Fills the block with the next documents. Returns false if there are none left, or after Stop().
  bool Take(TokenBlock* block);
  void Stop();

 private:
  bool TakeDocuments(TokenBlock* block);
  void ReadLengths();

  const TokenCorpus& corpus_;
  const int64_t last_;

  std::mutex mutex_;  // guards the fields below
  int64_t next_;
  int64_t next_index_ = 0;
  std::vector<int64_t> lengths_;  // of documents from lengths_begin_ on
  int64_t lengths_begin_;
};

// Runs `work` in several threads (0: one for each core) and waits for them. If one throws, calls
// `stop`, which must make the others return, and throws the same.
void RunThreads(int64_t threads, const std::function<void()>& work,
                const std::function<void()>& stop);

// Calls scan(block, &items) for all blocks of documents [first, last), from several threads, and
// returns the items in the order of the documents.
template <typename Item, typename Scan>
std::vector<Item> ScanDocuments(const TokenCorpus& corpus, int64_t first, int64_t last,
                                int64_t threads, const Scan& scan) {
  BlockQueue queue(corpus, first, last);
  std::mutex mutex;
  std::map<int64_t, std::vector<Item>> by_block;
  const auto work = [&] {
    TokenBlock block;
    while (queue.Take(&block)) {
      std::vector<Item> items;
      scan(block, &items);
      if (items.empty()) continue;
      const std::lock_guard<std::mutex> lock(mutex);
      by_block.emplace(block.index, std::move(items));
    }
  };
  RunThreads(threads, work, [&] { queue.Stop(); });
  std::vector<Item> all;
  for (auto& entry : by_block) all.insert(all.end(), entry.second.begin(), entry.second.end());
  return all;
}

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_CORPUS_SCAN_H_
