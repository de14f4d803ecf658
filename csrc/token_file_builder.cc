#include "token_file_builder.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace megatron_ettin {
namespace {

// One name, not a random one as in new_file.cc: the lock on it refuses a second writer of the
// prefix, and the next writer overwrites the gigabytes that a killed one left.
constexpr const char* kTemporarySuffix = ".tmp";
constexpr int64_t kChunk = 65536;

template <typename T>
bool Fits(T token, uint64_t max_token) {
  return static_cast<uint64_t>(token) <= max_token;  // a negative token wraps to a huge value
}

template <typename T>
void CheckTokens(const T* tokens, int64_t num_tokens, const int64_t* lengths, TokenType type,
                 int64_t first_document) {
  const uint64_t max_token = MaxToken(type);
  bool all_fit = true;
  for (int64_t i = 0; i < num_tokens; ++i) all_fit &= Fits(tokens[i], max_token);
  if (all_fit) return;
  int64_t position = 0;
  while (Fits(tokens[position], max_token)) ++position;
  const int64_t value = static_cast<int64_t>(tokens[position]);
  int64_t document = 0;
  while (position >= lengths[document]) position -= lengths[document++];
  throw std::invalid_argument("document " + std::to_string(first_document + document) +
                              ", position " + std::to_string(position) + ": token id " +
                              std::to_string(value) + " does not fit " + TypeName(type) +
                              " (0 to " + std::to_string(max_token) + ")");
}

// Appends values [0, count) of a sequence given by a function, converted to Stored.
template <typename Stored, typename ValueAt>
void AppendValues(AppendFile* file, int64_t count, ValueAt value_at) {
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t n = std::min(kChunk, count - begin);
    char* to = static_cast<char*>(file->Reserve(n * sizeof(Stored)));
    for (int64_t i = 0; i < n; ++i) {
      const auto value = static_cast<Stored>(value_at(begin + i));
      std::memcpy(to + i * sizeof(Stored), &value, sizeof(Stored));
    }
  }
}

}  // namespace

TokenFileBuilder::TokenFileBuilder(const std::string& prefix, TokenType type)
    : prefix_(prefix), type_(type), owner_pid_(::getpid()) {
  const std::string bin_path = BinPath(prefix) + kTemporarySuffix;
  const std::string idx_path = IdxPath(prefix) + kTemporarySuffix;
  bin_ = std::make_unique<AppendFile>(OpenExclusively(bin_path), bin_path);
  try {
    idx_ = std::make_unique<AppendFile>(OpenExclusively(idx_path), idx_path);
    // Lengths stream in behind the header, which is written when the counts are known.
    idx_->Reserve(kIndexHeaderBytes);
  } catch (...) {
    RemoveFile(bin_path);
    throw;
  }
}

TokenFileBuilder::~TokenFileBuilder() {
  try {
    Abort();
  } catch (const IoError&) {
    // A destructor cannot report an error; the .tmp file that stays is reused by the next writer.
  }
}

void TokenFileBuilder::CheckOpen() const {
  if (bin_ == nullptr) {
    throw std::invalid_argument(prefix_ + ": this builder was already committed or aborted");
  }
}

void TokenFileBuilder::CheckLengths(int64_t num_tokens, const int64_t* lengths,
                                    int64_t num_documents) const {
  int64_t rest = num_tokens;
  for (int64_t i = 0; i < num_documents; ++i) {
    if (lengths[i] < 0 || lengths[i] > INT32_MAX) {
      throw std::invalid_argument("document " + std::to_string(num_documents_ + i) + ": length " +
                                  std::to_string(lengths[i]) +
                                  " is outside 0 to 2147483647, the range of an .idx file");
    }
    rest -= lengths[i];
    if (rest < 0) break;
  }
  if (rest != 0) {
    throw std::invalid_argument("the lengths do not sum to the " + std::to_string(num_tokens) +
                                " tokens given");
  }
}

template <typename T>
void TokenFileBuilder::AddMany(const T* tokens, int64_t num_tokens, const int64_t* lengths,
                               int64_t num_documents) {
  CheckOpen();
  CheckLengths(num_tokens, lengths, num_documents);
  CheckTokens(tokens, num_tokens, lengths, type_, num_documents_);
  const auto token_at = [tokens](int64_t i) { return tokens[i]; };
  if (type_ == TokenType::kUint16) {
    AppendValues<uint16_t>(bin_.get(), num_tokens, token_at);
  } else {
    AppendValues<int32_t>(bin_.get(), num_tokens, token_at);
  }
  AppendValues<int32_t>(idx_.get(), num_documents, [lengths](int64_t i) { return lengths[i]; });
  num_documents_ += num_documents;
  num_tokens_ += num_tokens;
}

template void TokenFileBuilder::AddMany(const uint16_t*, int64_t, const int64_t*, int64_t);
template void TokenFileBuilder::AddMany(const int32_t*, int64_t, const int64_t*, int64_t);
template void TokenFileBuilder::AddMany(const uint32_t*, int64_t, const int64_t*, int64_t);
template void TokenFileBuilder::AddMany(const int64_t*, int64_t, const int64_t*, int64_t);

void TokenFileBuilder::FinishIndex() {
  idx_->Flush();
  // The byte offsets follow from the lengths already in the file, so they need no memory.
  std::vector<int32_t> lengths(kChunk);
  int64_t offset = 0;
  for (int64_t begin = 0; begin < num_documents_; begin += kChunk) {
    const int64_t n = std::min(kChunk, num_documents_ - begin);
    idx_->ReadAt(lengths.data(), n * sizeof(int32_t), kIndexHeaderBytes + begin * 4);
    AppendValues<int64_t>(idx_.get(), n, [&](int64_t i) {
      const int64_t here = offset;
      offset += lengths[i] * ItemSize(type_);
      return here;
    });
  }
  AppendValues<int64_t>(idx_.get(), num_documents_ + 1, [](int64_t i) { return i; });
  idx_->Flush();

  char header[kIndexHeaderBytes];
  const uint64_t sequences = num_documents_;
  const uint64_t boundaries = num_documents_ + 1;
  std::memcpy(header, kIndexMagic, sizeof(kIndexMagic));
  std::memcpy(header + kVersionAt, &kIndexVersion, sizeof(kIndexVersion));
  std::memcpy(header + kTypeAt, &type_, sizeof(type_));
  std::memcpy(header + kSequencesAt, &sequences, sizeof(sequences));
  std::memcpy(header + kBoundariesAt, &boundaries, sizeof(boundaries));
  idx_->WriteAt(header, sizeof(header), 0);
}

void TokenFileBuilder::Commit(const std::string& companion) {
  CheckOpen();
  FinishIndex();
  bin_->Sync();
  idx_->Sync();
  // Never an .idx beside a .bin or a companion that is not its own: the old one goes first, the new
  // one comes last.
  RemoveFile(IdxPath(prefix_));
  SyncDirectoryOf(prefix_);
  Rename(bin_->path(), BinPath(prefix_));
  if (!companion.empty()) Rename(companion + kTemporarySuffix, companion);
  SyncDirectoryOf(prefix_);
  Rename(idx_->path(), IdxPath(prefix_));
  SyncDirectoryOf(prefix_);
  bin_.reset();
  idx_.reset();
}

void TokenFileBuilder::Abort() {
  // A forked child inherits the object but not the files.
  if (bin_ != nullptr && owner_pid_ == ::getpid()) {
    RemoveFile(idx_->path());
    RemoveFile(bin_->path());
  }
  bin_.reset();
  idx_.reset();
}

}  // namespace megatron_ettin
