#include "text_finder.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace megatron_ettin {
namespace {

// Tokens whose look-ups are combined before the first branch.
constexpr int64_t kStride = 32;
// Bytes of a long text that may be the anchor.
constexpr int64_t kAnchorBytes = 512;

}  // namespace

TextFinder::TextFinder(std::shared_ptr<const TokenBytes> vocabulary, std::string text,
                       const int64_t* counts)
    : vocabulary_(std::move(vocabulary)), text_(std::move(text)) {
  if (text_.empty()) throw std::invalid_argument("the text is empty");
  const auto size = std::min<int64_t>(text_.size(), kAnchorBytes);
  // Tokens of the corpus that fit each byte, roughly. A token that fits in two places at one byte
  // counts twice: it is compared twice.
  std::vector<double> cost(size, 0.0);
  ForEachPlace([&](int64_t token, int64_t place) {
    const auto end = place + static_cast<int64_t>((*vocabulary_)[token].size());
    for (int64_t byte = std::max<int64_t>(place, 0); byte < std::min(end, size); ++byte) {
      cost[byte] += 1.0 + static_cast<double>(counts[token]);
    }
  });
  FindCandidates(std::min_element(cost.begin(), cost.end()) - cost.begin());
}

// Calls visit(token, place) for each token and each place in the text where it could stand: a token
// fits if its bytes are those of the text as far as both go.
template <typename Visit>
void TextFinder::ForEachPlace(const Visit& visit) const {
  const auto size = std::min<int64_t>(text_.size(), kAnchorBytes);
  for (int64_t token = 0; token < vocabulary_->size(); ++token) {
    if (!vocabulary_->IsText(token)) continue;
    const auto length = static_cast<int64_t>((*vocabulary_)[token].size());
    for (int64_t place = 1 - length; place < size; ++place) {
      if (Fits(token, place)) visit(token, place);
    }
  }
}

bool TextFinder::Fits(int64_t token, int64_t place) const {
  const std::string_view bytes = (*vocabulary_)[token];
  const size_t skipped = place < 0 ? -place : 0;
  const size_t begin = place < 0 ? 0 : place;
  const size_t count = std::min(bytes.size() - skipped, text_.size() - begin);
  return bytes.compare(skipped, count, text_, begin, count) == 0;
}

void TextFinder::FindCandidates(int64_t anchor) {
  is_candidate_.assign(vocabulary_->size() + 1, 0);
  is_candidate_[vocabulary_->size()] = 1;
  ForEachPlace([&](int64_t token, int64_t place) {
    const auto end = place + static_cast<int64_t>((*vocabulary_)[token].size());
    if (place > anchor || anchor >= end) return;
    // Tokens are visited in ascending order.
    begins_.resize(token + 1, static_cast<uint32_t>(places_.size()));
    places_.push_back(place);
    is_candidate_[token] = 1;
  });
  begins_.resize(vocabulary_->size() + 1, static_cast<uint32_t>(places_.size()));
}

// Returns the first token of an occurrence, or -1. The text before `place` must be the end of what
// stands before token `at`.
template <typename T>
int64_t TextFinder::MatchBefore(const Span<T>& document, int64_t at, int64_t place) const {
  for (; place > 0; --at) {
    if (at == 0 || document.tokens[at - 1] >= static_cast<size_t>(vocabulary_->size())) return -1;
    const T token = document.tokens[at - 1];
    if (!vocabulary_->IsText(token)) return -1;
    const std::string_view bytes = (*vocabulary_)[token];
    const size_t count = std::min<size_t>(bytes.size(), place);
    place -= static_cast<int64_t>(count);
    if (bytes.compare(bytes.size() - count, count, text_, place, count) != 0) return -1;
  }
  return at;
}

// Returns the token after an occurrence, or -1. The text from `place` on must be the beginning of
// token `at` and those after it.
template <typename T>
int64_t TextFinder::MatchAfter(const Span<T>& document, int64_t at, int64_t place) const {
  for (; place < static_cast<int64_t>(text_.size()); ++at) {
    if (at == document.size || document.tokens[at] >= static_cast<size_t>(vocabulary_->size())) {
      return -1;
    }
    const T token = document.tokens[at];
    if (!vocabulary_->IsText(token)) return -1;
    const std::string_view bytes = (*vocabulary_)[token];
    const size_t count = std::min<size_t>(bytes.size(), text_.size() - place);
    if (bytes.compare(0, count, text_, place, count) != 0) return -1;
    place += static_cast<int64_t>(count);
  }
  return at;
}

