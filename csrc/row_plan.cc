#include "row_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace megatron_ettin {
namespace {

// Recomputed bodies that are kept, at most 300 kB each.
constexpr size_t kRecomputedBlocks = 64;

// Returns the position of a value, or `count`. Compares many at a time: a loop that may stop at
// each value would not be compiled to vector instructions.
int64_t IndexOf(const uint16_t* values, int64_t count, uint16_t wanted) {
  constexpr int64_t kStep = 128;
  int64_t begin = 0;
  for (; begin + kStep <= count; begin += kStep) {
    uint16_t found = 0;
    for (int64_t i = 0; i < kStep; ++i) found |= values[begin + i] == wanted ? 1 : 0;
    if (found != 0) break;
  }
  while (begin < count && values[begin] != wanted) ++begin;
  return begin;
}

}  // namespace

RowPlan::RowPlan(const std::string& path, std::shared_ptr<const TokenCorpus> corpus)
    : plan_(path), corpus_(std::move(corpus)) {
  if (range().file_documents != corpus_->num_documents() ||
      range().file_tokens != corpus_->num_tokens()) {
    plan_.Refuse(offsetof(PlanHeader, range) + offsetof(PlanRange, file_documents),
                 "the plan was built for a corpus of " + std::to_string(range().file_documents) +
                     " documents and " + std::to_string(range().file_tokens) + " tokens, but " +
                     corpus_->Name() + " has " + std::to_string(corpus_->num_documents()) +
                     " and " + std::to_string(corpus_->num_tokens()));
  }
  if (plan_.has_bodies()) {
    body_checked_ = std::make_unique<std::atomic<bool>[]>(plan_.header().num_blocks);
  }
}

RowPlan::Bytes RowPlan::Recompute(int64_t index) const {
  {
    const std::lock_guard<std::mutex> lock(recomputed_mutex_);
    const auto known = std::find_if(recomputed_.begin(), recomputed_.end(),
                                    [&](const auto& entry) { return entry.first == index; });
    if (known != recomputed_.end()) {
      recomputed_.splice(recomputed_.begin(), recomputed_, known);
      return known->second;
    }
  }
  // Without the lock: other threads need other blocks. Two that need the same do the work twice.
  const int64_t first = plan_.BlockFirstDocument(index);
  BlockPacker packer(*corpus_, rules());
  packer.Pack(first, first + plan_.ShapeOf(index).num_documents);
  const auto body = std::make_shared<const std::vector<char>>(packer.body());
  const PlanBlock& planned = plan_.block(index);
  if (packer.lengths_hash() != planned.lengths_hash) RefuseLengths(index);
  if (HashPlanBytes(body->data(), body->size()) != planned.body_hash) {
    plan_.Refuse(0, "the plan was built by another algorithm");
  }
  const std::lock_guard<std::mutex> lock(recomputed_mutex_);
  recomputed_.emplace_front(index, body);
  if (recomputed_.size() > kRecomputedBlocks) recomputed_.pop_back();
  return body;
}

RowPlan::Block RowPlan::OpenBlock(int64_t index) const {
  Bytes owner;
  const char* data;
  if (plan_.has_bodies()) {
    if (!body_checked_[index].load(std::memory_order_relaxed)) {
      plan_.CheckBody(index);
      body_checked_[index].store(true, std::memory_order_relaxed);
    }
    data = plan_.Body(index);
  } else {
    owner = Recompute(index);
    data = owner->data();
  }
  const BlockShape shape = plan_.ShapeOf(index);
  return {index, plan_.BlockFirstDocument(index), plan_.block(index).first_row,
          shape, BlockBody(data, shape),          std::move(owner)};
}

RowPlan::Block RowPlan::OpenBlockOfRow(int64_t row) const {
  if (row < 0 || row >= counts().rows) {
    throw std::out_of_range("row " + std::to_string(row) + " of a plan of " +
                            std::to_string(counts().rows) + " rows");
  }
  return OpenBlock(plan_.FindBlockOfRow(row));
}

void RowPlan::RefuseLengths(int64_t index) const {
  const int64_t first = plan_.BlockFirstDocument(index);
  plan_.Refuse(plan_.block(index).body_begin,
               "the plan was built from other document lengths than those of " +
                   corpus_->Name(".idx") + ", in documents [" + std::to_string(first) + ", " +
                   std::to_string(first + plan_.ShapeOf(index).num_documents) + ")");
}

RowPlan::DocumentStart RowPlan::FindUnit(const Block& block, int64_t unit) const {
  // The last sample at or before the unit, then at most 64 lengths.
  const uint64_t* samples = block.body.samples();
  const int64_t sample =
      std::upper_bound(samples, samples + block.shape.samples(), static_cast<uint64_t>(unit)) -
      samples - 1;
  DocumentStart start{block.first_document + sample * kSampleDocuments,
                      static_cast<int64_t>(samples[sample])};
  const int64_t end = block.first_document + block.shape.num_documents;
  while (true) {
    const int64_t units = CountUnits(start.document);
    if (unit < start.units + units) return start;
    start.units += units;
    if (++start.document == end) RefuseLengths(block.index);
  }
}

int64_t RowPlan::CountUnitsBefore(const Block& block, int64_t document) const {
  const int64_t sample = (document - block.first_document) / kSampleDocuments;
  auto units = static_cast<int64_t>(block.body.samples()[sample]);
  for (int64_t d = block.first_document + sample * kSampleDocuments; d < document; ++d) {
    units += CountUnits(d);
  }
  return units;
}

