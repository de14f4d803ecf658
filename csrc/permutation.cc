#include "permutation.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "counter_rng.h"

namespace megatron_ettin {
namespace {

// Odd constants with balanced bits: the fractional parts of sqrt(2) and sqrt(3).
constexpr uint64_t kFoldA = 0x6A09E667F3BCC909ull;
constexpr uint64_t kFoldB = 0xBB67AE8584CAA73Bull;

uint64_t MultiplyFold(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// One fold alone leaves the high bits nearly linear in x, and they are the ones Below() keeps.
uint64_t RoundFunction(uint64_t x, uint64_t round_key, uint64_t range) {
  return Below(MultiplyFold(MultiplyFold(x ^ round_key, kFoldA), kFoldB), range);
}

int BitLength(uint64_t x) { return x == 0 ? 0 : 64 - __builtin_clzll(x); }

}  // namespace

uint64_t PermutationKey(uint64_t seed, uint64_t source_id, uint64_t epoch) {
  return CounterKey(seed, Purpose::kPermutation, {source_id, epoch});
}

Permutation::Permutation(uint64_t n, uint64_t key) : n_(n) {
  if (n < 1 || n > kMaxSize) {
    throw std::invalid_argument("a permutation needs 1 <= n <= 2^62, got n = " + std::to_string(n));
  }
  if (n <= kTableLimit) {
    FillTable(key);
    return;
  }
  right_bits_ = BitLength(n - 1) / 2;
  left_size_ = ((n - 1) >> right_bits_) + 1;
  for (int r = 0; r < kRounds; ++r) round_keys_[r] = Draw(key, r);
}

void Permutation::FillTable(uint64_t key) {
  table_.resize(n_);
  inverse_table_.resize(n_);
  for (uint64_t i = 0; i < n_; ++i) table_[i] = static_cast<uint16_t>(i);
  for (uint64_t i = n_ - 1; i > 0; --i) std::swap(table_[i], table_[Below(Draw(key, i), i + 1)]);
  for (uint64_t i = 0; i < n_; ++i) inverse_table_[table_[i]] = static_cast<uint16_t>(i);
}

uint64_t Permutation::FeistelForward(uint64_t x) const {
  const uint64_t right_size = uint64_t{1} << right_bits_;
  uint64_t left = x >> right_bits_;
  uint64_t right = x & (right_size - 1);
  for (int r = 0; r < kRounds; r += 2) {
    left += RoundFunction(right, round_keys_[r], left_size_);
    if (left >= left_size_) left -= left_size_;
    right = (right + RoundFunction(left, round_keys_[r + 1], right_size)) & (right_size - 1);
  }
  return (left << right_bits_) | right;
}

uint64_t Permutation::FeistelInverse(uint64_t x) const {
  const uint64_t right_size = uint64_t{1} << right_bits_;
  uint64_t left = x >> right_bits_;
  uint64_t right = x & (right_size - 1);
  for (int r = kRounds - 2; r >= 0; r -= 2) {
    right = (right - RoundFunction(left, round_keys_[r + 1], right_size)) & (right_size - 1);
    const uint64_t shift = RoundFunction(right, round_keys_[r], left_size_);
    left = left >= shift ? left - shift : left + left_size_ - shift;
  }
  return (left << right_bits_) | right;
}

uint64_t Permutation::Forward(uint64_t index) const {
  if (!table_.empty()) return table_[index];
  // Cycle walking: the network permutes [0, a * 2^s), fewer than 2^s values more than n. A value
  // outside of [0, n) is mapped again; at these sizes that is fewer than 1 in 250.
  do {
    index = FeistelForward(index);
  } while (index >= n_);
  return index;
}

uint64_t Permutation::Inverse(uint64_t value) const {
  if (!table_.empty()) return inverse_table_[value];
  do {
    value = FeistelInverse(value);
  } while (value >= n_);
  return value;
}

}  // namespace megatron_ettin
