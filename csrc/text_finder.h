// Exact search for a text in documents stored as tokens.
//
// How a document was cut into tokens does not matter: the bytes of its tokens are compared, so an
// occurrence may begin and end inside a token. One byte of the text, its anchor, decides what has
// to be compared. In any occurrence the anchor lies in one token, and few tokens of a vocabulary
// fit the text around it. The scan looks each token of the corpus up in a table of those, which is
// all that most tokens cost, and compares the neighbours of the ones it finds.
#ifndef MEGATRON_ETTIN_TEXT_FINDER_H_
#define MEGATRON_ETTIN_TEXT_FINDER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "corpus_scan.h"
#include "token_bytes.h"

namespace megatron_ettin {

class TextFinder {
 public:
  // A document of a corpus, and how often it contains the text; occurrences may overlap.
  struct Hit {
    int64_t document;
    int64_t occurrences;
  };
  // Tokens [begin, end) of a document, the fewest that hold an occurrence.
  struct Occurrence {
    int64_t begin;
    int64_t end;
  };

  // `counts` has a value for each token: how often it occurs, roughly. The anchor is the byte that
  // the rarest tokens fit; the result does not depend on it. Throws std::invalid_argument for an
  // empty text.
  TextFinder(std::shared_ptr<const TokenBytes> vocabulary, std::string text, const int64_t* counts);

  // Returns the documents in [first, last) that contain the text, ascending. Throws
  // std::invalid_argument that names file, document, position and id of a token outside the
  // vocabulary.
  std::vector<Hit> Find(const TokenCorpus& corpus, int64_t first, int64_t last,
                        int64_t threads) const;

  // Returns the occurrences in one document, ascending.
  std::vector<Occurrence> FindIn(const TokenCorpus& corpus, int64_t document) const;

 private:
  // What is compared: one document's tokens.
  template <typename T>
  struct Span {
    const T* tokens;
    int64_t size;
  };

  template <typename Visit>
  void ForEachPlace(const Visit& visit) const;
  void FindCandidates(int64_t anchor);
  bool Fits(int64_t token, int64_t place) const;
  template <typename T, typename Visit>
  void ScanBlock(const TokenBlock& block, const Visit& visit) const;
  template <typename T>
  bool Matches(const Span<T>& document, int64_t at, int64_t place, Occurrence* found) const;
  template <typename T>
  int64_t MatchBefore(const Span<T>& document, int64_t at, int64_t place) const;
  template <typename T>
  int64_t MatchAfter(const Span<T>& document, int64_t at, int64_t place) const;
  template <typename Visit>
  void Scan(const TokenBlock& block, const Visit& visit) const;

  const std::shared_ptr<const TokenBytes> vocabulary_;
  const std::string text_;
  std::vector<int64_t> places_;        // in the text, of the first byte of each candidate
  std::vector<uint32_t> begins_;       // of each token's places, then their end
  std::vector<uint8_t> is_candidate_;  // by token, then for all ids outside the vocabulary
};

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_TEXT_FINDER_H_
