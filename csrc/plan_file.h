// The layout of plan files and the checks of one that is opened. Specified in docs/order.md,
// section 11.
#ifndef MEGATRON_ETTIN_PLAN_FILE_H_
#define MEGATRON_ETTIN_PLAN_FILE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "block_packer.h"
#include "file_io.h"
#include "row_rules.h"

namespace megatron_ettin {

inline constexpr char kPlanMagic[8] = {'M', 'E', 'P', 'L', 'A', 'N', '1', '\0'};
inline constexpr uint32_t kPlanVersion = 1;

// The documents that a plan is for. The corpus is identified by the file's name, which its owner
// derives from the lengths; the two sums catch files that were mixed up.
struct PlanRange {
  int64_t first_document = 0;
  int64_t end_document = 0;
  int64_t file_documents = 0;
  int64_t file_tokens = 0;
};

// Fields are little-endian, as on every machine that this extension is built for.
struct PlanHeader {
  char magic[8];
  uint32_t version;
  uint8_t pack;
  uint8_t specials;
  uint8_t has_bodies;
  uint8_t zero;
  int64_t seq_length;
  int64_t min_doc_tokens;
  int64_t max_segments_per_row;
  int64_t block_documents;
  PlanRange range;
  PlanCounts counts;
  int64_t num_blocks;
  int64_t table_begin;  // byte of the block table
};
static_assert(sizeof(PlanHeader) == 144);

struct PlanBlock {
  int64_t first_row;
  int64_t body_begin;  // byte of its body; 0 in a file without bodies
  int64_t full_rows;
  int64_t tokens;
  uint32_t packed_rows;
  uint32_t tails;
  uint64_t body_hash;     // also of a body that is not stored: it is compared when recomputed
  uint64_t lengths_hash;  // BlockPacker's; a block that is computed again must agree
};
static_assert(sizeof(PlanBlock) == 56);

struct PlanFooter {
  uint64_t hash;  // of the header and the block table
  int64_t file_bytes;
};
static_assert(sizeof(PlanFooter) == 16);

uint64_t HashHeaderAndTable(const PlanHeader& header, const PlanBlock* table);

PlanHeader MakePlanHeader(const RowRules& rules, const PlanRange& range);

class PlanFile {
 public:
  // Checks everything but the bodies, in O(number of blocks). Throws IoError, or
  // std::invalid_argument that names file, byte and remedy.
  explicit PlanFile(const std::string& path);

  const std::string& path() const { return path_; }
  const PlanHeader& header() const { return header_; }
  const RowRules& rules() const { return rules_; }
  bool has_bodies() const { return header_.has_bodies != 0; }

  const PlanBlock& block(int64_t index) const { return table_[index]; }
  int64_t BlockFirstDocument(int64_t index) const {
    return header_.range.first_document + index * rules_.block_documents;
  }
  BlockShape ShapeOf(int64_t index) const;
  // Returns the index of the block that holds a row of the plan.
  int64_t FindBlockOfRow(int64_t row) const;

  // The stored body of a block; the caller has checked it, or does so by CheckBody().
  const char* Body(int64_t index) const { return map_.data() + table_[index].body_begin; }
  void CheckBody(int64_t index) const;

  [[noreturn]] void Refuse(int64_t byte, const std::string& what) const;

 private:
  void CheckHeader();
  void CheckFooter() const;
  void CheckTable();

  std::string path_;
  MappedFile map_;
  PlanHeader header_{};
  RowRules rules_;
  const PlanBlock* table_ = nullptr;
  std::vector<int64_t> first_row_;  // of each block, in few cache lines for the search
};

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_PLAN_FILE_H_
