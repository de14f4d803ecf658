// 128-bit values of single rows, whose sums are the digests of a run: of the order, of the tokens
// and of the masks. A sum does not depend on which rank had which row. Specified in docs/order.md,
// section 10.
#ifndef MEGATRON_ETTIN_DIGEST_H_
#define MEGATRON_ETTIN_DIGEST_H_

#include <cstdint>
#include <vector>

#include "row_plan.h"
#include "xxh3.h"

namespace megatron_ettin {

// Idle rows (g < 0) have value 0 in all three.

struct OrderedSource {
  const RowPlan* plan;
  uint64_t id;
};

// The origins of m rows; all arrays have m values.
struct RowOrigins {
  const int64_t* g;
  const int32_t* source_index;  // in the vector of sources
  const int64_t* epoch;
  const int64_t* row;  // of the source's plan
};

// Throws std::invalid_argument or std::out_of_range that names the entry.
void DigestOrder(const std::vector<OrderedSource>& sources, const RowOrigins& origins,
                 int64_t num_rows, Hash128* values);

// m rows of a packed stream.
struct DigestedRows {
  int64_t count;              // m
  int64_t seq_length;         // L
  const int64_t* g;           // [m]
  const int64_t* num_tokens;  // [m], slots that are not padding
};

// tokens [m * L] are unmasked; cu_seqlens [m * K + 1] as AssembleRows writes it, K segments a row.
// Throws std::invalid_argument that names the row if they and num_tokens do not agree, or if a
// token is no u32.
void DigestTokens(const DigestedRows& rows, const int64_t* tokens, const int32_t* cu_seqlens,
                  int64_t segments_per_row, Hash128* values);

// inputs, labels, loss_mask, weights [m * L]; labels and weights are read where loss_mask is set,
// and without weights all are 1. The values are low lanes. Throws std::invalid_argument that names
// the row of an id that is out of range.
void DigestMasks(const DigestedRows& rows, const int64_t* inputs, const int64_t* labels,
                 const bool* loss_mask, const float* weights, uint64_t* values);

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_DIGEST_H_
