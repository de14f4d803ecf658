#include "page_headers.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>

#include "file_io.h"

namespace megatron_ettin {
namespace {

// Types of fields in the compact protocol.
enum FieldType { kTrue = 1, kFalse = 2, kByte = 3, kI32 = 5, kI64 = 6, kBinary = 8, kStruct = 12 };

// Bytes that a header is expected to fit into; a longer one is read again.
constexpr int64_t kExpectedBytes = 512;
// More structs within structs than a header has.
constexpr int kMostDepth = 8;

// The bytes at hand end within the header.
struct EndsTooEarly {};
// The bytes are no header of a data page.
struct NoHeader {};

class Reader {
 public:
  Reader(const uint8_t* data, int64_t size) : data_(data), size_(size) {}

  int64_t at() const { return at_; }

  uint8_t Byte() {
    if (at_ >= size_) throw EndsTooEarly();
    return data_[at_++];
  }

  uint64_t Varint() {
    uint64_t number = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const uint8_t byte = Byte();
      number |= static_cast<uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return number;
    }
    throw NoHeader();
  }

  int64_t Integer() {
    const uint64_t number = Varint();
    return static_cast<int64_t>(number >> 1) ^ -static_cast<int64_t>(number & 1);
  }

  // Steps to the next field; returns false at the end of the struct.
  bool NextField(int64_t* number, int* type) {
    const uint8_t head = Byte();
    if (head == 0) return false;
    *number = head > 0x0F ? *number + (head >> 4) : Integer();
    *type = head & 0x0F;
    return true;
  }

  void Skip(int type, int depth = 0) {
    if (depth > kMostDepth) throw NoHeader();
    switch (type) {
      case kTrue:
      case kFalse:
        return;
      case kByte:
        Byte();
        return;
      case kI32:
      case kI64:
        Varint();
        return;
      case kBinary: {
        const uint64_t length = Varint();
        if (length > static_cast<uint64_t>(size_ - at_)) throw EndsTooEarly();
        at_ += static_cast<int64_t>(length);
        return;
      }
      case kStruct: {
        int64_t number = 0;
        int of_field = 0;
        while (NextField(&number, &of_field)) Skip(of_field, depth + 1);
        return;
      }
      default:
        throw NoHeader();
    }
  }

 private:
  const uint8_t* data_;
  int64_t size_;
  int64_t at_ = 0;
};

// Returns the first field of the struct that describes a data page: its values.
int64_t ReadNumValues(Reader* reader) {
  int64_t number = 0;
  int64_t values = -1;
  int type = 0;
  while (reader->NextField(&number, &type)) {
    if (number == 1 && type == kI32) {
      values = reader->Integer();
    } else {
      reader->Skip(type);
    }
  }
  return values;
}

PageHeader ParseHeader(const uint8_t* data, int64_t size, int64_t offset) {
  Reader reader(data, size);
  PageHeader header{offset, 0, -1, -1, -1};
  int64_t kind = -1;
  int64_t number = 0;
  int type = 0;
  while (reader.NextField(&number, &type)) {
    // A header names the kind of its page, and describes a data page of version 1 or 2 in field 5
    // or 8.
    if (type == kI32 && number == 1) {
      kind = reader.Integer();
    } else if (type == kI32 && number == 2) {
      header.uncompressed_bytes = reader.Integer();
    } else if (type == kI32 && number == 3) {
      header.compressed_bytes = reader.Integer();
    } else if (type == kStruct && ((kind == 0 && number == 5) || (kind == 3 && number == 8))) {
      header.num_rows = ReadNumValues(&reader);
    } else {
      reader.Skip(type);
    }
  }
  header.header_bytes = reader.at();
  if (std::min({header.uncompressed_bytes, header.compressed_bytes, header.num_rows}) < 0) {
    throw NoHeader();
  }
  return header;
}

// Reads up to buffer->size() bytes at an offset; returns how many the file had.
int64_t ReadAt(const UniqueFd& fd, int64_t offset, const std::string& path,
               std::vector<uint8_t>* buffer) {
  int64_t have = 0;
  const auto wanted = static_cast<int64_t>(buffer->size());
  while (have < wanted) {
    const ssize_t count =
        ::pread(fd.get(), buffer->data() + have, static_cast<size_t>(wanted - have), offset + have);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw IoError(errno, path);
    if (count == 0) break;
    have += count;
  }
  return have;
}

PageHeader ReadHeader(const UniqueFd& fd, int64_t offset, int64_t end, const std::string& path) {
  for (int64_t size = kExpectedBytes;; size *= 8) {
    std::vector<uint8_t> buffer(static_cast<size_t>(std::min(size, end - offset)));
    const int64_t have = ReadAt(fd, offset, path, &buffer);
    try {
      return ParseHeader(buffer.data(), have, offset);
    } catch (const EndsTooEarly&) {
      if (size < end - offset && have == static_cast<int64_t>(buffer.size())) continue;
      throw std::invalid_argument("byte " + std::to_string(offset) + ": a header without end");
    } catch (const NoHeader&) {
      throw std::invalid_argument("byte " + std::to_string(offset) + ": no header of a data page");
    }
  }
}

}  // namespace

std::vector<PageHeader> ReadPageHeaders(const std::string& path, int64_t begin, int64_t end) {
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (fd.get() < 0) throw IoError(errno, path);
  std::vector<PageHeader> headers;
  while (begin < end) {
    const PageHeader header = ReadHeader(fd, begin, end, path);
    if (header.compressed_bytes > end - begin - header.header_bytes) {
      throw std::invalid_argument("byte " + std::to_string(begin) +
                                  ": a page that ends after its column");
    }
    headers.push_back(header);
    begin += header.header_bytes + header.compressed_bytes;
  }
  return headers;
}

}  // namespace megatron_ettin
