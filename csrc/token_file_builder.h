// Writes tokenised documents as a Megatron-Core .bin/.idx pair, with the same bytes as its own
// builder, in constant memory. The .idx is published last: its presence means a complete pair.
#ifndef MEGATRON_ETTIN_TOKEN_FILE_BUILDER_H_
#define MEGATRON_ETTIN_TOKEN_FILE_BUILDER_H_

#include <cstdint>
#include <memory>
#include <string>

#include "file_io.h"
#include "token_format.h"

namespace megatron_ettin {

class TokenFileBuilder {
 public:
  // Starts PREFIX.bin.tmp and PREFIX.idx.tmp. The directory must exist.
  TokenFileBuilder(const std::string& prefix, TokenType type);
  ~TokenFileBuilder();
  TokenFileBuilder(const TokenFileBuilder&) = delete;
  TokenFileBuilder& operator=(const TokenFileBuilder&) = delete;

  // Adds documents stored end to end; lengths must sum to num_tokens. Throws std::invalid_argument
  // that names the document, the position and the value, and then adds none of them. Defined for
  // uint16_t, int32_t, uint32_t and int64_t.
  template <typename T>
  void AddMany(const T* tokens, int64_t num_tokens, const int64_t* lengths, int64_t num_documents);

  // Publishes the pair durably: .bin, then .idx. Replaces an existing pair. A companion is a file
  // of the same directory that describes the pair: COMPANION.tmp, whole and on the device, takes
  // its place before the .idx does. An empty name stands for none.
  void Commit(const std::string& companion = "");
  // Removes the temporary files. Does nothing after Commit or a second time.
  void Abort();

  int64_t num_documents() const { return num_documents_; }
  int64_t num_tokens() const { return num_tokens_; }

 private:
  void CheckOpen() const;
  void CheckLengths(int64_t num_tokens, const int64_t* lengths, int64_t num_documents) const;
  void FinishIndex();

  std::string prefix_;
  TokenType type_;
  int64_t owner_pid_;
  int64_t num_documents_ = 0;
  int64_t num_tokens_ = 0;
  std::unique_ptr<AppendFile> bin_;
  std::unique_ptr<AppendFile> idx_;
};

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_TOKEN_FILE_BUILDER_H_
