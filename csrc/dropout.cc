#include "dropout.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "counter_rng.h"

namespace megatron_ettin {
namespace {

// A draw serves four channels with 16 bits each.
constexpr int64_t kLanes = 4;
constexpr double kLaneRange = 65536.0;

}  // namespace

void DropoutFactors(const int64_t* g, int64_t num_rows, int64_t seq_length, int64_t channels,
                    const DropoutRules& rules, float* factors) {
  if (!(rules.rate >= 0.0 && rules.rate < 1.0)) {
    throw std::invalid_argument("rate is " + std::to_string(rules.rate) +
                                "; it must lie in [0, 1)");
  }
  if (seq_length < 1 || channels < 1 || rules.layer < 0) {
    throw std::invalid_argument("seq_length and channels must be > 0, layer >= 0");
  }
  const auto threshold =
      static_cast<uint64_t>(std::min(std::ceil(rules.rate * kLaneRange), kLaneRange - 1));
  const auto kept = static_cast<float>(kLaneRange / (kLaneRange - static_cast<double>(threshold)));
  const int64_t size = seq_length * channels;
  for (int64_t r = 0; r < num_rows; ++r) {
    float* row = factors + r * size;
    if (g[r] < 0) {
      std::fill_n(row, size, 1.0f);
      continue;
    }
    const uint64_t key =
        CounterKey(rules.seed, Purpose::kDropout,
                   {static_cast<uint64_t>(rules.layer), static_cast<uint64_t>(g[r])});
    for (int64_t i = 0; i < size; i += kLanes) {
      uint64_t draw = Draw(key, static_cast<uint64_t>(i / kLanes));
      const int64_t end = std::min(i + kLanes, size);
      for (int64_t e = i; e < end; ++e, draw >>= 16) {
        row[e] = (draw & 0xFFFF) < threshold ? 0.0f : kept;
      }
    }
  }
}

}  // namespace megatron_ettin
