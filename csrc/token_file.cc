#include "token_file.h"

#include <algorithm>
#include <cerrno>
#include <stdexcept>

namespace megatron_ettin {
namespace {

constexpr const char* kRemedy = "; run tools/preprocess_data.py again to rebuild the pair";

// The .idx is written last, so a lone .bin is what an interrupted run leaves.
const std::string& CheckedPrefix(const std::string& prefix) {
  if (!Exists(IdxPath(prefix)) && Exists(BinPath(prefix))) {
    throw IoError(ENOENT,
                  std::string("no such file, though its .bin exists: the run that wrote it "
                              "did not finish") +
                      kRemedy,
                  IdxPath(prefix));
  }
  return prefix;
}

std::string Decimal(unsigned __int128 value) {
  std::string digits;
  do {
    digits.insert(digits.begin(), static_cast<char>('0' + static_cast<int>(value % 10)));
    value /= 10;
  } while (value != 0);
  return digits;
}

}  // namespace

TokenFile::TokenFile(const std::string& prefix)
    : prefix_(CheckedPrefix(prefix)), idx_(IdxPath(prefix)), bin_(BinPath(prefix)) {
  ReadHeader();
  CheckOffsets();
  CheckBoundaries();
}

void TokenFile::RefuseIndex(int64_t byte, const std::string& what) const {
  throw std::invalid_argument(IdxPath(prefix_) + ": byte " + std::to_string(byte) + ": " + what +
                              kRemedy);
}

void TokenFile::ReadHeader() {
  const int64_t size = idx_.size();
  if (size < kIndexHeaderBytes) {
    RefuseIndex(
        size, "the file ends inside its header of " + std::to_string(kIndexHeaderBytes) + " bytes");
  }
  if (std::memcmp(idx_.data(), kIndexMagic, sizeof(kIndexMagic)) != 0) {
    RefuseIndex(0, "not a Megatron index: the magic MMIDIDX is missing");
  }
  const auto version = Read<uint64_t>(kVersionAt);
  if (version != kIndexVersion) {
    RefuseIndex(kVersionAt, "version " + std::to_string(version) + ", expected 1");
  }
  const auto code = Read<uint8_t>(kTypeAt);
  if (code != static_cast<uint8_t>(TokenType::kInt32) &&
      code != static_cast<uint8_t>(TokenType::kUint16)) {
    RefuseIndex(kTypeAt,
                "dtype code " + std::to_string(code) + ", expected 8 (uint16) or 4 (int32)");
  }
  type_ = static_cast<TokenType>(code);
  const auto sequences = Read<uint64_t>(kSequencesAt);
  const auto boundaries = Read<uint64_t>(kBoundariesAt);
  // In 128 bits, so that absurd counts cannot wrap to the right size.
  const unsigned __int128 needed = static_cast<unsigned __int128>(sequences) * 12 +
                                   static_cast<unsigned __int128>(boundaries) * 8 +
                                   kIndexHeaderBytes;
  if (needed != static_cast<unsigned __int128>(size)) {
    RefuseIndex(kSequencesAt,
                std::to_string(sequences) + " sequences and " + std::to_string(boundaries) +
                    " document boundaries need " + Decimal(needed) + " bytes, but the file has " +
                    std::to_string(size) + ": it is truncated, or not an index of text");
  }
  if (boundaries == 0) RefuseIndex(kBoundariesAt, "no document boundaries, expected at least one");
  num_sequences_ = static_cast<int64_t>(sequences);
  num_boundaries_ = static_cast<int64_t>(boundaries);
}

void TokenFile::CheckOffsets() const {
  const int64_t item = ItemSize(type_);
  int64_t expected = 0;
  for (int64_t i = 0; i < num_sequences_; ++i) {
    const int32_t length = SequenceLength(i);
    if (length < 0) {
      RefuseIndex(kIndexHeaderBytes + 4 * i,
                  "sequence " + std::to_string(i) + " has length " + std::to_string(length));
    }
    const auto offset = Read<int64_t>(OffsetAt(i));
    if (offset != expected) {
      RefuseIndex(OffsetAt(i), "sequence " + std::to_string(i) + " is said to begin at byte " +
                                   std::to_string(offset) +
                                   " of the .bin, but the lengths before "
                                   "it sum to byte " +
                                   std::to_string(expected));
    }
    expected += length * item;
  }
  if (bin_.size() != expected) {
    throw std::invalid_argument(
        BinPath(prefix_) + ": " + std::to_string(bin_.size()) + " bytes, but its .idx describes " +
        std::to_string(expected) + ": the file is " +
        (bin_.size() < expected ? "truncated" : "longer than its index") + kRemedy);
  }
}

void TokenFile::CheckBoundaries() {
  if (Boundary(0) != 0) RefuseIndex(BoundaryAt(0), "the first document boundary is not 0");
  bool one_each = num_boundaries_ == num_sequences_ + 1;
  for (int64_t i = 1; i < num_boundaries_; ++i) {
    if (Boundary(i) < Boundary(i - 1) || Boundary(i) > num_sequences_) {
      RefuseIndex(BoundaryAt(i), "document boundary " + std::to_string(i) + " is " +
                                     std::to_string(Boundary(i)) + " after " +
                                     std::to_string(Boundary(i - 1)) + ", with " +
                                     std::to_string(num_sequences_) + " sequences");
    }
    one_each = one_each && Boundary(i) == i;
  }
  if (Boundary(num_boundaries_ - 1) != num_sequences_) {
    RefuseIndex(BoundaryAt(num_boundaries_ - 1),
                "the last document boundary is " + std::to_string(Boundary(num_boundaries_ - 1)) +
                    ", expected the number of sequences, " + std::to_string(num_sequences_));
  }
  if (one_each) return;
  document_lengths_.resize(num_documents(), 0);
  for (int64_t document = 0; document < num_documents(); ++document) {
    for (int64_t i = Boundary(document); i < Boundary(document + 1); ++i) {
      document_lengths_[document] += SequenceLength(i);
    }
  }
}

int64_t TokenFile::DocumentLength(int64_t document) const {
  return one_sequence_per_document() ? SequenceLength(document) : document_lengths_[document];
}

int64_t TokenFile::DocumentBegin(int64_t document) const {
  const int64_t sequence = Boundary(document);
  if (sequence == num_sequences_) return num_tokens();  // an empty document at the very end
  return Read<int64_t>(OffsetAt(sequence)) / ItemSize(type_);
}

void TokenFile::CopyTokens(int64_t begin, int64_t count, int64_t* to) const {
  if (type_ == TokenType::kUint16) {
    const auto* from = reinterpret_cast<const uint16_t*>(bin_.data()) + begin;
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  } else {
    const auto* from = reinterpret_cast<const int32_t*>(bin_.data()) + begin;
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
}

template <typename T>
void TokenFile::CheckTokensOf(int64_t vocab_size) const {
  const auto* tokens = reinterpret_cast<const T*>(bin_.data());
  const auto limit = static_cast<uint64_t>(vocab_size);
  constexpr int64_t kChunk = 65536;
  for (int64_t begin = 0; begin < num_tokens(); begin += kChunk) {
    const int64_t end = std::min(begin + kChunk, num_tokens());
    bool all_known = true;
    for (int64_t i = begin; i < end; ++i) all_known &= static_cast<uint64_t>(tokens[i]) < limit;
    if (all_known) continue;
    int64_t at = begin;
    while (static_cast<uint64_t>(tokens[at]) < limit) ++at;
    // The last document that begins at or before the token: empty ones before it begin there too.
    int64_t low = 0;
    int64_t high = num_documents();
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (DocumentBegin(middle) <= at ? low : high) = middle;
    }
    throw std::invalid_argument(
        BinPath(prefix_) + ": byte " + std::to_string(at * ItemSize(type_)) + ", document " +
        std::to_string(low) + ", position " + std::to_string(at - DocumentBegin(low)) +
        ": token id " + std::to_string(tokens[at]) + " is outside the vocabulary of " +
        std::to_string(vocab_size) + "; preprocess with the tokenizer that you train with");
  }
}

void TokenFile::CheckTokens(int64_t vocab_size) const {
  if (vocab_size < 1) {
    throw std::invalid_argument("vocab_size is " + std::to_string(vocab_size) + "; it must be > 0");
  }
  if (type_ == TokenType::kUint16) {
    CheckTokensOf<uint16_t>(vocab_size);
  } else {
    CheckTokensOf<int32_t>(vocab_size);
  }
}

}  // namespace megatron_ettin
