#include "row_batch.h"

#include <sys/resource.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "token_corpus.h"

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

// The pieces of some rows, one row after the other.
struct PiecesOfRows {
  std::vector<Piece> pieces;
  std::vector<size_t> begins;  // of each row, and the end

  std::pair<const Piece*, const Piece*> Row(int64_t row) const {
    return {pieces.data() + begins[row], pieces.data() + begins[row + 1]};
  }
};

PiecesOfRows ListAllPieces(const std::vector<const RowPlan*>& plans, const int32_t* source_index,
                           const int64_t* row, int64_t num_rows) {
  PiecesOfRows found;
  found.begins.reserve(num_rows + 1);
  std::vector<Piece> pieces;
  for (int64_t r = 0; r < num_rows; ++r) {
    found.begins.push_back(found.pieces.size());
    const int64_t source = source_index[r];
    if (source < -1 || source >= static_cast<int64_t>(plans.size()) ||
        (source == -1 && row[r] != -1)) {
      throw std::invalid_argument("row " + std::to_string(r) + " of the batch: no source index " +
                                  std::to_string(source) + " with row " + std::to_string(row[r]));
    }
    if (source < 0) continue;
    plans[source]->ListPieces(row[r], &pieces);
    found.pieces.insert(found.pieces.end(), pieces.begin(), pieces.end());
  }
  found.begins.push_back(found.pieces.size());
  return found;
}

// Counts this thread's reads from devices, waited for or ordered ahead: it only ever grows.
int64_t CountDeviceReads() {
  struct rusage usage;
  if (::getrusage(RUSAGE_THREAD, &usage) != 0) return 0;
  return usage.ru_inblock + usage.ru_majflt;
}

// Orders the tokens of all rows at once if the last batch had to be read from a device. Without the
// orders each piece would be waited for in turn; for tokens in memory they would cost a fifth of
// the time of a batch.
void FetchRows(const std::vector<const RowPlan*>& plans, const int32_t* source_index,
               int64_t num_rows, const PiecesOfRows& rows) {
  for (int64_t r = 0; r < num_rows; ++r) {
    if (source_index[r] < 0 || plans[source_index[r]]->corpus().in_memory()) continue;
    const TokenCorpus& corpus = plans[source_index[r]]->corpus();
    const auto [begin, end] = rows.Row(r);
    for (const Piece* piece = begin; piece != end; ++piece) {
      const auto [shard, document] = corpus.Find(piece->document);
      shard.FetchTokens(shard.PlannedBegin(document) + piece->offset, piece->length);
    }
  }
}

// Writes one piece at `slot` and returns the slot behind it.
int64_t WritePiece(const RowPlan& plan, const Piece& piece, const RowShape& shape, int64_t slot,
                   const RowBatch& batch) {
  if (piece.cls) batch.tokens[slot++] = shape.cls_id;
  const auto [shard, document] = plan.corpus().Find(piece.document);
  shard.CopyTokens(shard.PlannedBegin(document) + piece.offset, piece.length, batch.tokens + slot);
  slot += piece.length;
  if (piece.sep) batch.tokens[slot++] = shape.sep_id;
  return slot;
}

// Writes the pieces of one row from slot `begin` and returns the slot behind them. A piece is an
// attention segment of its own; in a concat row the segment runs through all of them.
int64_t WriteRow(const RowPlan& plan, std::pair<const Piece*, const Piece*> pieces,
                 const RowShape& shape, int64_t begin, const RowBatch& batch, int32_t* segment_end,
                 uint8_t* kind) {
  const bool one_segment = plan.rules().pack == Pack::kConcat;
  int64_t slot = begin;
  for (const Piece* piece = pieces.first; piece != pieces.second; ++piece) {
    const int64_t piece_begin = slot;
    slot = WritePiece(plan, *piece, shape, slot, batch);
    const int64_t segment = one_segment ? 0 : piece - pieces.first;
    const int64_t segment_begin = one_segment ? begin : piece_begin;
    std::iota(batch.position_ids + piece_begin, batch.position_ids + slot,
              piece_begin - segment_begin);
    segment_end[segment] = static_cast<int32_t>(slot);
    kind[segment] = static_cast<uint8_t>(
        one_segment || piece->ends_document ? SegmentKind::kLastPiece : SegmentKind::kCutPiece);
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

void AssembleRows(const std::vector<const RowPlan*>& plans, const int32_t* source_index,
                  const int64_t* row, int64_t num_rows, const RowShape& shape,
                  const RowBatch& batch) {
  CheckRowShape(shape, num_rows);
  CheckPlans(plans, shape);
  const int64_t reads_before = CountDeviceReads();
  const PiecesOfRows rows = ListAllPieces(plans, source_index, row, num_rows);
  FetchRows(plans, source_index, num_rows, rows);
  batch.cu_seqlens[0] = 0;
  for (int64_t r = 0; r < num_rows; ++r) {
    const int64_t row_begin = r * shape.seq_length;
    const int64_t row_end = row_begin + shape.seq_length;
    // S + 1 segments in each row; entry 0 of cu_seqlens is the 0 before the first row. Segments
    // that are not written below are empty, at the row's end, or the padding tail.
    int32_t* segment_end = batch.cu_seqlens + r * (shape.max_segments_per_row + 1) + 1;
    uint8_t* kind = batch.segment_kind + r * (shape.max_segments_per_row + 1);
    std::fill_n(segment_end, shape.max_segments_per_row + 1, static_cast<int32_t>(row_end));
    std::fill_n(kind, shape.max_segments_per_row + 1, static_cast<uint8_t>(SegmentKind::kPadding));

    int64_t slot = row_begin;
    if (source_index[r] >= 0) {
      const RowPlan& plan = *plans[source_index[r]];
      slot = WriteRow(plan, rows.Row(r), shape, slot, batch, segment_end, kind);
    }
    batch.num_tokens[r] = slot - row_begin;
    std::fill(batch.tokens + slot, batch.tokens + row_end, shape.pad_id);
    std::iota(batch.position_ids + slot, batch.position_ids + row_end, int64_t{0});
  }
  const bool in_memory = CountDeviceReads() == reads_before;
  for (const RowPlan* plan : plans) plan->corpus().set_in_memory(in_memory);
}

}  // namespace megatron_ettin
