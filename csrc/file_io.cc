#include "file_io.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

namespace megatron_ettin {
namespace {

std::string Reason(int code) { return std::generic_category().message(code); }

void WriteAll(int fd, const char* bytes, size_t count, const std::string& path) {
  while (count > 0) {
    const ssize_t written = ::write(fd, bytes, count);
    if (written < 0) {
      if (errno == EINTR) continue;
      throw IoError(errno, path);
    }
    bytes += written;
    count -= static_cast<size_t>(written);
  }
}

bool LocksUnsupported(int code) {
  return code == ENOLCK || code == ENOSYS || code == EOPNOTSUPP || code == EINVAL;
}

}  // namespace

IoError::IoError(int code, const std::string& path) : IoError(code, Reason(code), path) {}

UniqueFd& UniqueFd::operator=(UniqueFd&& other) noexcept {
  if (this != &other) {
    Reset();
    fd_ = other.Release();
  }
  return *this;
}

int UniqueFd::Release() { return std::exchange(fd_, -1); }

void UniqueFd::Reset() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

AppendFile::AppendFile(UniqueFd fd, std::string path)
    : fd_(std::move(fd)), path_(std::move(path)), buffer_(kBufferBytes) {}

void* AppendFile::Reserve(size_t bytes) {
  if (used_ + bytes > kBufferBytes) Flush();
  void* room = buffer_.data() + used_;
  used_ += bytes;
  return room;
}

void AppendFile::Flush() {
  WriteAll(fd_.get(), buffer_.data(), used_, path_);
  used_ = 0;
}

void AppendFile::Sync() {
  Flush();
  if (::fsync(fd_.get()) != 0) throw IoError(errno, path_);
}

void AppendFile::ReadAt(void* bytes, size_t count, int64_t position) const {
  ReadAllAt(fd_.get(), bytes, count, position, path_);
}

void AppendFile::WriteAt(const void* bytes, size_t count, int64_t position) {
  WriteAllAt(fd_.get(), bytes, count, position, path_);
}

void ReadAllAt(int fd, void* bytes, size_t count, int64_t position, const std::string& path) {
  char* to = static_cast<char*>(bytes);
  while (count > 0) {
    const ssize_t got = ::pread(fd, to, count, position);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw IoError(errno, path);
    if (got == 0) throw IoError(EIO, "the file became shorter while it was used", path);
    to += got;
    position += got;
    count -= static_cast<size_t>(got);
  }
}

void WriteAllAt(int fd, const void* bytes, size_t count, int64_t position,
                const std::string& path) {
  const char* from = static_cast<const char*>(bytes);
  while (count > 0) {
    const ssize_t written = ::pwrite(fd, from, count, position);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) throw IoError(errno, path);
    from += written;
    position += written;
    count -= static_cast<size_t>(written);
  }
}

MappedFile::MappedFile(const std::string& path)
    : fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)), path_(path) {
  if (fd_.get() < 0) throw IoError(errno, path);
  struct stat status;
  if (::fstat(fd_.get(), &status) != 0) throw IoError(errno, path);
  if (!S_ISREG(status.st_mode)) throw IoError(EINVAL, "not a regular file", path);
  size_ = status.st_size;
  if (size_ == 0) return;
  void* data = ::mmap(nullptr, static_cast<size_t>(size_), PROT_READ, MAP_SHARED, fd_.get(), 0);
  if (data == MAP_FAILED) throw IoError(errno, path);
  data_ = static_cast<const char*>(data);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<char*>(data_), static_cast<size_t>(size_));
}

void MappedFile::ExpectRandomReads() const {
  // The kernel may ignore this; it then reads more than needed.
  if (data_ != nullptr) {
    ::madvise(const_cast<char*>(data_), static_cast<size_t>(size_), MADV_RANDOM);
  }
}

void MappedFile::Fetch(int64_t begin, int64_t end) const {
  const int64_t page = ::sysconf(_SC_PAGESIZE);
  begin = begin / page * page;
  if (begin < end) {
    ::madvise(const_cast<char*>(data_) + begin, static_cast<size_t>(end - begin), MADV_WILLNEED);
  }
}

void MappedFile::Drop(int64_t begin, int64_t end) const {
  const int64_t page = ::sysconf(_SC_PAGESIZE);
  begin = begin / page * page;
  end = std::min((end + page - 1) / page * page, (size_ + page - 1) / page * page);
  // The mapping is a file's and read-only: dropped pages come back unchanged, and a failure means
  // only that they stay.
  if (begin < end) {
    ::madvise(const_cast<char*>(data_) + begin, static_cast<size_t>(end - begin), MADV_DONTNEED);
  }
}

void MappedFile::Copy(int64_t position, size_t count, void* to) const {
  ReadAllAt(fd_.get(), to, count, position, path_);
}

bool Exists(const std::string& path) {
  struct stat status;
  return ::stat(path.c_str(), &status) == 0;
}

bool IsSameFile(int fd, const std::string& path) {
  struct stat by_fd;
  struct stat by_path;
  if (::fstat(fd, &by_fd) != 0) throw IoError(errno, path);
  if (::stat(path.c_str(), &by_path) != 0) {
    if (errno == ENOENT) return false;
    throw IoError(errno, path);
  }
  return by_fd.st_ino == by_path.st_ino && by_fd.st_dev == by_path.st_dev;
}

std::string DirectoryOf(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "./" : path.substr(0, slash + 1);
}

void RemoveFile(const std::string& path) {
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) throw IoError(errno, path);
}

void Rename(const std::string& from, const std::string& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) throw IoError(errno, to);
}

void SyncDirectoryOf(const std::string& path) {
  const std::string directory = DirectoryOf(path);
  const UniqueFd fd(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (fd.get() < 0) throw IoError(errno, directory);
  // Some network file systems refuse to sync a directory and order renames themselves.
  if (::fsync(fd.get()) != 0 && errno != EINVAL && errno != ENOTSUP) {
    throw IoError(errno, directory);
  }
}

UniqueFd OpenExclusively(const std::string& path) {
  while (true) {
    const int flags = O_RDWR | O_CREAT | O_CLOEXEC;
    bool created = true;
    UniqueFd fd(::open(path.c_str(), flags | O_EXCL, 0666));
    if (fd.get() < 0 && errno == EEXIST) {
      created = false;
      fd = UniqueFd(::open(path.c_str(), flags, 0666));
    }
    if (fd.get() < 0) throw IoError(errno, path);
    if (::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) {
      const int code = errno;
      if (code == EWOULDBLOCK) {
        throw std::invalid_argument(path +
                                    ": another writer is at work on this file; wait for it "
                                    "or choose another output prefix");
      }
      if (!LocksUnsupported(code)) throw IoError(code, path);
      if (!created) {
        throw std::invalid_argument(path +
                                    ": exists, and this file system cannot tell whether a "
                                    "writer is alive; delete it if none is");
      }
    }
    // Between open and flock the previous writer may have renamed the file to its final name.
    if (!IsSameFile(fd.get(), path)) continue;
    if (::ftruncate(fd.get(), 0) != 0) throw IoError(errno, path);
    return fd;
  }
}

}  // namespace megatron_ettin
