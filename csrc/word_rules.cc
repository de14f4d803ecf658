#include "word_rules.h"

#include <stdexcept>
#include <utility>

namespace megatron_ettin {
namespace {

void AppendUtf8(uint32_t code, std::string* to) {
  if (code < 0x80) {
    *to += static_cast<char>(code);
    return;
  }
  const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  constexpr uint8_t kFirst[] = {0, 0xC0, 0xE0, 0xF0};
  *to += static_cast<char>(kFirst[more] | code >> (6 * more));
  for (int i = more - 1; i >= 0; --i) *to += static_cast<char>(0x80 | ((code >> (6 * i)) & 0x3F));
}

}  // namespace

bool Utf8Reader::Take(uint8_t byte) {
  has_begun_ = missing_ == 0 || byte < lowest_ || byte > highest_;
  if (has_begun_) return Begin(byte);
  lowest_ = 0x80;
  highest_ = 0xBF;
  character_ = character_ << 6 | (byte & 0x3FU);
  return --missing_ == 0;
}

bool Utf8Reader::Begin(uint8_t byte) {
  character_ = byte;
  missing_ = 0;
  if (byte < 0x80) return true;
  if (byte < 0xC2 || byte > 0xF4) return false;
  missing_ = byte < 0xE0 ? 1 : byte < 0xF0 ? 2 : 3;
  character_ = byte & (0x3FU >> missing_);
  // The shortest form only, no surrogates, nothing past the last character.
  lowest_ = byte == 0xE0 ? 0xA0 : byte == 0xF0 ? 0x90 : 0x80;
  highest_ = byte == 0xED ? 0x9F : byte == 0xF4 ? 0x8F : 0xBF;
  return false;
}

WordRules::WordRules(const uint8_t* rules, std::map<uint32_t, std::string> replaced)
    : rules_(rules, rules + kCharacters), replaced_(std::move(replaced)) {
  for (int64_t code = 0; code < kCharacters; ++code) {
    if (rules_[code] > static_cast<uint8_t>(CharacterRule::kWord)) {
      throw std::invalid_argument("rules[" + std::to_string(code) + "] is " +
                                  std::to_string(rules_[code]) + "; there are rules 0 to 3");
    }
  }
  for (const auto& entry : replaced_) {
    if (entry.second.find(kBreak) != std::string::npos) {
      throw std::invalid_argument("replaced[" + std::to_string(entry.first) + "] has a space");
    }
  }
}

void WordRules::Append(uint32_t character, std::string* normal) const {
  const auto rule = static_cast<CharacterRule>(rules_[character]);
  if (rule == CharacterRule::kDropped) return;
  if (rule != CharacterRule::kLetter) *normal += kBreak;
  if (rule == CharacterRule::kBreak) return;
  const auto found = replaced_.find(character);
  if (found != replaced_.end()) {
    *normal += found->second;
  } else {
    AppendUtf8(character, normal);
  }
  if (rule == CharacterRule::kWord) *normal += kBreak;
}

std::string WordRules::Normalise(std::string_view text) const {
  std::string normal;
  Utf8Reader reader;
  for (const char byte : text) {
    if (reader.Take(static_cast<uint8_t>(byte))) Append(reader.character(), &normal);
  }
  std::string words;
  for (const char byte : normal) {
    if (byte != kBreak || (!words.empty() && words.back() != kBreak)) words += byte;
  }
  if (!words.empty() && words.back() == kBreak) words.pop_back();
  return words;
}

}  // namespace megatron_ettin
