// Reads a Megatron-Core .bin/.idx pair through memory maps, after checking that the index is
// consistent with itself and with the size of the .bin.
#ifndef MEGATRON_ETTIN_TOKEN_FILE_H_
#define MEGATRON_ETTIN_TOKEN_FILE_H_

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "file_io.h"
#include "token_format.h"

namespace megatron_ettin {

class TokenFile {
 public:
  // Throws IoError if a file cannot be opened, std::invalid_argument that names file, byte and
  // remedy if the pair is not valid.
  explicit TokenFile(const std::string& prefix);

  const std::string& prefix() const { return prefix_; }
  TokenType type() const { return type_; }
  int64_t num_documents() const { return num_boundaries_ - 1; }
  int64_t num_tokens() const { return bin_.size() / ItemSize(type_); }

  // Lengths of the documents. If each is one sequence they are the i32 array of the .idx itself
  // (possibly unaligned); else num_documents() sums.
  bool one_sequence_per_document() const { return document_lengths_.empty(); }
  const char* raw_lengths() const { return idx_.data() + kIndexHeaderBytes; }
  const std::vector<int64_t>& document_lengths() const { return document_lengths_; }

  int64_t DocumentLength(int64_t document) const;
  // Index of the document's first token in the .bin.
  int64_t DocumentBegin(int64_t document) const;

  // Copies tokens [begin, begin + count) of the .bin, widened.
  void CopyTokens(int64_t begin, int64_t count, int64_t* to) const;

  // Reads every token. Throws std::invalid_argument that names file, byte, document and position of
  // the first id outside [0, vocab_size).
  void CheckTokens(int64_t vocab_size) const;

 private:
  template <typename T>
  T Read(int64_t position) const {
    T value;
    std::memcpy(&value, idx_.data() + position, sizeof(T));
    return value;
  }
  int32_t SequenceLength(int64_t i) const { return Read<int32_t>(kIndexHeaderBytes + 4 * i); }
  int64_t OffsetAt(int64_t i) const { return kIndexHeaderBytes + 4 * num_sequences_ + 8 * i; }
  int64_t BoundaryAt(int64_t i) const { return OffsetAt(num_sequences_) + 8 * i; }
  int64_t Boundary(int64_t i) const { return Read<int64_t>(BoundaryAt(i)); }

  [[noreturn]] void RefuseIndex(int64_t byte, const std::string& what) const;
  void ReadHeader();
  void CheckOffsets() const;
  void CheckBoundaries();
  template <typename T>
  void CheckTokensOf(int64_t vocab_size) const;

  std::string prefix_;
  MappedFile idx_;
  MappedFile bin_;
  TokenType type_ = TokenType::kUint16;
  int64_t num_sequences_ = 0;
  int64_t num_boundaries_ = 0;
  std::vector<int64_t> document_lengths_;
};

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_TOKEN_FILE_H_
