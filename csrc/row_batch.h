// Turns planned rows into the packed stream of a micro-batch. Specified in docs/order.md,
// section 6.
#ifndef MEGATRON_ETTIN_ROW_BATCH_H_
#define MEGATRON_ETTIN_ROW_BATCH_H_

#include <cstdint>
#include <vector>

#include "row_plan.h"

namespace megatron_ettin {

struct RowShape {
  int64_t seq_length;            // L
  int64_t max_segments_per_row;  // S; each row has S + 1 segments, the padding included
  int64_t cls_id;
  int64_t sep_id;
  int64_t pad_id;
};

// The arrays that receive the results, for m rows.
struct RowBatch {
  int64_t* tokens;        // [m * L]
  int64_t* position_ids;  // [m * L], from 0 in each segment
  int32_t* cu_seqlens;    // [m * (S + 1) + 1]
  uint8_t* segment_kind;  // [m * (S + 1)], a SegmentKind each
  int64_t* num_tokens;    // [m], slots that are not padding
};

enum class SegmentKind : uint8_t { kPadding = 0, kCutPiece = 1, kLastPiece = 2 };

// Throws std::invalid_argument if the shape is not positive or too large for 32-bit cu_seqlens.
void CheckRowShape(const RowShape& shape, int64_t num_rows);

// Source index -1 with row -1 is an idle row: padding only. Throws std::invalid_argument or
// std::out_of_range that names the entry if a plan, its file and the shape do not agree.
void AssembleRows(const std::vector<const RowPlan*>& plans, const int32_t* source_index,
                  const int64_t* row, int64_t num_rows, const RowShape& shape,
                  const RowBatch& batch);

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_ROW_BATCH_H_
