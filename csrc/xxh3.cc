#include "xxh3.h"

#include <array>
#include <cstring>

namespace megatron_ettin {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are read as they lie in memory");

constexpr uint64_t kPrime32_1 = 0x9E3779B1;
constexpr uint64_t kPrime32_2 = 0x85EBCA77;
constexpr uint64_t kPrime32_3 = 0xC2B2AE3D;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87;
constexpr uint64_t kPrime64_2 = 0xC2B2AE3D27D4EB4F;
constexpr uint64_t kPrime64_3 = 0x165667B19E3779F9;
constexpr uint64_t kPrime64_4 = 0x85EBCA77C2B2AE63;
constexpr uint64_t kPrime64_5 = 0x27D4EB2F165667C5;
constexpr uint64_t kPrimeMx1 = 0x165667919E3779F9;
constexpr uint64_t kPrimeMx2 = 0x9FB21C651E98DF25;

constexpr size_t kSecretSize = 192;
constexpr uint8_t kSecret[kSecretSize] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

constexpr size_t kLargeSize = 241;  // from this size on, eight accumulators take the data
constexpr size_t kLanes = 8;
constexpr size_t kStripeSize = 64;
constexpr size_t kStripesPerBlock = (kSecretSize - kStripeSize) / 8;
constexpr size_t kBlockSize = kStripeSize * kStripesPerBlock;

template <typename T>
T Load(const uint8_t* from) {
  T word;
  std::memcpy(&word, from, sizeof(T));
  return word;
}

// The exclusive or of two neighbouring words of the secret, the first at `offset`.
template <typename T>
uint64_t SecretPair(size_t offset) {
  return Load<T>(kSecret + offset) ^ Load<T>(kSecret + offset + sizeof(T));
}

Hash128 Multiply(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return {static_cast<uint64_t>(product), static_cast<uint64_t>(product >> 64)};
}

uint64_t MultiplyFold(uint64_t a, uint64_t b) {
  const Hash128 product = Multiply(a, b);
  return product.low ^ product.high;
}

uint64_t RotateLeft(uint64_t x, int count) { return x << count | x >> (64 - count); }

uint64_t Avalanche(uint64_t x) {
  x = (x ^ x >> 37) * kPrimeMx1;
  return x ^ x >> 32;
}

// The final mix of XXH64, which XXH3 uses for the shortest inputs.
uint64_t AvalancheXxh64(uint64_t x) {
  x = (x ^ x >> 33) * kPrime64_2;
  x = (x ^ x >> 29) * kPrime64_3;
  return x ^ x >> 32;
}

// 1 to 3 bytes: all of them and the size in one word.
uint32_t CombineBytes(const uint8_t* data, size_t size) {
  return data[size - 1] | static_cast<uint32_t>(size) << 8 | static_cast<uint32_t>(data[0]) << 16 |
         static_cast<uint32_t>(data[size / 2]) << 24;
}

uint64_t HashSmall64(const uint8_t* data, size_t size) {
  if (size == 0) return AvalancheXxh64(SecretPair<uint64_t>(56));
  if (size <= 3) return AvalancheXxh64(SecretPair<uint32_t>(0) ^ CombineBytes(data, size));
  if (size <= 8) {
    const uint64_t first = Load<uint32_t>(data);
    const uint64_t last = Load<uint32_t>(data + size - 4);
    uint64_t x = SecretPair<uint64_t>(8) ^ (last | first << 32);
    x = (x ^ RotateLeft(x, 49) ^ RotateLeft(x, 24)) * kPrimeMx2;
    x = (x ^ ((x >> 35) + size)) * kPrimeMx2;
    return x ^ x >> 28;
  }
  const uint64_t low = SecretPair<uint64_t>(24) ^ Load<uint64_t>(data);
  const uint64_t high = SecretPair<uint64_t>(40) ^ Load<uint64_t>(data + size - 8);
  return Avalanche(size + __builtin_bswap64(low) + high + MultiplyFold(low, high));
}

Hash128 HashFourToEight128(const uint8_t* data, size_t size) {
  const uint64_t first = Load<uint32_t>(data);
  const uint64_t last = Load<uint32_t>(data + size - 4);
  Hash128 x = Multiply(SecretPair<uint64_t>(16) ^ (first | last << 32), kPrime64_1 + (size << 2));
  x.high += x.low << 1;
  x.low ^= x.high >> 3;
  x.low = (x.low ^ x.low >> 35) * kPrimeMx2;
  x.low ^= x.low >> 28;
  return {x.low, Avalanche(x.high)};
}

Hash128 HashNineToSixteen128(const uint8_t* data, size_t size) {
  const uint64_t first = Load<uint64_t>(data);
  const uint64_t last = Load<uint64_t>(data + size - 8);
  const uint64_t high_word = SecretPair<uint64_t>(48) ^ last;
  Hash128 x = Multiply(SecretPair<uint64_t>(32) ^ first ^ last, kPrime64_1);
  x.low += static_cast<uint64_t>(size - 1) << 54;
  x.high += high_word + static_cast<uint32_t>(high_word) * (kPrime32_2 - 1);
  x.low ^= __builtin_bswap64(x.high);
  const Hash128 product = Multiply(x.low, kPrime64_2);
  return {Avalanche(product.low), Avalanche(product.high + x.high * kPrime64_2)};
}

Hash128 HashSmall128(const uint8_t* data, size_t size) {
  if (size == 0) {
    return {AvalancheXxh64(SecretPair<uint64_t>(64)), AvalancheXxh64(SecretPair<uint64_t>(80))};
  }
  if (size <= 3) {
    const uint32_t bytes = CombineBytes(data, size);
    const uint32_t swapped = __builtin_bswap32(bytes);
    const uint32_t rotated = swapped << 13 | swapped >> 19;
    return {AvalancheXxh64(SecretPair<uint32_t>(0) ^ bytes),
            AvalancheXxh64(SecretPair<uint32_t>(8) ^ rotated)};
  }
  return size <= 8 ? HashFourToEight128(data, size) : HashNineToSixteen128(data, size);
}

// 16 bytes of data with 16 bytes of the secret.
uint64_t Mix(const uint8_t* data, size_t secret_offset) {
  const uint8_t* secret = kSecret + secret_offset;
  return MultiplyFold(Load<uint64_t>(data) ^ Load<uint64_t>(secret),
                      Load<uint64_t>(data + 8) ^ Load<uint64_t>(secret + 8));
}

uint64_t HashMedium64(const uint8_t* data, size_t size) {
  uint64_t sum = size * kPrime64_1;
  if (size <= 128) {
    for (size_t i = 0; i <= (size - 1) / 32; ++i) {
      sum += Mix(data + 16 * i, 32 * i) + Mix(data + size - 16 * i - 16, 32 * i + 16);
    }
    return Avalanche(sum);
  }
  for (size_t i = 0; i < 8; ++i) sum += Mix(data + 16 * i, 16 * i);
  sum = Avalanche(sum);
  for (size_t i = 8; i < size / 16; ++i) sum += Mix(data + 16 * i, 16 * (i - 8) + 3);
  return Avalanche(sum + Mix(data + size - 16, 119));
}

// Two times 16 bytes with 32 bytes of the secret.
void MixPair(const uint8_t* one, const uint8_t* two, size_t secret_offset, Hash128* sum) {
  sum->low = (sum->low + Mix(one, secret_offset)) ^ (Load<uint64_t>(two) + Load<uint64_t>(two + 8));
  sum->high =
      (sum->high + Mix(two, secret_offset + 16)) ^ (Load<uint64_t>(one) + Load<uint64_t>(one + 8));
}

Hash128 HashMedium128(const uint8_t* data, size_t size) {
  Hash128 sum{size * kPrime64_1, 0};
  if (size <= 128) {
    // From the middle outwards: unlike a plain sum, this one depends on the order.
    for (size_t i = (size - 1) / 32 + 1; i-- > 0;) {
      MixPair(data + 16 * i, data + size - 16 * i - 16, 32 * i, &sum);
    }
  } else {
    for (size_t i = 0; i < 4; ++i) MixPair(data + 32 * i, data + 32 * i + 16, 32 * i, &sum);
    sum = {Avalanche(sum.low), Avalanche(sum.high)};
    for (size_t i = 4; i < size / 32; ++i) {
      MixPair(data + 32 * i, data + 32 * i + 16, 32 * (i - 4) + 3, &sum);
    }
    MixPair(data + size - 16, data + size - 32, 103, &sum);
  }
  const uint64_t high = sum.low * kPrime64_1 + sum.high * kPrime64_4 + size * kPrime64_2;
  return {Avalanche(sum.low + sum.high), -Avalanche(high)};
}

using Accumulators = std::array<uint64_t, kLanes>;

// Loops of a fixed length over independent lanes, which compilers turn into vector instructions.
void AddStripe(const uint8_t* stripe, const uint8_t* secret, Accumulators& sums) {
  for (size_t i = 0; i < kLanes; ++i) {
    const auto data = Load<uint64_t>(stripe + 8 * i);
    const uint64_t keyed = data ^ Load<uint64_t>(secret + 8 * i);
    sums[i ^ 1] += data;
    sums[i] += (keyed & 0xFFFFFFFF) * (keyed >> 32);
  }
}

void Scramble(Accumulators& sums) {
  for (size_t i = 0; i < kLanes; ++i) {
    const uint64_t key = Load<uint64_t>(kSecret + kSecretSize - kStripeSize + 8 * i);
    sums[i] = (sums[i] ^ sums[i] >> 47 ^ key) * kPrime32_1;
  }
}

Accumulators AccumulateLarge(const uint8_t* data, size_t size) {
  Accumulators sums = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                       kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
  const uint8_t* const end = data + size;
  // The last block is left over even when it is full, and so is its last stripe.
  for (; static_cast<size_t>(end - data) > kBlockSize; data += kBlockSize) {
    for (size_t n = 0; n < kStripesPerBlock; ++n) {
      AddStripe(data + n * kStripeSize, kSecret + 8 * n, sums);
    }
    Scramble(sums);
  }
  const size_t stripes = static_cast<size_t>(end - data - 1) / kStripeSize;
  for (size_t n = 0; n < stripes; ++n) AddStripe(data + n * kStripeSize, kSecret + 8 * n, sums);
  AddStripe(end - kStripeSize, kSecret + kSecretSize - kStripeSize - 7, sums);
  return sums;
}

uint64_t Merge(const Accumulators& sums, uint64_t start, size_t secret_offset) {
  const uint8_t* secret = kSecret + secret_offset;
  for (size_t i = 0; i < kLanes; i += 2) {
    start += MultiplyFold(sums[i] ^ Load<uint64_t>(secret + 8 * i),
                          sums[i + 1] ^ Load<uint64_t>(secret + 8 * i + 8));
  }
  return Avalanche(start);
}

}  // namespace

uint64_t Xxh3_64(const void* data, size_t size) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  if (size <= 16) return HashSmall64(bytes, size);
  if (size < kLargeSize) return HashMedium64(bytes, size);
  return Merge(AccumulateLarge(bytes, size), size * kPrime64_1, 11);
}

Hash128 Xxh3_128(const void* data, size_t size) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  if (size <= 16) return HashSmall128(bytes, size);
  if (size < kLargeSize) return HashMedium128(bytes, size);
  const Accumulators sums = AccumulateLarge(bytes, size);
  return {Merge(sums, size * kPrime64_1, 11),
          Merge(sums, ~(size * kPrime64_2), kSecretSize - kStripeSize - 11)};
}

}  // namespace megatron_ettin
