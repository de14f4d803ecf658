// The pieces of documents that make up each row, and the rows that hold a document: read from a
// plan file and the lengths of the documents. Specified in docs/order.md, sections 5 and 11.
#ifndef MEGATRON_ETTIN_ROW_PLAN_H_
#define MEGATRON_ETTIN_ROW_PLAN_H_

#include <atomic>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "block_packer.h"
#include "plan_file.h"
#include "row_rules.h"
#include "token_corpus.h"

namespace megatron_ettin {

// Reads a plan. Several threads may call the methods at once.
class RowPlan {
 public:
  // Throws IoError, or std::invalid_argument that names file, byte and remedy if the plan is
  // damaged or was built for other documents.
  RowPlan(const std::string& path, std::shared_ptr<const TokenCorpus> corpus);

  const TokenCorpus& corpus() const { return *corpus_; }
  const RowRules& rules() const { return plan_.rules(); }
  const PlanRange& range() const { return plan_.header().range; }
  const PlanCounts& counts() const { return plan_.header().counts; }

  // Replaces `pieces` by the pieces of a row, in ascending order of document. Throws
  // std::out_of_range; std::invalid_argument if the plan is damaged or the lengths have changed.
  void ListPieces(int64_t row, std::vector<Piece>* pieces) const;

  // Counts the slots of a row that are not padding.
  int64_t CountRowTokens(int64_t row) const;

  // Replaces `rows` by the rows that hold a piece of the document, ascending; none if it was
  // dropped. Throws std::out_of_range if the document is not one of the plan's.
  void FindRows(int64_t document, std::vector<int64_t>* rows) const;

 private:
  using Bytes = std::shared_ptr<const std::vector<char>>;

  struct Block {
    int64_t index;
    int64_t first_document;
    int64_t first_row;
    BlockShape shape;
    BlockBody body;
    Bytes owner;  // of a recomputed body
  };
  // A document and the units of its block before it.
  struct DocumentStart {
    int64_t document;
    int64_t units;
  };

  Block OpenBlock(int64_t index) const;
  Block OpenBlockOfRow(int64_t row) const;
  Bytes Recompute(int64_t index) const;

  int64_t CountUnits(int64_t document) const {
    return rules().Units(corpus_->PlannedLength(document));
  }
  DocumentStart FindUnit(const Block& block, int64_t unit) const;
  int64_t CountUnitsBefore(const Block& block, int64_t document) const;
  void AddWholePiece(const Block& block, int64_t row, std::vector<Piece>* pieces) const;
  void AddPackedPieces(const Block& block, int64_t row, std::vector<Piece>* pieces) const;
  void AddStreamPieces(const Block& block, int64_t row, std::vector<Piece>* pieces) const;
  void FindPackedRow(const Block& block, int64_t document, std::vector<int64_t>* rows) const;
  [[noreturn]] void RefuseLengths(int64_t index) const;

  PlanFile plan_;
  const std::shared_ptr<const TokenCorpus> corpus_;
  std::unique_ptr<std::atomic<bool>[]> body_checked_;  // per block of a plan with bodies

  // The bodies used last of a plan without stored ones, the latest first.
  mutable std::mutex recomputed_mutex_;
  mutable std::list<std::pair<int64_t, Bytes>> recomputed_;
};

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_ROW_PLAN_H_
