#include "masking.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "counter_rng.h"

namespace megatron_ettin {
namespace {

// Draws of a position, in this order: selection, fate (mask, random id or unchanged), random id.
// They are addressed, not consumed, so a position that is not selected costs one draw.
constexpr uint64_t kDrawsPerPosition = 3;

void CheckRules(const MaskRules& rules, int64_t seq_length) {
  if (seq_length < 1) throw std::invalid_argument("seq_length must be > 0");
  if (!(rules.rate >= 0.0 && rules.rate <= 1.0)) {
    throw std::invalid_argument("mask_rate is " + std::to_string(rules.rate) +
                                "; it must lie in [0, 1]");
  }
  if (rules.vocab_size < 1) {
    throw std::invalid_argument("vocab_size is " + std::to_string(rules.vocab_size) +
                                "; it must be > 0");
  }
}

int64_t DrawReplacement(int64_t token, uint64_t key, uint64_t first_draw, const MaskRules& rules) {
  const uint64_t tenth = Below(Draw(key, first_draw + 1), 10);
  if (tenth < 8) return rules.mask_id;
  if (tenth == 8) {
    return static_cast<int64_t>(Below(Draw(key, first_draw + 2), rules.vocab_size));
  }
  return token;
}

}  // namespace

void MaskTokens(const int64_t* tokens, const int64_t* g, int64_t num_rows, int64_t seq_length,
                const MaskRules& rules, int64_t* masked, bool* selected) {
  CheckRules(rules, seq_length);
  // Exact: a 53-bit draw is below rate * 2^53 if and only if it is below the ceiling of that.
  const auto threshold = static_cast<uint64_t>(std::ceil(std::ldexp(rules.rate, 53)));
  const std::vector<int64_t>& special = rules.special_ids;
  for (int64_t r = 0; r < num_rows; ++r) {
    const int64_t begin = r * seq_length;
    std::copy_n(tokens + begin, seq_length, masked + begin);
    std::fill_n(selected + begin, seq_length, false);
    if (g[r] < 0) continue;
    const uint64_t key = CounterKey(rules.seed, Purpose::kMask, {static_cast<uint64_t>(g[r])});
    for (int64_t p = 0; p < seq_length; ++p) {
      const uint64_t first_draw = kDrawsPerPosition * static_cast<uint64_t>(p);
      if ((Draw(key, first_draw) >> 11) >= threshold) continue;
      const int64_t token = tokens[begin + p];
      if (std::find(special.begin(), special.end(), token) != special.end()) continue;
      selected[begin + p] = true;
      masked[begin + p] = DrawReplacement(token, key, first_draw, rules);
    }
  }
}

}  // namespace megatron_ettin
