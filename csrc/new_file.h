// A file that appears under its name complete or not at all, and never replaces another.
#ifndef MEGATRON_ETTIN_NEW_FILE_H_
#define MEGATRON_ETTIN_NEW_FILE_H_

#include <cstdint>
#include <string>

#include "file_io.h"

namespace megatron_ettin {

// Removes the temporary files that killed writers of `path` left. Those of living writers stay.
void RemoveLeftovers(const std::string& path);

class NewFile {
 public:
  // Creates PATH.tmp.HEX beside `path`, locked and of a name that no other writer uses.
  explicit NewFile(const std::string& path);
  // Removes the temporary file if it was not published.
  ~NewFile();
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  // May be called by several threads at once.
  void WriteAt(const void* bytes, size_t count, int64_t position);

  // Makes the bytes durable, then gives them their name, durably. If another writer was first, its
  // file stays and this one's is removed.
  void Publish();

 private:
  std::string path_;
  std::string temporary_;
  UniqueFd fd_;
  bool removed_ = false;
};

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_NEW_FILE_H_
