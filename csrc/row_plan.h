// Which pieces of which documents make up each row. Documents are cut into pieces, full pieces are
// rows of their own, the tails are packed by best-fit decreasing inside blocks of consecutive
// documents. Specified in docs/order.md, section 5.
#ifndef MEGATRON_ETTIN_ROW_PLAN_H_
#define MEGATRON_ETTIN_ROW_PLAN_H_

#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

namespace megatron_ettin {

class BestFitPacker;

// Document lengths owned elsewhere. They may lie unaligned in a memory-mapped .idx file, hence
// memcpy instead of a dereferenced pointer.
class LengthView {
 public:
  LengthView(const void* data, int64_t count, bool is_64_bit, std::shared_ptr<const void> owner)
      : data_(static_cast<const char*>(data)),
        count_(count),
        is_64_bit_(is_64_bit),
        owner_(std::move(owner)) {}

  int64_t size() const { return count_; }
  int64_t operator[](int64_t i) const { return is_64_bit_ ? Load<int64_t>(i) : Load<int32_t>(i); }

 private:
  template <typename T>
  T Load(int64_t i) const {
    T value;
    std::memcpy(&value, data_ + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
  }

  const char* data_;
  int64_t count_;
  bool is_64_bit_;
  std::shared_ptr<const void> owner_;
};

// Whether [CLS] and [SEP] are put around each piece, or the corpus already holds them.
enum class Specials { kAdd, kPresent };

struct RowRules {
  int64_t seq_length = 0;  // slots of a row, L
  Specials specials = Specials::kAdd;
  int64_t min_doc_tokens = 1;        // shorter documents are dropped and counted
  int64_t max_segments_per_row = 1;  // a row with that many pieces takes no more
  int64_t block_documents = 65536;   // documents packed together

  int64_t special_slots() const { return specials == Specials::kAdd ? 2 : 0; }
  int64_t piece_capacity() const { return seq_length - special_slots(); }
};

// One piece: tokens [offset, offset + length) of a document of the corpus.
struct Segment {
  int64_t document;
  int64_t offset;
  int32_t length;
  bool ends_document;
};

struct PlanCounts {
  int64_t rows = 0;
  int64_t tokens = 0;  // slots that are not padding: corpus tokens and added specials
  int64_t documents = 0;
  int64_t dropped_documents = 0;
  int64_t dropped_tokens = 0;
  int64_t cut_documents = 0;  // documents of more than one piece
};

class RowPlan {
 public:
  // Plans documents [first_document, end_document). Throws std::invalid_argument that names the
  // field, or the document with an impossible length.
  RowPlan(LengthView lengths, int64_t first_document, int64_t end_document, const RowRules& rules);

  const RowRules& rules() const { return rules_; }
  const PlanCounts& counts() const { return counts_; }
  int64_t end_document() const { return end_document_; }
  int64_t DocumentLength(int64_t document) const { return lengths_[document]; }

  // Replaces `segments` by the pieces of a row, in ascending order of document.
  void Segments(int64_t row, std::vector<Segment>* segments) const;

  // The number of slots of each row that are not padding.
  const std::vector<int32_t>& row_tokens() const { return row_tokens_; }

 private:
  // Full rows first (by document, then offset), then packed rows in the order they were opened.
  struct Block {
    int64_t first_document;
    int64_t first_row;
    int64_t first_packed_row;
    int64_t long_begin;   // into long_document_, long_row_
    int64_t start_begin;  // into tail_start_: one entry per packed row and the end
    int64_t tail_begin;   // into tail_document_
  };

  const Block& BlockOf(int64_t row) const;
  void PlanBlock(int64_t first, int64_t last, BestFitPacker* packer);
  void StoreTails(const std::vector<uint16_t>& documents, const std::vector<int64_t>& sizes,
                  BestFitPacker* packer);

  LengthView lengths_;
  int64_t end_document_;
  RowRules rules_;
  PlanCounts counts_;
  std::vector<Block> blocks_;
  std::vector<int32_t> row_tokens_;
  // Documents are numbered inside their block: two bytes each.
  std::vector<uint16_t> long_document_;  // documents with full pieces, ascending
  std::vector<int64_t> long_row_;        // the first full row of each, counted inside the block
  std::vector<uint32_t> tail_start_;     // first tail of a packed row, counted inside the block
  std::vector<uint16_t> tail_document_;  // documents with a tail, by packed row, ascending inside
};

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_ROW_PLAN_H_
