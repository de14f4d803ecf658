// The rules by which documents become rows, and the pieces and counts that follow from them. A
// piece is a stretch of one document; a segment is a stretch of the packed stream, the padding
// included (row_batch.h). Specified in docs/order.md, section 5.
#ifndef MEGATRON_ETTIN_ROW_RULES_H_
#define MEGATRON_ETTIN_ROW_RULES_H_

#include <cstdint>

namespace megatron_ettin {

// kBfd: tails share rows by best-fit decreasing. kConcat: one stream of documents, cut into rows.
// kNone: each piece is a row.
enum class Pack : uint8_t { kBfd = 0, kConcat = 1, kNone = 2 };

// kAdd: [CLS] and [SEP] are put around pieces. kPresent: the corpus already holds them.
enum class Specials : uint8_t { kAdd = 0, kPresent = 1 };

inline constexpr int64_t kMaxBlockDocuments = 65536;  // documents of a block have 16-bit numbers

const char* PackName(Pack pack);

struct RowRules {
  int64_t seq_length = 0;  // slots of a row, L
  Pack pack = Pack::kBfd;
  Specials specials = Specials::kAdd;
  int64_t min_doc_tokens = 1;                    // shorter documents are dropped and counted
  int64_t max_segments_per_row = 1;              // a row with that many pieces takes no more
  int64_t block_documents = kMaxBlockDocuments;  // documents packed together

  int64_t special_slots() const { return specials == Specials::kAdd ? 2 : 0; }
  int64_t piece_capacity() const { return seq_length - special_slots(); }
  bool Keeps(int64_t length) const { return length >= 1 && length >= min_doc_tokens; }

  // Returns the units of a document: full rows (bfd), slots (concat) or pieces (none); 0 if it is
  // dropped. Their running sum over a block leads from a row to its documents and back.
  int64_t Units(int64_t length) const {
    if (!Keeps(length)) return 0;
    if (pack == Pack::kConcat) return length + special_slots();
    const int64_t capacity = piece_capacity();
    if (length < capacity) return pack == Pack::kNone ? 1 : 0;  // most documents, no division
    return pack == Pack::kNone ? (length - 1) / capacity + 1 : length / capacity;
  }
};

// Throws std::invalid_argument that names the field.
void CheckRules(const RowRules& rules);

// Throws std::invalid_argument that names the value if it lies outside of [low, high].
void CheckField(const char* name, int64_t value, int64_t low, int64_t high);

// One piece: tokens [offset, offset + length) of a document of the corpus, and the special tokens
// that are added around them. A piece of a concat row may hold special tokens alone.
struct Piece {
  int64_t document;
  int64_t offset;
  int32_t length;
  bool cls;
  bool sep;
  bool ends_document;  // the piece holds the document's last slot

  int64_t slots() const { return int64_t{length} + cls + sep; }
};

struct PlanCounts {
  int64_t rows = 0;
  int64_t tokens = 0;  // slots that are not padding: corpus tokens and added specials
  int64_t documents = 0;
  int64_t dropped_documents = 0;
  int64_t dropped_tokens = 0;
  int64_t cut_documents = 0;  // documents of more than one piece

  void Add(const PlanCounts& other);
};

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_ROW_RULES_H_
