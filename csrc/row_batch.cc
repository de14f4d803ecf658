#include "row_batch.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace megatron_ettin {
namespace {

void CheckSources(const std::vector<RowSource>& sources, const RowShape& shape) {
  for (size_t s = 0; s < sources.size(); ++s) {
    const RowRules& rules = sources[s].plan->rules();
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
    if (sources[s].plan->end_document() > sources[s].file->num_documents()) {
      throw std::invalid_argument(name + " was made for more documents than " +
                                  sources[s].file->prefix() + " has");
    }
  }
}

// Writes one piece at `slot` and returns the slot behind it.
int64_t WritePiece(const RowSource& source, const Segment& piece, const RowShape& shape,
                   int64_t slot, const RowBatch& batch) {
  if (source.file->DocumentLength(piece.document) != source.plan->DocumentLength(piece.document)) {
    throw std::invalid_argument(source.file->prefix() + ": document " +
                                std::to_string(piece.document) +
                                " has another length than in the plan of its rows");
  }
  const int64_t begin = slot;
  const bool add_specials = source.plan->rules().specials == Specials::kAdd;
  if (add_specials) batch.tokens[slot++] = shape.cls_id;
  source.file->CopyTokens(source.file->DocumentBegin(piece.document) + piece.offset, piece.length,
                          batch.tokens + slot);
  slot += piece.length;
  if (add_specials) batch.tokens[slot++] = shape.sep_id;
  std::iota(batch.position_ids + begin, batch.position_ids + slot, int64_t{0});
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

void AssembleRows(const std::vector<RowSource>& sources, const int32_t* source_slot,
                  const int64_t* row, int64_t num_rows, const RowShape& shape,
                  const RowBatch& batch) {
  CheckRowShape(shape, num_rows);
  CheckSources(sources, shape);
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
    if (source < -1 || source >= static_cast<int64_t>(sources.size()) ||
        (source == -1 && row[r] != -1)) {
      throw std::invalid_argument("row " + std::to_string(r) + " of the batch: no source slot " +
                                  std::to_string(source) + " with row " + std::to_string(row[r]));
    }
    if (source >= 0) {
      sources[source].plan->Segments(row[r], &pieces);
      for (size_t i = 0; i < pieces.size(); ++i) {
        slot = WritePiece(sources[source], pieces[i], shape, slot, batch);
        segment_end[i] = static_cast<int32_t>(slot);
        kind[i] = static_cast<uint8_t>(pieces[i].ends_document ? SegmentKind::kLastPiece
                                                               : SegmentKind::kCutPiece);
      }
    }
    batch.num_tokens[r] = slot - row_begin;
    std::fill(batch.tokens + slot, batch.tokens + row_end, shape.pad_id);
    std::iota(batch.position_ids + slot, batch.position_ids + row_end, int64_t{0});
  }
}

}  // namespace megatron_ettin
