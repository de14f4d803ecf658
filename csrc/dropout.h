// Dropout of activations as a function of (dropout seed, layer, row number g, position, channel).
// Specified in docs/order.md, section 7.
#ifndef MEGATRON_ETTIN_DROPOUT_H_
#define MEGATRON_ETTIN_DROPOUT_H_

#include <cstdint>

namespace megatron_ettin {

struct DropoutRules {
  uint64_t seed;
  int64_t layer;  // counted from 0
  double rate;    // share of the channels that is dropped, rounded up to a multiple of 2^-16
};

// A range of the num_rows * seq_length slots of a stream of rows, of `channels` values each.
struct SlotRange {
  int64_t seq_length;
  int64_t channels;
  int64_t first;
  int64_t count;
};

// Throws std::invalid_argument if the range is not one of a stream of num_rows rows.
void CheckSlots(const SlotRange& slots, int64_t num_rows);

// Writes the factors of a checked range, slots.count * slots.channels values: 0 for a dropped
// channel, 1 / (1 - rounded rate) for a kept one, 1 throughout an idle row (g < 0). Nothing is
// computed for other slots. Throws std::invalid_argument that names a bad rule.
void WriteDropoutFactors(const int64_t* g, const SlotRange& slots, const DropoutRules& rules,
                         float* factors);

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_DROPOUT_H_
