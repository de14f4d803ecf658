// Search for characters in UTF-8 texts.
#ifndef MEGATRON_ETTIN_TEXT_SEARCH_H_
#define MEGATRON_ETTIN_TEXT_SEARCH_H_

#include <cstdint>
#include <string_view>
#include <vector>

namespace megatron_ettin {

constexpr int64_t kCodePoints = 0x110000;

// Returns the indices of the texts that hold a character whose entry in `is_searched`
// [kCodePoints] is true. The texts are valid UTF-8; no ASCII character is searched.
std::vector<int64_t> FindTexts(const std::vector<std::string_view>& texts, const bool* is_searched);

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_TEXT_SEARCH_H_
