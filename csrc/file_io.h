// POSIX files with errors that name the path: descriptors, buffered appends, read-only mappings and
// durable renames.
#ifndef MEGATRON_ETTIN_FILE_IO_H_
#define MEGATRON_ETTIN_FILE_IO_H_

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace megatron_ettin {

// A failed system call. Python sees OSError(code, reason, path).
class IoError : public std::runtime_error {
 public:
  IoError(int code, const std::string& reason, const std::string& path)
      : std::runtime_error(path + ": " + reason), code_(code), reason_(reason), path_(path) {}
  // Describes `code` by the system's own words.
  IoError(int code, const std::string& path);

  int code() const { return code_; }
  const std::string& reason() const { return reason_; }
  const std::string& path() const { return path_; }

 private:
  int code_;
  std::string reason_;
  std::string path_;
};

class UniqueFd {
 public:
  explicit UniqueFd(int fd = -1) : fd_(fd) {}
  ~UniqueFd() { Reset(); }
  UniqueFd(UniqueFd&& other) noexcept : fd_(other.Release()) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept;
  UniqueFd(const UniqueFd&) = delete;
  UniqueFd& operator=(const UniqueFd&) = delete;

  int get() const { return fd_; }
  int Release();
  void Reset();

 private:
  int fd_;
};

// Appends to a file through a buffer. The destructor writes nothing: without Flush() or Sync() the
// rest of the buffer is lost.
class AppendFile {
 public:
  // Takes an open descriptor, positioned where the first byte goes.
  AppendFile(UniqueFd fd, std::string path);

  // Returns room for `bytes` (at most kBufferBytes) that the caller fills before the next call.
  void* Reserve(size_t bytes);
  void Flush();
  // Flush, then wait until the bytes are on the device.
  void Sync();
  // Reads or writes at a position, past the buffer.
  void ReadAt(void* bytes, size_t count, int64_t position) const;
  void WriteAt(const void* bytes, size_t count, int64_t position);

  const std::string& path() const { return path_; }
  static constexpr size_t kBufferBytes = size_t{1} << 20;

 private:
  UniqueFd fd_;
  std::string path_;
  std::vector<char> buffer_;
  size_t used_ = 0;
};

// Writes all bytes at a position of the file; errors name it as `path`.
void WriteAllAt(int fd, const void* bytes, size_t count, int64_t position, const std::string& path);

// Reads all bytes at a position of the file; errors name it as `path`.
void ReadAllAt(int fd, void* bytes, size_t count, int64_t position, const std::string& path);

// A whole file mapped read-only. A page that is touched brings those around it, up to the
// readahead of the device (megabytes on some), until ExpectRandomReads().
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const char* data() const { return data_; }
  int64_t size() const { return size_; }

  // From now on a page that is touched is read alone. Copy() is not affected.
  void ExpectRandomReads() const;
  // Begins to read bytes [begin, end) that are about to be touched, without waiting for them.
  void Fetch(int64_t begin, int64_t end) const;
  // Takes the pages of bytes [begin, end) out of this process; they are read again when touched.
  void Drop(int64_t begin, int64_t end) const;
  // Copies bytes without mapping their pages, for scans: the kernel reads ahead of them, and a page
  // that is touched may map megabytes around it.
  void Copy(int64_t position, size_t count, void* to) const;

 private:
  UniqueFd fd_;
  std::string path_;
  const char* data_ = nullptr;
  int64_t size_ = 0;
};

bool Exists(const std::string& path);

// Tells if the path still names the file behind the descriptor.
bool IsSameFile(int fd, const std::string& path);

// Returns the directory of a path, with its slash; "./" for a path without one.
std::string DirectoryOf(const std::string& path);

// Removes a file if it is there.
void RemoveFile(const std::string& path);

void Rename(const std::string& from, const std::string& to);

// Makes renames and removals in the directory of `path` survive a power loss.
void SyncDirectoryOf(const std::string& path);

// Opens an empty file for one writer at a time. A file that a killed process left under that name
// is reused; a file that a live writer holds is refused with std::invalid_argument.
UniqueFd OpenExclusively(const std::string& path);

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_FILE_IO_H_
