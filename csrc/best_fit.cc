#include "best_fit.h"

#include <algorithm>
#include <cstddef>

namespace megatron_ettin {

BestFitPacker::BestFitPacker(int64_t capacity, int64_t max_items)
    : capacity_(capacity),
      max_items_(max_items),
      position_(capacity + 1),
      top_(capacity + 1, kNone),
      bits_(capacity / 64 + 1, 0),
      summary_(bits_.size() / 64 + 1, 0) {}

void BestFitPacker::SortBySizeDescending(const std::vector<uint32_t>& sizes) {
  // position_ counts each size, then holds where its next item goes: a stable counting sort.
  std::fill(position_.begin(), position_.end(), 0);
  for (uint32_t size : sizes) ++position_[size];
  uint32_t next = 0;
  for (int64_t size = capacity_; size >= 0; --size) {
    const uint32_t count = position_[size];
    position_[size] = next;
    next += count;
  }
  order_.resize(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    order_[position_[sizes[i]]++] = static_cast<uint16_t>(i);
  }
}

int64_t BestFitPacker::FindAtLeast(int64_t free) const {
  // The rest of the first word; then whole words, by the summary.
  size_t word = free / 64;
  const uint64_t here = bits_[word] & (~uint64_t{0} << (free % 64));
  if (here != 0) return word * 64 + __builtin_ctzll(here);
  if (++word == bits_.size()) return -1;
  size_t group = word / 64;
  uint64_t words = summary_[group] & (~uint64_t{0} << (word % 64));
  while (words == 0) {
    if (++group == summary_.size()) return -1;
    words = summary_[group];
  }
  word = group * 64 + __builtin_ctzll(words);
  return word * 64 + __builtin_ctzll(bits_[word]);
}

uint32_t BestFitPacker::PopTightest(int64_t size) {
  const int64_t free = FindAtLeast(size);
  if (free < 0) return kNone;
  const uint32_t bin = top_[free];
  top_[free] = below_[bin];
  if (top_[free] == kNone) {
    bits_[free / 64] &= ~(uint64_t{1} << (free % 64));
    if (bits_[free / 64] == 0) summary_[free / 4096] &= ~(uint64_t{1} << (free / 64 % 64));
  }
  return bin;
}

void BestFitPacker::Push(uint32_t bin) {
  const int64_t free = free_[bin];
  below_[bin] = top_[free];
  top_[free] = bin;
  bits_[free / 64] |= uint64_t{1} << (free % 64);
  summary_[free / 4096] |= uint64_t{1} << (free / 64 % 64);
}

void BestFitPacker::CloseAll() {
  free_.clear();
  items_.clear();
  below_.clear();
  std::fill(top_.begin(), top_.end(), kNone);
  std::fill(bits_.begin(), bits_.end(), 0);
  std::fill(summary_.begin(), summary_.end(), 0);
}

int64_t BestFitPacker::Pack(const std::vector<uint32_t>& sizes, std::vector<uint16_t>* bin_of) {
  CloseAll();
  SortBySizeDescending(sizes);
  bin_of->resize(sizes.size());
  for (uint16_t item : order_) {
    uint32_t bin = PopTightest(sizes[item]);
    if (bin == kNone) {
      bin = static_cast<uint32_t>(free_.size());
      free_.push_back(static_cast<uint32_t>(capacity_));
      items_.push_back(0);
      below_.push_back(kNone);
    }
    free_[bin] -= sizes[item];
    ++items_[bin];
    (*bin_of)[item] = static_cast<uint16_t>(bin);
    // A bin that is full, or has all its items, leaves the stacks for good.
    if (free_[bin] > 0 && items_[bin] < max_items_) Push(bin);
  }
  return static_cast<int64_t>(free_.size());
}

}  // namespace megatron_ettin
