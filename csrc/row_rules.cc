#include "row_rules.h"

#include <limits>
#include <stdexcept>
#include <string>

namespace megatron_ettin {
namespace {

constexpr int64_t kMaxSeqLength = int64_t{1} << 24;

}  // namespace

const char* PackName(Pack pack) {
  if (pack == Pack::kBfd) return "bfd";
  return pack == Pack::kConcat ? "concat" : "none";
}

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
  if (rules.pack != Pack::kBfd && rules.max_segments_per_row != 1) {
    throw std::invalid_argument("max_segments_per_row is " +
                                std::to_string(rules.max_segments_per_row) +
                                "; it must be 1 where pack is '" + PackName(rules.pack) + "'");
  }
}

void PlanCounts::Add(const PlanCounts& other) {
  rows += other.rows;
  tokens += other.tokens;
  documents += other.documents;
  dropped_documents += other.dropped_documents;
  dropped_tokens += other.dropped_tokens;
  cut_documents += other.cut_documents;
}

}  // namespace megatron_ettin
