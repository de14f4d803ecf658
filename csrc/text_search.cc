#include "text_search.h"

#include <cstring>

namespace megatron_ettin {
namespace {

constexpr uint64_t kHighBits = 0x8080808080808080;

// Returns the first byte at or after `at` that is not ASCII.
const uint8_t* SkipAscii(const uint8_t* at, const uint8_t* end) {
  for (uint64_t word; end - at >= 8; at += 8) {
    std::memcpy(&word, at, sizeof(word));
    if ((word & kHighBits) != 0) break;
  }
  while (at < end && *at < 0x80) ++at;
  return at;
}

bool HasSearched(std::string_view text, const bool* is_searched) {
  const auto* at = reinterpret_cast<const uint8_t*>(text.data());
  const uint8_t* end = at + text.size();
  while ((at = SkipAscii(at, end)) < end) {
    // The first byte says how many follow; each of those has six bits.
    const int more = *at < 0xE0 ? 1 : *at < 0xF0 ? 2 : 3;
    uint32_t code = *at & (0x3FU >> more);
    for (int i = 1; i <= more; ++i) code = code << 6 | (at[i] & 0x3FU);
    if (is_searched[code]) return true;
    at += more + 1;
  }
  return false;
}

}  // namespace

std::vector<int64_t> FindTexts(const std::vector<std::string_view>& texts,
                               const bool* is_searched) {
  std::vector<int64_t> found;
  for (size_t i = 0; i < texts.size(); ++i) {
    if (HasSearched(texts[i], is_searched)) found.push_back(static_cast<int64_t>(i));
  }
  return found;
}

}  // namespace megatron_ettin
