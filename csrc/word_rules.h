// How a text becomes words: a rule for each character, applied one by one.
#ifndef MEGATRON_ETTIN_WORD_RULES_H_
#define MEGATRON_ETTIN_WORD_RULES_H_

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace megatron_ettin {

// What a character does to the words.
enum class CharacterRule : uint8_t {
  kLetter = 0,   // belongs to a word
  kBreak = 1,    // ends a word
  kDropped = 2,  // is left out, as if it were not there
  kWord = 3,     // is a word of its own
};

// Reads UTF-8 byte by byte. Bytes that are no character are passed over, as Python's decoder does
// with errors="ignore".
class Utf8Reader {
 public:
  // Returns true if the byte completes a character.
  bool Take(uint8_t byte);
  uint32_t character() const { return character_; }
  // True if no character was under way before the last byte, or it broke off there.
  bool has_begun() const { return has_begun_; }
  void Reset() { missing_ = 0; }

 private:
  bool Begin(uint8_t byte);

  uint32_t character_ = 0;
  int missing_ = 0;
  bool has_begun_ = false;
  uint8_t lowest_ = 0x80;  // of the next byte
  uint8_t highest_ = 0xBF;
};

class WordRules {
 public:
  static constexpr int64_t kCharacters = 0x110000;
  static constexpr char kBreak = ' ';

  // `rules` [kCharacters] has the rule of each character. `replaced` has what stands in a word for
  // a character that does not stand for itself, in UTF-8. Throws std::invalid_argument for a rule
  // that there is not.
  WordRules(const uint8_t* rules, std::map<uint32_t, std::string> replaced);

  // Appends what a character makes of the words: letters, and kBreak between words.
  void Append(uint32_t character, std::string* normal) const;

  // Returns the words of a text with one kBreak between two of them.
  std::string Normalise(std::string_view text) const;

 private:
  const std::vector<uint8_t> rules_;
  const std::map<uint32_t, std::string> replaced_;
};

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_WORD_RULES_H_
