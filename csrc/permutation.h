// Keyed pseudo-random permutations of [0, n) with O(1) inverse: an exact Fisher-Yates table for
// small n, an 8-round generalized Feistel network with cycle walking above. Statistically tested,
// not cryptographic. Specified in docs/order.md, section 2.
#ifndef MEGATRON_ETTIN_PERMUTATION_H_
#define MEGATRON_ETTIN_PERMUTATION_H_

#include <array>
#include <cstdint>
#include <vector>

namespace megatron_ettin {

// Returns the key of the permutation that orders one epoch of one source.
uint64_t PermutationKey(uint64_t seed, uint64_t source_id, uint64_t epoch);

class Permutation {
 public:
  // Up to here a Feistel network is visibly not uniform over all permutations; a table is exact.
  static constexpr uint64_t kTableLimit = 65536;
  static constexpr uint64_t kMaxSize = uint64_t{1} << 62;

  // Throws std::invalid_argument unless 1 <= n <= kMaxSize.
  Permutation(uint64_t n, uint64_t key);

  uint64_t size() const { return n_; }
  uint64_t Forward(uint64_t index) const;  // index < size()
  uint64_t Inverse(uint64_t value) const;  // value < size()

 private:
  static constexpr int kRounds = 8;

  void FillTable(uint64_t key);
  uint64_t FeistelForward(uint64_t x) const;
  uint64_t FeistelInverse(uint64_t x) const;

  uint64_t n_;
  uint64_t left_size_ = 0;                      // a of [0, a) x [0, 2^s)
  int right_bits_ = 0;                          // s
  std::array<uint64_t, kRounds> round_keys_{};  // above kTableLimit only, as the two sizes
  std::vector<uint16_t> table_;                 // up to kTableLimit only
  std::vector<uint16_t> inverse_table_;
};

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_PERMUTATION_H_
