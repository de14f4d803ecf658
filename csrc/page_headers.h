// Headers of the pages of a Parquet file, which are structs in Thrift's compact protocol
// (parquet.thrift, PageHeader).
#ifndef MEGATRON_ETTIN_PAGE_HEADERS_H_
#define MEGATRON_ETTIN_PAGE_HEADERS_H_

#include <cstdint>
#include <string>
#include <vector>

namespace megatron_ettin {

struct PageHeader {
  int64_t offset;              // first byte of the header in the file
  int64_t header_bytes;        //
  int64_t compressed_bytes;    // of the page after it, as the file has them
  int64_t uncompressed_bytes;  //
  int64_t num_rows;            // of a column without lists: its values
};

// Returns the headers of the data pages of a column chunk, which has the bytes [begin, end) of a
// file. Throws std::invalid_argument that names the byte of one that is damaged, and IoError.
std::vector<PageHeader> ReadPageHeaders(const std::string& path, int64_t begin, int64_t end);

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_PAGE_HEADERS_H_
