// The layout of Megatron-Core's .idx file, shared by the writer and the reader:
//   0  9 bytes  magic "MMIDIDX\0\0"        18  u64  number of sequences, s
//   9  u64      version = 1                26  u64  number of document boundaries, d + 1
//  17  u8       dtype code of the .bin     34  i32 length[s], i64 byte offset[s], i64 boundary[d+1]
#ifndef MEGATRON_ETTIN_TOKEN_FORMAT_H_
#define MEGATRON_ETTIN_TOKEN_FORMAT_H_

#include <cstdint>
#include <string>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the .bin/.idx format is little-endian and is read without conversion"
#endif

namespace megatron_ettin {

// Values are the dtype codes of the .idx file.
enum class TokenType : uint8_t { kInt32 = 4, kUint16 = 8 };

inline int64_t ItemSize(TokenType type) { return type == TokenType::kUint16 ? 2 : 4; }
inline uint64_t MaxToken(TokenType type) {
  return type == TokenType::kUint16 ? UINT16_MAX : INT32_MAX;
}
inline const char* TypeName(TokenType type) {
  return type == TokenType::kUint16 ? "uint16" : "int32";
}

inline constexpr char kIndexMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', '\0', '\0'};
inline constexpr uint64_t kIndexVersion = 1;
inline constexpr int64_t kVersionAt = 9;
inline constexpr int64_t kTypeAt = 17;
inline constexpr int64_t kSequencesAt = 18;
inline constexpr int64_t kBoundariesAt = 26;
inline constexpr int64_t kIndexHeaderBytes = 34;

inline std::string BinPath(const std::string& prefix) { return prefix + ".bin"; }
inline std::string IdxPath(const std::string& prefix) { return prefix + ".idx"; }

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_TOKEN_FORMAT_H_
