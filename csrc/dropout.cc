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

// Writes elements [begin, end) of the row whose draws have this key.
void WriteRowFactors(uint64_t key, int64_t begin, int64_t end, uint64_t threshold, float kept,
                     float* factors) {
  for (int64_t i = begin; i < end;) {
    uint64_t draw = Draw(key, static_cast<uint64_t>(i / kLanes)) >> (16 * (i % kLanes));
    const int64_t next = std::min(i - i % kLanes + kLanes, end);
    for (; i < next; ++i, draw >>= 16) {
      *factors++ = (draw & 0xFFFF) < threshold ? 0.0f : kept;
    }
  }
}

}  // namespace

void CheckSlots(const SlotRange& slots, int64_t num_rows) {
  if (slots.seq_length < 1 || slots.channels < 1) {
    throw std::invalid_argument("seq_length and channels must be > 0");
  }
  const int64_t size = num_rows * slots.seq_length;
  if (slots.first < 0 || slots.count < 0 || slots.first > size ||
      slots.count > size - slots.first) {
    throw std::invalid_argument("first_slot = " + std::to_string(slots.first) +
                                " and num_slots = " + std::to_string(slots.count) +
                                " leave the stream of " + std::to_string(size) + " slots");
  }
}

void WriteDropoutFactors(const int64_t* g, const SlotRange& slots, const DropoutRules& rules,
                         float* factors) {
  if (!(rules.rate >= 0.0 && rules.rate < 1.0)) {
    throw std::invalid_argument("rate is " + std::to_string(rules.rate) +
                                "; it must lie in [0, 1)");
  }
  if (rules.layer < 0) throw std::invalid_argument("layer must be >= 0");
  // At most 2^16 - 1, so that the factor of a kept channel is finite.
  const auto threshold =
      static_cast<uint64_t>(std::min(std::ceil(rules.rate * kLaneRange), kLaneRange - 1));
  const auto kept = static_cast<float>(kLaneRange / (kLaneRange - static_cast<double>(threshold)));
  // Row by row: each has a key of its own.
  const int64_t last = slots.first + slots.count;
  for (int64_t slot = slots.first; slot < last;) {
    const int64_t row = slot / slots.seq_length;
    const int64_t row_slot = row * slots.seq_length;
    const int64_t next = std::min(row_slot + slots.seq_length, last);
    const int64_t size = (next - slot) * slots.channels;
    if (g[row] < 0) {
      std::fill_n(factors, size, 1.0f);
    } else {
      const uint64_t key =
          CounterKey(rules.seed, Purpose::kDropout,
                     {static_cast<uint64_t>(rules.layer), static_cast<uint64_t>(g[row])});
      WriteRowFactors(key, (slot - row_slot) * slots.channels, (next - row_slot) * slots.channels,
                      threshold, kept, factors);
    }
    factors += size;
    slot = next;
  }
}

}  // namespace megatron_ettin
