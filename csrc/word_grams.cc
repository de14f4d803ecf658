#include "word_grams.h"

#include <algorithm>
#include <stdexcept>

namespace megatron_ettin {
namespace {

constexpr int64_t kMaxWords = 1024;
constexpr size_t kFewestSlots = 1024;
// A filter with 64 bits for four sequences leaves one in 100 words of other texts to the table.
constexpr int kFewestFilterBits = 10;
constexpr size_t kGramsPerWord = 4;

}  // namespace

std::vector<uint64_t> WordHash::Powers(size_t longest) {
  std::vector<uint64_t> powers(longest + 1, 1);
  for (size_t i = 1; i <= longest; ++i) powers[i] = powers[i - 1] * kFactor;
  return powers;
}

WordGrams::WordGrams(const WordRules& rules, const std::vector<std::string_view>& passages,
                     int64_t n)
    : n_(n), slots_(kFewestSlots, -1), slot_mask_(kFewestSlots - 1) {
  if (n < 1 || n > kMaxWords) {
    throw std::invalid_argument("n is " + std::to_string(n) + "; it must be 1 to " +
                                std::to_string(kMaxWords));
  }
  for (const std::string_view passage : passages) AddPassage(rules.Normalise(passage));
  MakeFilter();
}

void WordGrams::AddPassage(std::string_view words) {
  const auto offset = static_cast<int64_t>(pool_.size());
  pool_ += words;
  begins_.push_back(static_cast<int64_t>(pool_.size()));
  std::vector<uint64_t> hashes;
  std::vector<int64_t> starts;
  GramHash hash(n_);
  for (size_t begin = 0; begin < words.size();) {
    const size_t end = std::min(words.find(WordRules::kBreak, begin), words.size());
    hashes.push_back(GramHash::Mix(WordHash::OfPart(words.substr(begin, end - begin))));
    starts.push_back(static_cast<int64_t>(begin));
    const auto last = static_cast<int64_t>(starts.size()) - 1;
    const uint64_t of_last_n = hash.Add(hashes.data(), last);
    if (last >= n_ - 1) {
      const int64_t first = starts[last - n_ + 1];
      Insert(of_last_n, offset + first, static_cast<int64_t>(end) - first);
    }
    begin = end + 1;
  }
  number_begins_.push_back(static_cast<int64_t>(numbers_.size()));
}

void WordGrams::Insert(uint64_t hash, int64_t begin, int64_t size) {
  const std::string_view words = std::string_view(pool_).substr(begin, size);
  int64_t number = Find(hash, [&](std::string_view other) { return other == words; });
  if (number < 0) {
    number = this->size();
    if (number == INT32_MAX || size > INT32_MAX) {
      throw std::invalid_argument("the passages have more than 2^31 sequences of words");
    }
    grams_.push_back({hash, begin, static_cast<int32_t>(size)});
    if (grams_.size() * 2 > slots_.size()) {
      Grow();
    } else {
      uint64_t slot = hash & slot_mask_;
      while (slots_[slot] >= 0) slot = (slot + 1) & slot_mask_;
      slots_[slot] = static_cast<int32_t>(number);
    }
  }
  numbers_.push_back(number);
}

void WordGrams::Grow() {
  slots_.assign(slots_.size() * 2, -1);
  slot_mask_ = slots_.size() - 1;
  for (size_t number = 0; number < grams_.size(); ++number) {
    uint64_t slot = grams_[number].hash & slot_mask_;
    while (slots_[slot] >= 0) slot = (slot + 1) & slot_mask_;
    slots_[slot] = static_cast<int32_t>(number);
  }
}

void WordGrams::MakeFilter() {
  int bits = kFewestFilterBits;
  while ((size_t{1} << bits) * kGramsPerWord < grams_.size()) ++bits;
  filter_.assign(size_t{1} << bits, 0);
  filter_shift_ = 64 - bits;
  for (const Gram& gram : grams_) filter_[gram.hash >> filter_shift_] |= FilterBits(gram.hash);
}

}  // namespace megatron_ettin