void RowPlan::ListPieces(int64_t row, std::vector<Piece>* pieces) const {
  pieces->clear();
  const Block block = OpenBlockOfRow(row);
  const int64_t local = row - block.first_row;
  if (rules().pack == Pack::kConcat) {
    AddStreamPieces(block, local, pieces);
  } else if (local < block.shape.full_rows) {
    AddWholePiece(block, local, pieces);
  } else {
    AddPackedPieces(block, local - block.shape.full_rows, pieces);
  }
}

// A row of one piece: a full one, or any of `none`.
void RowPlan::AddWholePiece(const Block& block, int64_t row, std::vector<Piece>* pieces) const {
  const DocumentStart start = FindUnit(block, row);
  const int64_t length = corpus_->PlannedLength(start.document);
  const int64_t offset = (row - start.units) * rules().piece_capacity();
  const int64_t size = std::min(rules().piece_capacity(), length - offset);
  const bool added = rules().specials == Specials::kAdd;
  pieces->push_back(
      {start.document, offset, static_cast<int32_t>(size), added, added, offset + size == length});
}

void RowPlan::AddPackedPieces(const Block& block, int64_t row, std::vector<Piece>* pieces) const {
  const uint16_t* starts = block.body.row_starts();
  const int64_t end = row + 1 < block.shape.packed_rows ? starts[row + 1] : block.shape.tails;
  const int64_t capacity = rules().piece_capacity();
  const bool added = rules().specials == Specials::kAdd;
  int64_t slots = 0;
  for (int64_t i = starts[row]; i < end; ++i) {
    const int64_t document = block.first_document + block.body.tail_documents()[i];
    const int64_t length = corpus_->PlannedLength(document);
    const int64_t tail = length < capacity ? length : length % capacity;
    slots += tail + rules().special_slots();
    // Callers rely on rows that fit: this is the only protection against lengths that changed.
    if (tail <= 0 || slots > rules().seq_length) RefuseLengths(block.index);
    pieces->push_back({document, length - tail, static_cast<int32_t>(tail), added, added, true});
  }
}

void RowPlan::AddStreamPieces(const Block& block, int64_t row, std::vector<Piece>* pieces) const {
  const int64_t begin = row * rules().seq_length;
  const int64_t end = std::min(begin + rules().seq_length, block.shape.tokens);
  const int64_t before = rules().specials == Specials::kAdd ? 1 : 0;  // slots of [CLS]
  const int64_t end_document = block.first_document + block.shape.num_documents;
  DocumentStart start = FindUnit(block, begin);
  while (start.units < end) {
    if (start.document == end_document) RefuseLengths(block.index);
    const int64_t length = corpus_->PlannedLength(start.document);
    const int64_t slots = rules().Units(length);
    // The document's slots [from, to): 0 is [CLS] and slots - 1 is [SEP], if they are added.
    const int64_t from = std::max<int64_t>(begin - start.units, 0);
    const int64_t to = std::min(end - start.units, slots);
    if (slots > 0) {
      const int64_t first = std::max(from - before, int64_t{0});
      const int64_t last = std::min(to - before, length);
      pieces->push_back({start.document, first, static_cast<int32_t>(last - first),
                         before == 1 && from == 0, before == 1 && to == slots, to == slots});
    }
    start.units += slots;
    ++start.document;
  }
}

int64_t RowPlan::CountRowTokens(int64_t row) const {
  if (row >= 0 && row < counts().rows && rules().pack != Pack::kNone) {
    const int64_t index = plan_.FindBlockOfRow(row);
    const BlockShape shape = plan_.ShapeOf(index);
    const int64_t local = row - plan_.block(index).first_row;
    const int64_t L = rules().seq_length;
    if (rules().pack == Pack::kConcat) return std::min(L, shape.tokens - local * L);
    if (local < shape.full_rows) return L;
  }
  std::vector<Piece> pieces;
  ListPieces(row, &pieces);
  int64_t slots = 0;
  for (const Piece& piece : pieces) slots += piece.slots();
  return slots;
}

void RowPlan::FindRows(int64_t document, std::vector<int64_t>* rows) const {
  rows->clear();
  if (document < range().first_document || document >= range().end_document) {
    throw std::out_of_range("document " + std::to_string(document) + " of a plan of documents [" +
                            std::to_string(range().first_document) + ", " +
                            std::to_string(range().end_document) + ")");
  }
  const int64_t length = corpus_->PlannedLength(document);
  if (!rules().Keeps(length)) return;
  const Block block = OpenBlock((document - range().first_document) / rules().block_documents);
  int64_t begin = CountUnitsBefore(block, document);
  int64_t end = begin + rules().Units(length);
  if (rules().pack == Pack::kConcat) {
    begin /= rules().seq_length;
    end = (end + rules().seq_length - 1) / rules().seq_length;
  }
  for (int64_t row = begin; row < end; ++row) rows->push_back(block.first_row + row);
  if (rules().pack == Pack::kBfd && length % rules().piece_capacity() != 0) {
    FindPackedRow(block, document, rows);
  }
}

void RowPlan::FindPackedRow(const Block& block, int64_t document,
                            std::vector<int64_t>* rows) const {
  const auto local = static_cast<uint16_t>(document - block.first_document);
  const int64_t tail = IndexOf(block.body.tail_documents(), block.shape.tails, local);
  if (tail == block.shape.tails) RefuseLengths(block.index);
  const uint16_t* starts = block.body.row_starts();
  const int64_t row =
      std::upper_bound(starts, starts + block.shape.packed_rows, static_cast<uint16_t>(tail)) -
      starts - 1;
  rows->push_back(block.first_row + block.shape.full_rows + row);
}

}  // namespace megatron_ettin
