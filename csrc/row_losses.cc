#include "row_losses.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace megatron_ettin {
namespace {

static_assert(std::numeric_limits<float>::is_iec559, "the file holds IEEE 754 numbers");

// The two highest bits of a word are the state of its row, 1 for one that was trained on.
constexpr uint32_t kTrained = 1U << 30;
constexpr uint32_t kTokens = kTrained - 1;
// Exponent of infinities and NaNs.
constexpr uint32_t kNotFinite = 0x7F800000;

// Rows that are looked at together: the loop over them has no branch.
constexpr int64_t kBlock = 64;

struct Entry {
  float sum;
  uint32_t tokens;
  // Not trained on, without tokens, or with a sum that is not finite.
  uint32_t is_other;
};

Entry Split(uint64_t entry) {
  const auto bits = static_cast<uint32_t>(entry);
  const auto word = static_cast<uint32_t>(entry >> 32);
  float sum = 0;
  std::memcpy(&sum, &bits, sizeof bits);
  // Below kTokens for words from kTrained + 1 to 2 * kTrained - 1 alone.
  const auto is_odd = static_cast<uint32_t>(word - kTrained - 1 >= kTokens);
  const auto is_infinite = static_cast<uint32_t>((bits & kNotFinite) == kNotFinite);
  return {sum, word & kTokens, is_odd | is_infinite};
}

// Tokens are below 2^30, and a signed number becomes a float in one instruction.
bool IsAbove(const Entry& entry, float limit) {
  return entry.sum > static_cast<float>(static_cast<int32_t>(entry.tokens)) * limit;
}

}  // namespace

bool SplitTrainedLosses(const uint64_t* entries, int64_t count, float* sums, uint32_t* tokens) {
  // No branch in the loop, so that the compiler takes several rows at a time.
  uint32_t others = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Entry entry = Split(entries[i]);
    sums[i] = entry.sum;
    tokens[i] = entry.tokens;
    others |= entry.is_other;
  }
  return others == 0;
}

bool FindLossesAbove(const uint64_t* entries, int64_t count, const float* limits,
                     std::vector<int64_t>* places) {
  uint32_t others = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, count);
    uint32_t above = 0;
    for (int64_t i = begin; i < end; ++i) {
      const Entry entry = Split(entries[i]);
      others |= entry.is_other;
      above |= static_cast<uint32_t>(IsAbove(entry, limits[i]));
    }
    for (int64_t i = begin; above != 0 && i < end; ++i) {
      if (IsAbove(Split(entries[i]), limits[i])) places->push_back(i);
    }
  }
  return others == 0;
}

}  // namespace megatron_ettin
