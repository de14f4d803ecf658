#include "row_plan.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "best_fit.h"

namespace megatron_ettin {
namespace {

constexpr int64_t kMaxBlockDocuments = 65536;
constexpr int64_t kMaxSeqLength = int64_t{1} << 24;

void CheckField(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return;
  throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) +
                              "; it must lie in [" + std::to_string(low) + ", " +
                              std::to_string(high) + "]");
}

void CheckRules(const RowRules& rules) {
  CheckField("seq_length", rules.seq_length, rules.special_slots() + 1, kMaxSeqLength);
  CheckField("min_doc_tokens", rules.min_doc_tokens, 0, std::numeric_limits<int64_t>::max());
  CheckField("max_segments_per_row", rules.max_segments_per_row, 1, kMaxSeqLength);
  CheckField("block_documents", rules.block_documents, 1, kMaxBlockDocuments);
}

}  // namespace

RowPlan::RowPlan(LengthView lengths, int64_t first_document, int64_t end_document,
                 const RowRules& rules)
    : lengths_(std::move(lengths)), end_document_(end_document), rules_(rules) {
  CheckRules(rules);
  CheckField("end_document", end_document, 0, lengths_.size());
  CheckField("first_document", first_document, 0, end_document);
  BestFitPacker packer(rules.seq_length, rules.max_segments_per_row);
  for (int64_t first = first_document; first < end_document; first += rules.block_documents) {
    PlanBlock(first, std::min(first + rules.block_documents, end_document), &packer);
  }
}

void RowPlan::PlanBlock(int64_t first, int64_t last, BestFitPacker* packer) {
  const int64_t capacity = rules_.piece_capacity();
  const int64_t shortest = std::max<int64_t>(rules_.min_doc_tokens, 1);
  Block block{};
  block.first_document = first;
  block.first_row = counts_.rows;
  block.long_begin = static_cast<int64_t>(long_document_.size());
  block.start_begin = static_cast<int64_t>(tail_start_.size());
  block.tail_begin = static_cast<int64_t>(tail_document_.size());

  int64_t full_rows = 0;
  std::vector<uint16_t> tails;
  std::vector<int64_t> sizes;
  for (int64_t document = first; document < last; ++document) {
    const int64_t length = lengths_[document];
    if (length < shortest) {
      if (length < 0) {
        throw std::invalid_argument("document " + std::to_string(document) + " has length " +
                                    std::to_string(length));
      }
      ++counts_.dropped_documents;
      counts_.dropped_tokens += length;
      continue;
    }
    const auto local = static_cast<uint16_t>(document - first);
    const int64_t full = length < capacity ? 0 : length / capacity;
    const int64_t tail = length - full * capacity;
    if (full > 0) {
      long_document_.push_back(local);
      long_row_.push_back(full_rows);
      full_rows += full;
    }
    if (tail > 0) {
      tails.push_back(local);
      sizes.push_back(tail + rules_.special_slots());
    }
    const int64_t pieces = full + (tail > 0 ? 1 : 0);
    ++counts_.documents;
    counts_.cut_documents += pieces > 1 ? 1 : 0;
    counts_.tokens += length + pieces * rules_.special_slots();
  }
  counts_.rows += full_rows;
  row_tokens_.resize(counts_.rows, static_cast<int32_t>(rules_.seq_length));
  block.first_packed_row = counts_.rows;
  StoreTails(tails, sizes, packer);
  blocks_.push_back(block);
}

void RowPlan::StoreTails(const std::vector<uint16_t>& documents, const std::vector<int64_t>& sizes,
                         BestFitPacker* packer) {
  std::vector<uint32_t> row_of;
  const int64_t rows = packer->Pack(sizes, &row_of);
  std::vector<uint32_t> next(rows + 1, 0);
  for (uint32_t row : row_of) ++next[row + 1];
  for (int64_t row = 0; row < rows; ++row) next[row + 1] += next[row];
  tail_start_.insert(tail_start_.end(), next.begin(), next.end());
  const size_t begin = tail_document_.size();
  tail_document_.resize(begin + documents.size());
  // Documents are visited in ascending order, so each row receives its own in that order.
  for (size_t i = 0; i < documents.size(); ++i) {
    tail_document_[begin + next[row_of[i]]++] = documents[i];
  }
  counts_.rows += rows;
  for (int64_t row = 0; row < rows; ++row) {
    row_tokens_.push_back(static_cast<int32_t>(rules_.seq_length - packer->FreeSpace(row)));
  }
}

const RowPlan::Block& RowPlan::BlockOf(int64_t row) const {
  const auto after =
      std::upper_bound(blocks_.begin(), blocks_.end(), row,
                       [](int64_t value, const Block& block) { return value < block.first_row; });
  return *(after - 1);
}

void RowPlan::Segments(int64_t row, std::vector<Segment>* segments) const {
  if (row < 0 || row >= counts_.rows) {
    throw std::out_of_range("row " + std::to_string(row) + " of a plan of " +
                            std::to_string(counts_.rows) + " rows");
  }
  segments->clear();
  const Block& block = BlockOf(row);
  const int64_t capacity = rules_.piece_capacity();
  if (row < block.first_packed_row) {
    const int64_t full_row = row - block.first_row;
    const auto begin = long_row_.begin() + block.long_begin;
    const int64_t long_end = &block == &blocks_.back() ? static_cast<int64_t>(long_row_.size())
                                                       : (&block + 1)->long_begin;
    const auto after = std::upper_bound(begin, long_row_.begin() + long_end, full_row);
    const int64_t index = after - long_row_.begin() - 1;
    const int64_t document = block.first_document + long_document_[index];
    const int64_t offset = (full_row - long_row_[index]) * capacity;
    segments->push_back({document, offset, static_cast<int32_t>(capacity),
                         offset + capacity == lengths_[document]});
    return;
  }
  const int64_t start = block.start_begin + row - block.first_packed_row;
  for (uint32_t i = tail_start_[start]; i < tail_start_[start + 1]; ++i) {
    const int64_t document = block.first_document + tail_document_[block.tail_begin + i];
    const int64_t length = lengths_[document];
    const int64_t tail = length % capacity;
    segments->push_back({document, length - tail, static_cast<int32_t>(tail), true});
  }
}

}  // namespace megatron_ettin