template <typename T>
bool TextFinder::Matches(const Span<T>& document, int64_t at, int64_t place,
                         Occurrence* found) const {
  const auto bytes = static_cast<int64_t>((*vocabulary_)[document.tokens[at]].size());
  found->end = MatchAfter(document, at + 1, place + bytes);
  if (found->end < 0) return false;
  found->begin = MatchBefore(document, at, place);
  return found->begin >= 0;
}

// Calls visit(document of the block, occurrence) for each occurrence.
template <typename T, typename Visit>
void TextFinder::ScanBlock(const TokenBlock& block, const Visit& visit) const {
  // Ids as unsigned numbers, so that those outside the vocabulary share the table's last entry.
  const T* tokens = block.tokens<T>();
  const auto outside = static_cast<uint32_t>(vocabulary_->size());
  const uint8_t* is_candidate = is_candidate_.data();
  const auto looked_up = [&](int64_t i) {
    return is_candidate[std::min<uint32_t>(tokens[i], outside)];
  };
  int64_t document = 0;
  const auto compare = [&](int64_t i) {
    if (tokens[i] >= outside) block.RefuseToken(i, vocabulary_->size());
    while (block.begins[document + 1] <= i) ++document;
    const int64_t begin = block.begins[document];
    const Span<T> span{tokens + begin, block.begins[document + 1] - begin};
    for (uint32_t n = begins_[tokens[i]]; n < begins_[tokens[i] + 1]; ++n) {
      Occurrence found;
      if (Matches(span, i - begin, places_[n], &found)) visit(document, found);
    }
  };
  const int64_t size = block.num_tokens();
  int64_t i = 0;
  for (; i + kStride <= size; i += kStride) {
    uint8_t any = 0;
    for (int64_t k = 0; k < kStride; ++k) any |= looked_up(i + k);
    if (any == 0) continue;
    // A branch for each token would be mispredicted at each candidate.
    uint32_t candidates = 0;
    for (int64_t k = 0; k < kStride; ++k) candidates |= uint32_t{looked_up(i + k)} << k;
    for (; candidates != 0; candidates &= candidates - 1) compare(i + __builtin_ctz(candidates));
  }
  for (; i < size; ++i) {
    if (looked_up(i)) compare(i);
  }
}

template <typename Visit>
void TextFinder::Scan(const TokenBlock& block, const Visit& visit) const {
  if (block.shard->type() == TokenType::kUint16) {
    ScanBlock<uint16_t>(block, visit);
  } else {
    ScanBlock<uint32_t>(block, visit);
  }
}

std::vector<TextFinder::Hit> TextFinder::Find(const TokenCorpus& corpus, int64_t first,
                                              int64_t last, int64_t threads) const {
  const auto scan = [&](const TokenBlock& block, std::vector<Hit>* hits) {
    Scan(block, [&](int64_t document, const Occurrence&) {
      document += block.first_document;
      if (hits->empty() || hits->back().document != document) hits->push_back({document, 0});
      ++hits->back().occurrences;
    });
  };
  return ScanDocuments<Hit>(corpus, first, last, threads, scan);
}

std::vector<TextFinder::Occurrence> TextFinder::FindIn(const TokenCorpus& corpus,
                                                       int64_t document) const {
  const auto scan = [&](const TokenBlock& block, std::vector<Occurrence>* found) {
    Scan(block, [&](int64_t, const Occurrence& occurrence) { found->push_back(occurrence); });
  };
  std::vector<Occurrence> all = ScanDocuments<Occurrence>(corpus, document, document + 1, 1, scan);
  // Two occurrences in one token are found in the order of their places in the text.
  std::sort(all.begin(), all.end(), [](const Occurrence& a, const Occurrence& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  return all;
}

}  // namespace megatron_ettin
