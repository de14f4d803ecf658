// Reads a Megatron-Core .bin/.idx pair through memory maps, after checking that the index is
// consistent with itself and with the size of the .bin.
#ifndef MEGATRON_ETTIN_TOKEN_FILE_H_
#define MEGATRON_ETTIN_TOKEN_FILE_H_

#include <cstdint>
#include <cstring>
#include <string>

#include "file_io.h"
#include "token_format.h"

namespace megatron_ettin {

class TokenFile {
 public:
  // Throws IoError if a file cannot be opened, std::invalid_argument that names file, byte and
  // remedy if the pair is not valid. Without `check` only the header and the sizes are read, in
  // O(1), for a pair that was checked before; the other functions then stay inside the files
  // whatever the index says, and throw std::invalid_argument where it cannot be right.
  explicit TokenFile(const std::string& prefix, bool check = true);

  const std::string& prefix() const { return prefix_; }
  TokenType type() const { return type_; }
  int64_t num_documents() const { return num_boundaries_ - 1; }
  int64_t num_tokens() const { return bin_.size() / ItemSize(type_); }

  // True if each document is one sequence: its length is then in the i32 array of the .idx, which
  // begins at byte 34 and is therefore not aligned.
  bool one_sequence_per_document() const { return one_sequence_per_document_; }
  const char* raw_lengths() const { return idx_.data() + kIndexHeaderBytes; }

  int64_t DocumentLength(int64_t document) const {
    if (one_sequence_per_document_) return SequenceLength(document);
    return DocumentBegin(document + 1) - DocumentBegin(document);
  }
  // Returns the index of the document's first token in the .bin; for num_documents(), their end.
  int64_t DocumentBegin(int64_t document) const;

  // The same two for a document that a plan has placed. If each document is one sequence, the
  // offsets alone answer: one page of the index in place of three. Building the plan has checked
  // the lengths and boundaries that are not looked at here.
  int64_t PlannedLength(int64_t document) const {
    if (!one_sequence_per_document_) return DocumentLength(document);
    return PlannedBegin(document + 1) - PlannedBegin(document);
  }
  int64_t PlannedBegin(int64_t document) const {
    if (!one_sequence_per_document_) return DocumentBegin(document);
    if (document == num_sequences_) return num_tokens();
    return Read<int64_t>(OffsetAt(document)) / ItemSize(type_);
  }

  // Copies the lengths of documents [first, last), for passes over the whole file: the index stays
  // out of this process's memory, and in a file opened without checks the documents are checked.
  // Throws std::invalid_argument that names the document.
  void CopyLengths(int64_t first, int64_t last, int64_t* to) const;

  // Copies tokens [begin, begin + count) of the .bin, widened. Throws std::invalid_argument
  // outside.
  void CopyTokens(int64_t begin, int64_t count, int64_t* to) const;

  // Copies the same tokens as they are stored, for passes over the whole file: it stays out of this
  // process's memory. Throws std::invalid_argument outside.
  void ReadTokens(int64_t begin, int64_t count, void* to) const;

  // Begins to read the same tokens without waiting for them; does nothing outside.
  void FetchTokens(int64_t begin, int64_t count) const;

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
  void CheckBinSize(int64_t expected) const;
  void CheckEnds() const;
  void CheckBoundary(int64_t i, int64_t expected) const;
  void CheckOffsets() const;
  void CheckBoundaries();
  void CheckRange(int64_t begin, int64_t count) const;
  void CopySequenceLengths(int64_t first, int64_t count, int64_t* to) const;
  template <typename T>
  void CheckTypedTokens(int64_t vocab_size) const;

  std::string prefix_;
  MappedFile idx_;
  MappedFile bin_;
  TokenType type_ = TokenType::kUint16;
  int64_t num_sequences_ = 0;
  int64_t num_boundaries_ = 0;
  bool checked_ = false;
  bool one_sequence_per_document_ = false;
};

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_TOKEN_FILE_H_
