// Sequences of n words that occur in a list of passages, each with a number.
#ifndef MEGATRON_ETTIN_WORD_GRAMS_H_
#define MEGATRON_ETTIN_WORD_GRAMS_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "word_rules.h"

namespace megatron_ettin {

// Hash of a word that is read in parts: those of its parts can be joined.
class WordHash {
 public:
  static constexpr uint64_t kFactor = 0x9E3779B97F4A7C15;

  static uint64_t OfPart(std::string_view part) {
    uint64_t hash = 0;
    for (const char byte : part) hash = hash * kFactor + static_cast<uint8_t>(byte) + 1;
    return hash;
  }
  // kFactor to the power of each length up to `longest`: hash(a b) = hash(a) power(b) + hash(b).
  static std::vector<uint64_t> Powers(size_t longest);
};

// Hash of the last n words, as one word after the other is added.
class GramHash {
 public:
  explicit GramHash(int64_t n);

  // Adds the hash of a word.
  void Add(uint64_t word) {
    const uint64_t mixed = Mix(word);
    sum_ = (sum_ - ring_[oldest_] * power_) * kFactor + mixed;
    ring_[oldest_] = mixed;
    if (++oldest_ == n_) oldest_ = 0;
    if (count_ < n_) ++count_;
  }
  void Clear();
  bool is_full() const { return count_ == n_; }
  uint64_t value() const { return Mix(sum_); }

 private:
  static constexpr uint64_t kFactor = 0xD6E8FEB86659FD93;
  static uint64_t Mix(uint64_t x) {
    x = (x ^ (x >> 32)) * 0xE9846AF9B1A615DD;
    x = (x ^ (x >> 32)) * 0xE9846AF9B1A615DD;
    return x ^ (x >> 28);
  }

  int64_t n_;
  int64_t count_ = 0;   // words, at most n
  int64_t oldest_ = 0;  // place of the oldest word in the ring
  uint64_t sum_ = 0;
  uint64_t power_ = 1;          // kFactor^(n - 1)
  std::vector<uint64_t> ring_;  // 0 for words that are not there yet
};

class WordGrams {
 public:
  // Numbers the sequences of n words of each passage; equal ones have one number. They are counted
  // from 0 in the order in which they first occur. Throws std::invalid_argument if n is not 1 to
  // 1,024, or there are more than 2^31 sequences.
  WordGrams(const WordRules& rules, const std::vector<std::string_view>& passages, int64_t n);

  int64_t n() const { return n_; }
  int64_t size() const { return static_cast<int64_t>(grams_.size()); }

  // The words of a passage, with a space between two of them.
  std::string_view words(int64_t passage) const {
    return std::string_view(pool_).substr(begins_[passage],
                                          begins_[passage + 1] - begins_[passage]);
  }
  int64_t num_passages() const { return static_cast<int64_t>(begins_.size()) - 1; }
  // Numbers of the sequences of all passages, one passage after the other.
  const std::vector<int64_t>& numbers() const { return numbers_; }
  // The first in numbers() of each passage, then their end.
  const std::vector<int64_t>& number_begins() const { return number_begins_; }

  // True if no sequence has this hash; false where one may have it. One read of memory.
  bool IsAbsent(uint64_t hash) const {
    return (filter_[(hash >> filter_shift_) >> 6] >> ((hash >> filter_shift_) & 63) & 1) == 0;
  }
  // Returns the number of the sequence with this hash that `is_it(words)` accepts, or -1.
  template <typename IsIt>
  int64_t Find(uint64_t hash, const IsIt& is_it) const {
    for (uint64_t slot = hash & slot_mask_;; slot = (slot + 1) & slot_mask_) {
      if (slots_[slot] < 0) return -1;
      const Gram& gram = grams_[slots_[slot]];
      if (gram.hash == hash && is_it(std::string_view(pool_).substr(gram.begin, gram.size))) {
        return slots_[slot];
      }
    }
  }

 private:
  struct Gram {
    uint64_t hash;
    int64_t begin;  // in the pool
    int32_t size;   // bytes
  };

  void AddPassage(std::string_view words);
  void Insert(uint64_t hash, int64_t begin, int64_t size);
  void Grow();
  void MakeFilter();

  const int64_t n_;
  std::string pool_;
  std::vector<int64_t> begins_{0};
  std::vector<int64_t> numbers_;
  std::vector<int64_t> number_begins_{0};
  std::vector<Gram> grams_;
  std::vector<int32_t> slots_;  // numbers of sequences by hash, -1 where free
  uint64_t slot_mask_ = 0;
  std::vector<uint64_t> filter_;
  int filter_shift_ = 0;
};

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_WORD_GRAMS_H_
