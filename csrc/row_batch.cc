#include "row_batch.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

#include "token_file.h"

namespace megatron_ettin {
namespace {

void CheckPlans(const std::vector<const RowPlan*>& plans, const RowShape& shape) {
  for (size_t s = 0; s < plans.size(); ++s) {
    const RowRules& rules = plans[s]->rules();
    const std::string name = "plans[" + std::to_string(s) + "]";
    if (rules.seq_length != shape.seq_length) {
      throw std::invalid_argument(name + " has rows of " + std::to_string(rules.seq_length) +
                                  " slots, not " + std::to_string(shape.seq_length));
    }
    if (rules.max_segments_per_row > shape.max_segments_per_row) {
      throw std::invalid_argument(
          name + " has up to " + std::to_string(rules.max_segments_per_row) +
          " segments in a row, more than " + std::to_string(shape.max_segments_per_row));
    }
  }
}

// Writes one piece at `slot` and returns the slot behind it.
int64_t WritePiece(const RowPlan& plan, const Segment& piece, const RowShape& shape, int64_t slot,
                   const RowBatch& batch) {
  if (piece.cls) batch.tokens[slot++] = shape.cls_id;
  const TokenFile& file = plan.file();
  file.CopyTokens(file.DocumentBegin(piece.document) + piece.offset, piece.length,
                  batch.tokens + slot);
  slot += piece.length;
  if (piece.sep) batch.tokens[slot++] = shape.sep_id;
  return slot;
}

// Writes the pieces of one row from slot `begin` and returns the slot behind them. A piece is an
// attention segment of its own; in a concat row the segment runs through all of them.
int64_t WriteRow(const RowPlan& plan, const std::vector<Segment>& pieces, const RowShape& shape,
                 int64_t begin, const RowBatch& batch, int32_t* segment_end, uint8_t* kind) {
  const bool one_segment = plan.rules().pack == Pack::kConcat;
  int64_t slot = begin;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const int64_t piece_begin = slot;
    slot = WritePiece(plan, pieces[i], shape, slot, batch);
    const size_t segment = one_segment ? 0 : i;
    const int64_t segment_begin = one_segment ? begin : piece_begin;
    std::iota(batch.position_ids + piece_begin, batch.position_ids + slot,
              piece_begin - segment_begin);
    segment_end[segment] = static_cast<int32_t>(slot);
    kind[segment] = static_cast<uint8_t>(
        one_segment || pieces[i].ends_document ? SegmentKind::kLastPiece : SegmentKind::kCutPiece);
  }
  return slot;
}

}  // namespace

void CheckRowShape(const RowShape& shape, int64_t num_rows) {
  if (shape.seq_length < 1 || shape.max_segments_per_row < 1) {
    throw std::invalid_argument("seq_length and max_segments_per_row must be > 0");
  }
  if (num_rows > std::numeric_limits<int32_t>::max() / shape.seq_length) {
    throw std::invalid_argument(std::to_string(num_rows) + " rows of " +
                                std::to_string(shape.seq_length) +
                                " slots exceed the 2^31 - 1 slots that cu_seqlens can count");
  }
}

void AssembleRows(const std::vector<const RowPlan*>& plans, const int32_t* source_slot,
                  const int64_t* row, int64_t num_rows, const RowShape& shape,
                  const RowBatch& batch) {
  CheckRowShape(shape, num_rows);
  CheckPlans(plans, shape);
  std::vector<Segment> pieces;
  batch.cu_seqlens[0] = 0;
  for (int64_t r = 0; r < num_rows; ++r) {
    const int64_t row_begin = r * shape.seq_length;
    const int64_t row_end = row_begin + shape.seq_length;
    int32_t* segment_end = batch.cu_seqlens + r * (shape.max_segments_per_row + 1) + 1;
    uint8_t* kind = batch.segment_kind + r * (shape.max_segments_per_row + 1);
    std::fill_n(segment_end, shape.max_segments_per_row + 1, static_cast<int32_t>(row_end));
    std::fill_n(kind, shape.max_segments_per_row + 1, static_cast<uint8_t>(SegmentKind::kPadding));

    int64_t slot = row_begin;
    const int64_t source = source_slot[r];
    if (source < -1 || source >= static_cast<int64_t>(plans.size()) ||
        (source == -1 && row[r] != -1)) {
      throw std::invalid_argument("row " + std::to_string(r) + " of the batch: no source slot " +
                                  std::to_string(source) + " with row " + std::to_string(row[r]));
    }
    if (source >= 0) {
      plans[source]->Segments(row[r], &pieces);
      slot = WriteRow(*plans[source], pieces, shape, slot, batch, segment_end, kind);
    }
    batch.num_tokens[r] = slot - row_begin;
    std::fill(batch.tokens + slot, batch.tokens + row_end, shape.pad_id);
    std::iota(batch.position_ids + slot, batch.position_ids + row_end, int64_t{0});
  }
}

}  // namespace megatron_ettin
