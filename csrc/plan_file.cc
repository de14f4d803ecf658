#include "plan_file.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace megatron_ettin {
namespace {

constexpr int64_t kHeaderBytes = sizeof(PlanHeader);
constexpr int64_t kEntryBytes = sizeof(PlanBlock);
constexpr int64_t kFooterBytes = sizeof(PlanFooter);

}  // namespace

uint64_t HashHeaderAndTable(const PlanHeader& header, const PlanBlock* table) {
  const uint64_t parts[2] = {HashPlanBytes(&header, kHeaderBytes),
                             HashPlanBytes(table, header.num_blocks * kEntryBytes)};
  return HashPlanBytes(parts, sizeof(parts));
}

PlanHeader MakePlanHeader(const RowRules& rules, const PlanRange& range) {
  PlanHeader header{};
  std::memcpy(header.magic, kPlanMagic, sizeof(kPlanMagic));
  header.version = kPlanVersion;
  header.pack = static_cast<uint8_t>(rules.pack);
  header.specials = static_cast<uint8_t>(rules.specials);
  header.seq_length = rules.seq_length;
  header.min_doc_tokens = rules.min_doc_tokens;
  header.max_segments_per_row = rules.max_segments_per_row;
  header.block_documents = rules.block_documents;
  header.range = range;
  const int64_t documents = range.end_document - range.first_document;
  header.num_blocks = (documents + rules.block_documents - 1) / rules.block_documents;
  return header;
}

PlanFile::PlanFile(const std::string& path) : path_(path), map_(path) {
  map_.ExpectRandomReads();
  CheckHeader();
  CheckFooter();
  CheckTable();
}

void PlanFile::Refuse(int64_t byte, const std::string& what) const {
  throw std::invalid_argument(path_ + ": byte " + std::to_string(byte) + ": " + what +
                              "; remove the file, it is rebuilt");
}

void PlanFile::CheckHeader() {
  const int64_t size = map_.size();
  if (size < kHeaderBytes + kFooterBytes) {
    Refuse(size, "the file is truncated: a plan has at least " +
                     std::to_string(kHeaderBytes + kFooterBytes) + " bytes");
  }
  std::memcpy(&header_, map_.data(), kHeaderBytes);
  if (std::memcmp(header_.magic, kPlanMagic, sizeof(kPlanMagic)) != 0) {
    Refuse(0, "not a row plan: the magic MEPLAN1 is missing");
  }
  if (header_.version != kPlanVersion) {
    Refuse(offsetof(PlanHeader, version), "version " + std::to_string(header_.version) +
                                              ", expected " + std::to_string(kPlanVersion));
  }
  const int64_t begin = header_.table_begin;
  const int64_t blocks = header_.num_blocks;
  if (blocks < 0 || blocks > size / kEntryBytes || begin < kHeaderBytes || begin > size ||
      begin % 8 != 0) {
    Refuse(offsetof(PlanHeader, num_blocks),
           std::to_string(blocks) + " blocks with a table at byte " + std::to_string(begin) +
               " do not fit a file of " + std::to_string(size) +
               " bytes: it is truncated or damaged");
  }
  const int64_t needed = begin + blocks * kEntryBytes + kFooterBytes;
  if (needed != size) {
    Refuse(std::min(size, needed), "the file has " + std::to_string(size) + " bytes, expected " +
                                       std::to_string(needed) + ": it is " +
                                       (size < needed ? "truncated" : "too long"));
  }
  map_.Fetch(begin, size);
  table_ = reinterpret_cast<const PlanBlock*>(map_.data() + begin);
}

void PlanFile::CheckFooter() const {
  const int64_t at = map_.size() - kFooterBytes;
  PlanFooter footer;
  std::memcpy(&footer, map_.data() + at, sizeof(footer));
  if (footer.file_bytes != map_.size()) {
    Refuse(at + offsetof(PlanFooter, file_bytes),
           "the footer says " + std::to_string(footer.file_bytes) + " bytes, but the file has " +
               std::to_string(map_.size()));
  }
  if (footer.hash != HashHeaderAndTable(header_, table_)) {
    Refuse(at, "the header (bytes 0 to " + std::to_string(kHeaderBytes) +
                   ") or the block table (from byte " + std::to_string(header_.table_begin) +
                   ") is damaged: its hash differs from the footer's");
  }
}

void PlanFile::CheckTable() {
  rules_.seq_length = header_.seq_length;
  rules_.pack = static_cast<Pack>(header_.pack);
  rules_.specials = static_cast<Specials>(header_.specials);
  rules_.min_doc_tokens = header_.min_doc_tokens;
  rules_.max_segments_per_row = header_.max_segments_per_row;
  rules_.block_documents = header_.block_documents;
  // The hash holds, so what follows catches plans of another program, not damage.
  try {
    CheckRules(rules_);
    CheckField("pack", header_.pack, 0, 2);
    CheckField("specials", header_.specials, 0, 1);
    CheckField("first_document", header_.range.first_document, 0, header_.range.end_document);
    CheckField("end_document", header_.range.end_document, 0, header_.range.file_documents);
    const int64_t blocks = MakePlanHeader(rules_, header_.range).num_blocks;
    CheckField("num_blocks", header_.num_blocks, blocks, blocks);
  } catch (const std::invalid_argument& error) {
    Refuse(0, std::string("in the header, ") + error.what());
  }
  int64_t row = 0;
  int64_t body = kHeaderBytes;
  first_row_.reserve(header_.num_blocks);
  for (int64_t i = 0; i < header_.num_blocks; ++i) {
    const PlanBlock& block = table_[i];
    if (block.first_row != row || block.full_rows < 0 ||
        block.body_begin != (has_bodies() ? body : 0)) {
      Refuse(header_.table_begin + i * kEntryBytes,
             "block " + std::to_string(i) + " does not follow the one before it");
    }
    first_row_.push_back(row);
    const BlockShape shape = ShapeOf(i);
    row += shape.rows();
    body += has_bodies() ? shape.body_bytes() : 0;
  }
  if (row != header_.counts.rows || body != header_.table_begin) {
    Refuse(header_.table_begin, "the blocks do not add up to the rows and bytes of the header");
  }
}

BlockShape PlanFile::ShapeOf(int64_t index) const {
  const PlanBlock& block = table_[index];
  const int64_t remaining = header_.range.end_document - BlockFirstDocument(index);
  return {std::min(rules_.block_documents, remaining), block.full_rows, block.packed_rows,
          block.tails, block.tokens};
}

int64_t PlanFile::FindBlockOfRow(int64_t row) const {
  // Blocks without rows share their first row with the next one: the last of them has it.
  return std::upper_bound(first_row_.begin(), first_row_.end(), row) - first_row_.begin() - 1;
}

void PlanFile::CheckBody(int64_t index) const {
  const PlanBlock& block = table_[index];
  const int64_t bytes = ShapeOf(index).body_bytes();
  map_.Fetch(block.body_begin, block.body_begin + bytes);
  if (HashPlanBytes(Body(index), bytes) != block.body_hash) {
    const int64_t first = BlockFirstDocument(index);
    Refuse(block.body_begin, "the rows of documents [" + std::to_string(first) + ", " +
                                 std::to_string(first + ShapeOf(index).num_documents) +
                                 ") are damaged: their hash differs from the block table's");
  }
  // A row needs a few of the pages that the hash has read.
  map_.Drop(block.body_begin, block.body_begin + bytes);
}

}  // namespace megatron_ettin
