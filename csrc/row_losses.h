// Entries of a file of row losses, 8 bytes each. Specified in docs/ledger.md, section 7.
#ifndef MEGATRON_ETTIN_ROW_LOSSES_H_
#define MEGATRON_ETTIN_ROW_LOSSES_H_

#include <cstdint>
#include <vector>

namespace megatron_ettin {

// Splits the entries of rows [count] into summed losses and tokens. Returns whether every row was
// trained on, and has tokens and a finite sum; if not, what is written means nothing.
bool SplitTrainedLosses(const uint64_t* entries, int64_t count, float* sums, uint32_t* tokens);

// Appends the places of the rows whose summed loss is above limits[i] for each of their tokens, all
// in float. Returns as SplitTrainedLosses does.
bool FindLossesAbove(const uint64_t* entries, int64_t count, const float* limits,
                     std::vector<int64_t>* places);

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_ROW_LOSSES_H_
