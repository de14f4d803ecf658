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

// Hash of n words in a row, as one word after the other is added and the one n before it leaves.
class GramHash {
 public:
  explicit GramHash(int64_t n) : n_(n) {
    for (int64_t i = 1; i < n; ++i) power_ *= kFactor;
  }

  // Adds word i, the hashes of all words being `words`, and returns the hash of the last n. It
  // means something from i = n - 1 on.
  uint64_t Add(const uint64_t* words, int64_t i) {
    if (i >= n_) sum_ -= words[i - n_] * power_;
    sum_ = sum_ * kFactor + words[i];
    return Mix(sum_);
  }

  // Spreads the bits of a word's hash; Add() takes such ones.
  static uint64_t Mix(uint64_t x) {
    x = (x ^ (x >> 32)) * 0xE9846AF9B1A615DD;
    return x ^ (x >> 29);
  }

 private:
  static constexpr uint64_t kFactor = 0xD6E8FEB86659FD93;

  int64_t n_;
  uint64_t sum_ = 0;
  uint64_t power_ = 1;  // kFactor^(n - 1)
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
    const uint64_t bits = FilterBits(hash);
    return (filter_[hash >> filter_shift_] & bits) != bits;
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

  // The three bits of a hash in its word of the filter.
  static uint64_t FilterBits(uint64_t hash) {
    return uint64_t{1} << (hash & 63) | uint64_t{1} << (hash >> 6 & 63) |
           uint64_t{1} << (hash >> 12 & 63);
  }
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
  std::vector<uint64_t> filter_;  // by the first bits of a hash
  int filter_shift_ = 0;
};

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_WORD_GRAMS_H_
