#include "new_file.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/random.h>
#include <unistd.h>

#include <cerrno>
#include <memory>

namespace megatron_ettin {
namespace {

constexpr const char* kTemporaryMark = ".tmp.";  // as in megatron_ettin/publication.py

std::string UniqueName(const std::string& path) {
  uint64_t number = 0;
  // Random rather than host and process number: containers on a shared file system share both.
  if (::getrandom(&number, sizeof(number), 0) != sizeof(number)) throw IoError(errno, path);
  char hex[17];
  ::snprintf(hex, sizeof(hex), "%016llx", static_cast<unsigned long long>(number));
  return path + kTemporaryMark + hex;
}

// Renames unless `to` exists; returns whether it did.
bool RenameToNew(const std::string& from, const std::string& to) {
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_NOREPLACE) == 0) return true;
  if (errno == EEXIST) return false;
  if (errno != EINVAL && errno != ENOSYS && errno != ENOTSUP) throw IoError(errno, to);
  // A file system without RENAME_NOREPLACE, such as NFS. A second name refuses to replace too.
  if (::link(from.c_str(), to.c_str()) != 0) {
    if (errno == EEXIST) return false;
    throw IoError(errno, to);
  }
  RemoveFile(from);
  return true;
}

// The lock of a living writer cannot be taken. Files that cannot be opened or locked stay: they are
// in nobody's way.
void RemoveIfAbandoned(const std::string& temporary) {
  const UniqueFd fd(::open(temporary.c_str(), O_RDWR | O_CLOEXEC));
  if (fd.get() < 0 || ::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) return;
  if (IsSameFile(fd.get(), temporary)) ::unlink(temporary.c_str());
}

}  // namespace

void RemoveLeftovers(const std::string& path) {
  const std::string directory = DirectoryOf(path);
  const size_t slash = path.rfind('/');
  const std::string mark = path.substr(slash == std::string::npos ? 0 : slash + 1) + kTemporaryMark;
  const std::unique_ptr<DIR, int (*)(DIR*)> entries(::opendir(directory.c_str()), ::closedir);
  if (entries == nullptr) throw IoError(errno, directory);
  while (const dirent* entry = ::readdir(entries.get())) {
    const std::string name = entry->d_name;
    if (name.compare(0, mark.size(), mark) == 0) RemoveIfAbandoned(directory + name);
  }
}

NewFile::NewFile(const std::string& path) : path_(path) {
  while (true) {
    temporary_ = UniqueName(path);
    fd_ = UniqueFd(::open(temporary_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
    if (fd_.get() < 0) {
      if (errno == EEXIST) continue;
      throw IoError(errno, temporary_);
    }
    const bool locked = ::flock(fd_.get(), LOCK_EX | LOCK_NB) == 0;
    // Before the lock, another writer may have taken the file for an abandoned one. Where the file
    // system has no locks nobody removes anything.
    if ((locked || errno != EWOULDBLOCK) && IsSameFile(fd_.get(), temporary_)) return;
    RemoveFile(temporary_);
  }
}

NewFile::~NewFile() {
  if (!removed_) ::unlink(temporary_.c_str());
}

void NewFile::WriteAt(const void* bytes, size_t count, int64_t position) {
  WriteAllAt(fd_.get(), bytes, count, position, temporary_);
}

void NewFile::Publish() {
  // Content before name, and name before directory: after a crash the name stands for all the
  // bytes.
  if (::fsync(fd_.get()) != 0) throw IoError(errno, temporary_);
  if (!RenameToNew(temporary_, path_)) RemoveFile(temporary_);
  removed_ = true;
  SyncDirectoryOf(path_);
}

}  // namespace megatron_ettin
