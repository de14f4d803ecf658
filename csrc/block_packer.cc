#include "block_packer.h"

#include <algorithm>
#include <cstring>

#include "xxh3.h"

namespace megatron_ettin {

uint64_t HashPlanBytes(const void* bytes, size_t count) { return Xxh3_64(bytes, count); }

BlockPacker::BlockPacker(const TokenCorpus& corpus, const RowRules& rules)
    : corpus_(corpus), rules_(rules), packer_(rules.seq_length, rules.max_segments_per_row) {
  // Growing by doubling would hold up to three times as much; untouched pages cost nothing.
  tail_documents_.reserve(kMaxBlockDocuments);
  tail_slots_.reserve(kMaxBlockDocuments);
}

void BlockPacker::Pack(int64_t first, int64_t last) {
  shape_ = BlockShape{};
  counts_ = PlanCounts{};
  samples_.clear();
  tail_documents_.clear();
  tail_slots_.clear();
  lengths_hash_ = 0;
  int64_t units = 0;
  for (int64_t begin = first; begin < last; begin += kChunkDocuments) {
    units = PackChunk(first, begin, std::min(begin + kChunkDocuments, last), units);
  }
  const int64_t L = rules_.seq_length;
  shape_.num_documents = last - first;
  shape_.full_rows = rules_.pack == Pack::kConcat ? (units + L - 1) / L : units;
  shape_.tokens = counts_.tokens;
  StoreTails();
  counts_.rows = shape_.rows();
}

int64_t BlockPacker::PackChunk(int64_t block_first, int64_t first, int64_t last, int64_t units) {
  int64_t hashed[1 + kChunkDocuments];  // the hash before, then the lengths: hashed in one call
  std::memcpy(hashed, &lengths_hash_, sizeof(lengths_hash_));
  corpus_.CopyLengths(first, last, hashed + 1);
  lengths_hash_ = HashPlanBytes(hashed, sizeof(int64_t) * (1 + last - first));
  for (int64_t document = first; document < last; ++document) {
    const int64_t local = document - block_first;
    if (local % kSampleDocuments == 0) samples_.push_back(units);
    const int64_t length = hashed[1 + document - first];
    if (!rules_.Keeps(length)) {
      ++counts_.dropped_documents;
      counts_.dropped_tokens += length;
      continue;
    }
    ++counts_.documents;
    if (rules_.pack == Pack::kConcat) {
      AddSlots(length, units);
    } else {
      AddPieces(static_cast<uint16_t>(local), length);
    }
    units += rules_.Units(length);
  }
  return units;
}

void BlockPacker::AddPieces(uint16_t local, int64_t length) {
  const int64_t capacity = rules_.piece_capacity();
  const int64_t full = length < capacity ? 0 : length / capacity;
  const int64_t tail = length - full * capacity;
  const int64_t pieces = full + (tail > 0 ? 1 : 0);
  counts_.cut_documents += pieces > 1 ? 1 : 0;
  counts_.tokens += length + pieces * rules_.special_slots();
  if (tail > 0 && rules_.pack == Pack::kBfd) {
    tail_documents_.push_back(local);
    tail_slots_.push_back(static_cast<uint32_t>(tail + rules_.special_slots()));
  }
}

void BlockPacker::AddSlots(int64_t length, int64_t units) {
  const int64_t slots = length + rules_.special_slots();
  counts_.tokens += slots;
  const bool cut = units / rules_.seq_length != (units + slots - 1) / rules_.seq_length;
  counts_.cut_documents += cut ? 1 : 0;
}

void BlockPacker::StoreTails() {
  shape_.tails = static_cast<int64_t>(tail_documents_.size());
  shape_.packed_rows = packer_.Pack(tail_slots_, &row_of_tail_);
  body_.assign(shape_.body_bytes(), 0);
  std::memcpy(body_.data(), samples_.data(), samples_.size() * sizeof(uint64_t));
  auto* documents = reinterpret_cast<uint16_t*>(body_.data() + 8 * shape_.samples());
  uint16_t* starts = documents + shape_.tails;

  next_tail_.assign(shape_.packed_rows + 1, 0);
  for (uint16_t row : row_of_tail_) ++next_tail_[row + 1];
  for (int64_t row = 0; row < shape_.packed_rows; ++row) {
    starts[row] = static_cast<uint16_t>(next_tail_[row]);  // each row has a tail: below 65,536
    next_tail_[row + 1] += next_tail_[row];
  }
  // Documents are visited in ascending order, so each row receives its own in that order.
  for (int64_t i = 0; i < shape_.tails; ++i) {
    documents[next_tail_[row_of_tail_[i]]++] = tail_documents_[i];
  }
}

}  // namespace megatron_ettin
