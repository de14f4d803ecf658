// Exact search for sequences of n words in documents stored as tokens, for any number of sequences
// in one pass.
//
// A token's share in the words is worked out once for each token of the vocabulary: the breaks and
// letters that it brings, with their hashes. Reading a token is then a look-up and a product, and a
// word that ends costs one read of a filter. What the filter lets through is compared as text.
#ifndef MEGATRON_ETTIN_GRAM_FINDER_H_
#define MEGATRON_ETTIN_GRAM_FINDER_H_

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "corpus_scan.h"
#include "token_bytes.h"
#include "word_grams.h"
#include "word_rules.h"

namespace megatron_ettin {

class GramFinder {
 public:
  // Sequence number `gram` of the passages in a document; its words lie in tokens [begin, end).
  struct Match {
    int64_t document;
    int64_t gram;
    int64_t begin;
    int64_t end;
  };

  // Throws std::invalid_argument as WordGrams does.
  GramFinder(std::shared_ptr<const TokenBytes> vocabulary, std::shared_ptr<const WordRules> rules,
             const std::vector<std::string_view>& passages, int64_t n);

  const WordGrams& grams() const { return grams_; }

  // Returns all occurrences in documents [first, last), by document, then in the order of their
  // last words. A token that is no text ends a word, and no sequence goes over it. Throws
  // std::invalid_argument that names file, document, position and id of a token outside the
  // vocabulary.
  std::vector<Match> Find(const TokenCorpus& corpus, int64_t first, int64_t last,
                          int64_t threads) const;

 private:
  // A break, if there is one, then letters, if there are any.
  struct Part {
    uint64_t hash;
    uint32_t length;
    bool breaks;
  };
  enum class Kind : uint8_t {
    kPart,   // one part
    kParts,  // several
    kBytes,  // begins or ends inside a character
    kNoText,
  };
  struct Token {
    uint64_t hash = 0;   // of the part
    uint32_t first = 0;  // of the parts in parts_
    uint16_t length = 0;
    Kind kind = Kind::kNoText;
    bool breaks = false;
  };
  template <typename T>
  class Reader;

  void AddToken(std::string_view bytes, Token* token);
  std::vector<Part> SplitParts(std::string_view normal) const;
  template <typename T>
  void ScanBlock(const TokenBlock& block, std::vector<Match>* matches) const;
  template <typename T>
  void LookUp(const TokenBlock& block, int64_t document, const Reader<T>& reader,
              std::vector<Match>* matches) const;
  template <typename T>
  int64_t FindGram(const T* tokens, int64_t begin, int64_t end, uint64_t hash) const;

  const std::shared_ptr<const TokenBytes> vocabulary_;
  const std::shared_ptr<const WordRules> rules_;
  const WordGrams grams_;
  std::vector<Token> tokens_;
  std::vector<Part> parts_;  // of tokens that have several
  std::vector<uint64_t> powers_;
};

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_GRAM_FINDER_H_
