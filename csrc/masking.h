// Masks for masked-language modelling as a function of (mask seed, row number g, position in the
// row). Specified in docs/order.md, section 7.
#ifndef MEGATRON_ETTIN_MASKING_H_
#define MEGATRON_ETTIN_MASKING_H_

#include <cstdint>
#include <vector>

namespace megatron_ettin {

struct MaskRules {
  uint64_t seed;
  double rate;                       // share of the ordinary tokens that is selected
  int64_t mask_id;                   // replaces 80 % of the selected
  int64_t vocab_size;                // ids below replace 10 %; the remaining 10 % stay
  std::vector<int64_t> special_ids;  // never selected
};

// Reads num_rows rows of seq_length tokens and writes the masked tokens and which were selected. A
// row with g < 0 is idle and stays as it is. Throws std::invalid_argument that names a bad rule.
void MaskTokens(const int64_t* tokens, const int64_t* g, int64_t num_rows, int64_t seq_length,
                const MaskRules& rules, int64_t* masked, bool* selected);

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_MASKING_H_
