#include "token_file.h"

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <vector>

namespace megatron_ettin {
namespace {

constexpr int64_t kCopiedAtOnce = 1024;  // lengths of the index, on the stack
constexpr const char* kRemedy = "; run tools/preprocess_data.py again to rebuild the pair";

// The .idx is published last, so a lone .bin was left by an interrupted run.
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

TokenFile::TokenFile(const std::string& prefix, bool check)
    : prefix_(CheckedPrefix(prefix)),
      idx_(IdxPath(prefix)),
      bin_(BinPath(prefix)),
      checked_(check) {
  bin_.ExpectRandomReads();
  if (!check) idx_.ExpectRandomReads();
  ReadHeader();
  one_sequence_per_document_ = num_boundaries_ == num_sequences_ + 1;
  if (check) {
    CheckOffsets();
    CheckBoundaries();
    idx_.ExpectRandomReads();
  } else {
    CheckEnds();
  }
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
  CheckBinSize(expected);
}

void TokenFile::CheckBinSize(int64_t expected) const {
  if (bin_.size() == expected) return;
  throw std::invalid_argument(
      BinPath(prefix_) + ": " + std::to_string(bin_.size()) + " bytes, but its .idx describes " +
      std::to_string(expected) + ": the file is " +
      (bin_.size() < expected ? "truncated" : "longer than its index") + kRemedy);
}

void TokenFile::CheckEnds() const {
  const int64_t last = num_sequences_ - 1;
  CheckBinSize(last < 0 ? 0
                        : Read<int64_t>(OffsetAt(last)) + SequenceLength(last) * ItemSize(type_));
  CheckBoundary(0, 0);
  CheckBoundary(num_boundaries_ - 1, num_sequences_);
}

void TokenFile::CheckBoundary(int64_t i, int64_t expected) const {
  if (Boundary(i) == expected) return;
  RefuseIndex(BoundaryAt(i), "document boundary " + std::to_string(i) + " is " +
                                 std::to_string(Boundary(i)) + ", expected " +
                                 std::to_string(expected));
}

void TokenFile::CheckBoundaries() {
  CheckBoundary(0, 0);
  for (int64_t i = 1; i < num_boundaries_; ++i) {
    if (Boundary(i) < Boundary(i - 1) || Boundary(i) > num_sequences_) {
      RefuseIndex(BoundaryAt(i), "document boundary " + std::to_string(i) + " is " +
                                     std::to_string(Boundary(i)) + " after " +
                                     std::to_string(Boundary(i - 1)) + ", with " +
                                     std::to_string(num_sequences_) + " sequences");
    }
    one_sequence_per_document_ = one_sequence_per_document_ && Boundary(i) == i;
  }
  CheckBoundary(num_boundaries_ - 1, num_sequences_);
}

int64_t TokenFile::DocumentBegin(int64_t document) const {
  const int64_t sequence = Boundary(document);
  if (one_sequence_per_document_ && sequence != document) CheckBoundary(document, document);
  if (sequence < 0 || sequence > num_sequences_) {
    RefuseIndex(BoundaryAt(document), "document boundary " + std::to_string(document) + " is " +
                                          std::to_string(sequence) + ", with " +
                                          std::to_string(num_sequences_) + " sequences");
  }
  if (sequence == num_sequences_) return num_tokens();
  return Read<int64_t>(OffsetAt(sequence)) / ItemSize(type_);
}

void TokenFile::CopyLengths(int64_t first, int64_t last, int64_t* to) const {
  if (one_sequence_per_document_) {
    for (int64_t begin = first; begin < last; begin += kCopiedAtOnce) {
      CopySequenceLengths(begin, std::min(kCopiedAtOnce, last - begin), to + begin - first);
    }
  } else {
    for (int64_t document = first; document < last; ++document) {
      to[document - first] = DocumentLength(document);
    }
    idx_.Drop(BoundaryAt(first), BoundaryAt(last + 1));
    idx_.Drop(OffsetAt(Boundary(first)), OffsetAt(Boundary(last) + 1));
  }
  if (checked_) return;
  for (int64_t document = first; document < last; ++document) {
    const int64_t length = to[document - first];
    if (length >= 0 && length <= num_tokens()) continue;
    RefuseIndex(
        one_sequence_per_document_ ? kIndexHeaderBytes + 4 * document : BoundaryAt(document),
        "document " + std::to_string(document) + " has length " + std::to_string(length));
  }
}

void TokenFile::CopySequenceLengths(int64_t first, int64_t count, int64_t* to) const {
  int32_t lengths[kCopiedAtOnce];
  idx_.Copy(kIndexHeaderBytes + 4 * first, count * sizeof(int32_t), lengths);
  for (int64_t i = 0; i < count; ++i) to[i] = lengths[i];
  if (checked_) return;
  // The counts alone do not tell one sequence each from an empty document beside one of two.
  int64_t boundaries[kCopiedAtOnce];
  idx_.Copy(BoundaryAt(first), count * sizeof(int64_t), boundaries);
  for (int64_t i = 0; i < count; ++i) {
    if (boundaries[i] != first + i) CheckBoundary(first + i, first + i);
  }
}

void TokenFile::CheckRange(int64_t begin, int64_t count) const {
  if (begin >= 0 && count >= 0 && begin <= num_tokens() && count <= num_tokens() - begin) return;
  throw std::invalid_argument(IdxPath(prefix_) + ": describes tokens " + std::to_string(begin) +
                              " + " + std::to_string(count) + ", but the .bin has " +
                              std::to_string(num_tokens()) + kRemedy);
}

void TokenFile::CopyTokens(int64_t begin, int64_t count, int64_t* to) const {
  CheckRange(begin, count);
  if (type_ == TokenType::kUint16) {
    const auto* from = reinterpret_cast<const uint16_t*>(bin_.data()) + begin;
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  } else {
    const auto* from = reinterpret_cast<const int32_t*>(bin_.data()) + begin;
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
}

void TokenFile::ReadTokens(int64_t begin, int64_t count, void* to) const {
  CheckRange(begin, count);
  const int64_t item = ItemSize(type_);
  bin_.Copy(begin * item, static_cast<size_t>(count * item), to);
}

void TokenFile::FetchTokens(int64_t begin, int64_t count) const {
  if (begin < 0 || count <= 0 || begin > num_tokens() || count > num_tokens() - begin) return;
  bin_.Fetch(begin * ItemSize(type_), (begin + count) * ItemSize(type_));
}

template <typename T>
void TokenFile::CheckTypedTokens(int64_t vocab_size) const {
  const auto limit = static_cast<uint64_t>(vocab_size);
  constexpr int64_t kChunk = 65536;
  std::vector<T> tokens(kChunk);
  for (int64_t begin = 0; begin < num_tokens(); begin += kChunk) {
    const int64_t count = std::min(kChunk, num_tokens() - begin);
    bin_.Copy(begin * static_cast<int64_t>(sizeof(T)), count * sizeof(T), tokens.data());
    bool all_known = true;
    for (int64_t i = 0; i < count; ++i) all_known &= static_cast<uint64_t>(tokens[i]) < limit;
    if (all_known) continue;
    int64_t unknown = 0;
    while (static_cast<uint64_t>(tokens[unknown]) < limit) ++unknown;
    const int64_t at = begin + unknown;
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
        ": token id " + std::to_string(tokens[unknown]) + " is outside the vocabulary of " +
        std::to_string(vocab_size) + "; preprocess with the tokenizer that you train with");
  }
}

void TokenFile::CheckTokens(int64_t vocab_size) const {
  if (vocab_size < 1) {
    throw std::invalid_argument("vocab_size is " + std::to_string(vocab_size) + "; it must be > 0");
  }
  if (type_ == TokenType::kUint16) {
    CheckTypedTokens<uint16_t>(vocab_size);
  } else {
    CheckTypedTokens<int32_t>(vocab_size);
  }
}

}  // namespace megatron_ettin
