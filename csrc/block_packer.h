// Packs one block of consecutive documents into the body that a plan stores, and reads a body back.
// Specified in docs/order.md, sections 5 and 11.
#ifndef MEGATRON_ETTIN_BLOCK_PACKER_H_
#define MEGATRON_ETTIN_BLOCK_PACKER_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "best_fit.h"
#include "row_rules.h"
#include "token_corpus.h"

namespace megatron_ettin {

inline constexpr int64_t kSampleDocuments = 64;   // documents between two samples of the units
inline constexpr int64_t kChunkDocuments = 1024;  // documents read and hashed at once

// The sizes of a block's parts. Full rows come first, then packed ones; concat and none have full
// rows only.
struct BlockShape {
  int64_t num_documents = 0;
  int64_t full_rows = 0;
  int64_t packed_rows = 0;
  int64_t tails = 0;  // pieces in packed rows
  int64_t tokens = 0;

  int64_t rows() const { return full_rows + packed_rows; }
  int64_t samples() const { return (num_documents + kSampleDocuments - 1) / kSampleDocuments; }
  // A multiple of 8.
  int64_t body_bytes() const { return 8 * samples() + (2 * (tails + packed_rows) + 7) / 8 * 8; }
};

// A body in memory or in a mapped file, 8-byte aligned. Full rows need no entry: they follow from
// the lengths. Layout:
//   u64 units before document 0, 64, 128, ... of the block
//   u16 tail documents, numbered in the block, by packed row, ascending inside
//   u16 the first tail of each packed row
class BlockBody {
 public:
  BlockBody(const char* data, const BlockShape& shape)
      : samples_(reinterpret_cast<const uint64_t*>(data)),
        tail_documents_(reinterpret_cast<const uint16_t*>(data + 8 * shape.samples())),
        row_starts_(tail_documents_ + shape.tails) {}

  const uint64_t* samples() const { return samples_; }
  const uint16_t* tail_documents() const { return tail_documents_; }
  const uint16_t* row_starts() const { return row_starts_; }

 private:
  const uint64_t* samples_;
  const uint16_t* tail_documents_;
  const uint16_t* row_starts_;
};

// Hashes bytes of a plan to detect damage; not cryptographic.
uint64_t HashPlanBytes(const void* bytes, size_t count);

// Packs blocks, one thread at a time; scratch memory is kept from block to block.
class BlockPacker {
 public:
  BlockPacker(const TokenCorpus& corpus, const RowRules& rules);

  // Packs documents [first, last), at most kMaxBlockDocuments. The results stay until the next
  // call. Throws std::invalid_argument that names the document with an impossible length.
  void Pack(int64_t first, int64_t last);

  const BlockShape& shape() const { return shape_; }
  const PlanCounts& counts() const { return counts_; }
  const std::vector<char>& body() const { return body_; }
  // Depends on every length of the block. It starts at 0; each 1,024 documents replace it by the
  // hash of (u64 hash before, i64 lengths).
  uint64_t lengths_hash() const { return lengths_hash_; }

 private:
  // Returns the units of the block before document `last`; `units` are those before `first`.
  int64_t PackChunk(int64_t block_first, int64_t first, int64_t last, int64_t units);
  // Counts one kept document and notes its tail.
  void AddPieces(uint16_t local, int64_t length);
  void AddSlots(int64_t length, int64_t units);
  void StoreTails();

  const TokenCorpus& corpus_;
  const RowRules rules_;
  BestFitPacker packer_;
  BlockShape shape_;
  PlanCounts counts_;
  std::vector<char> body_;
  uint64_t lengths_hash_ = 0;
  std::vector<uint64_t> samples_;
  std::vector<uint16_t> tail_documents_;  // ascending
  std::vector<uint32_t> tail_slots_;
  std::vector<uint16_t> row_of_tail_;
  std::vector<uint32_t> next_tail_;  // per packed row
};

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_BLOCK_PACKER_H_
