#include "gram_finder.h"

#include <algorithm>
#include <string>
#include <utility>

namespace megatron_ettin {
namespace {

// Letters of a part; longer ones are cut into several parts.
constexpr size_t kLongestPart = UINT16_MAX;

size_t Utf8Length(uint32_t character) {
  return character < 0x80 ? 1 : character < 0x800 ? 2 : character < 0x10000 ? 3 : 4;
}

}  // namespace

// Reads the words of one document and looks up each sequence of n.
template <typename T>
class GramFinder::Reader {
 public:
  Reader(const GramFinder& finder, std::vector<Match>* matches)
      : finder_(finder),
        matches_(*matches),
        window_(finder.grams_.n()),
        firsts_(finder.grams_.n()) {}

  void Read(const T* tokens, int64_t size, int64_t document) {
    tokens_ = tokens;
    document_ = document;
    for (int64_t i = 0; i < size; ++i) {
      const Token& token = finder_.tokens_[tokens[i]];
      if (token.kind == Kind::kPart) {
        utf8_.Reset();
        AddPart(token.hash, token.length, token.breaks, i, i);
      } else {
        AddRare(token, i);
      }
    }
    Clear();
  }

 private:
  // Letters are in tokens [first, last].
  void AddPart(uint64_t hash, uint32_t length, bool breaks, int64_t first, int64_t last) {
    if (breaks) EndWord();
    if (length == 0) return;
    if (word_length_ == 0) word_first_ = first;
    word_length_ += length;
    word_hash_ = word_hash_ * finder_.powers_[length] + hash;
    word_last_ = last;
  }

  void AddRare(const Token& token, int64_t at) {
    if (token.kind == Kind::kBytes) return AddBytes(at);
    utf8_.Reset();
    if (token.kind == Kind::kNoText) return Clear();
    for (uint32_t part = token.first; part < token.first + token.length; ++part) {
      const Part& each = finder_.parts_[part];
      AddPart(each.hash, each.length, each.breaks, at, at);
    }
  }

  void AddBytes(int64_t at) {
    for (const char byte : (*finder_.vocabulary_)[tokens_[at]]) {
      const bool is_whole = utf8_.Take(static_cast<uint8_t>(byte));
      if (utf8_.has_begun()) character_first_ = at;
      if (!is_whole) continue;
      normal_.clear();
      finder_.rules_->Append(utf8_.character(), &normal_);
      for (const Part& part : finder_.SplitParts(normal_)) {
        AddPart(part.hash, part.length, part.breaks, character_first_, at);
      }
    }
  }

  void EndWord() {
    if (word_length_ == 0) return;
    window_.Add(word_hash_);
    firsts_[oldest_] = word_first_;
    if (++oldest_ == finder_.grams_.n()) oldest_ = 0;
    if (window_.is_full() && !finder_.grams_.IsAbsent(window_.value())) LookUp();
    word_hash_ = 0;
    word_length_ = 0;
  }

  void LookUp() {
    const int64_t begin = firsts_[oldest_];
    const int64_t end = word_last_ + 1;
    std::string bytes;
    for (int64_t i = begin; i < end; ++i) bytes += (*finder_.vocabulary_)[tokens_[i]];
    // The first and the last of these tokens may have parts of other words.
    const std::string words = ' ' + finder_.rules_->Normalise(bytes) + ' ';
    const int64_t gram = finder_.grams_.Find(window_.value(), [&](std::string_view gram_words) {
      return words.find(' ' + std::string(gram_words) + ' ') != std::string::npos;
    });
    if (gram >= 0) matches_.push_back({document_, gram, begin, end});
  }

  // Ends the word, and the sequences that go on.
  void Clear() {
    EndWord();
    utf8_.Reset();
    window_.Clear();
    oldest_ = 0;
  }

  const GramFinder& finder_;
  std::vector<Match>& matches_;
  const T* tokens_ = nullptr;
  int64_t document_ = 0;

  GramHash window_;
  std::vector<int64_t> firsts_;  // the first token of each word in the window
  int64_t oldest_ = 0;           // place of the oldest word in firsts_
  uint64_t word_hash_ = 0;
  uint64_t word_length_ = 0;
  int64_t word_first_ = 0;
  int64_t word_last_ = 0;
  Utf8Reader utf8_;
  int64_t character_first_ = 0;  // token in which the present character began
  std::string normal_;
};

GramFinder::GramFinder(std::shared_ptr<const TokenBytes> vocabulary,
                       std::shared_ptr<const WordRules> rules,
                       const std::vector<std::string_view>& passages, int64_t n)
    : vocabulary_(std::move(vocabulary)), rules_(std::move(rules)), grams_(*rules_, passages, n) {
  tokens_.resize(vocabulary_->size());
  for (int64_t id = 0; id < vocabulary_->size(); ++id) {
    if (vocabulary_->IsText(id)) AddToken((*vocabulary_)[id], &tokens_[id]);
  }
  powers_ = WordHash::Powers(kLongestPart);
}

void GramFinder::AddToken(std::string_view bytes, Token* token) {
  std::string normal;
  Utf8Reader reader;
  size_t whole = 0;
  for (const char byte : bytes) {
    if (!reader.Take(static_cast<uint8_t>(byte))) continue;
    whole += Utf8Length(reader.character());
    rules_->Append(reader.character(), &normal);
  }
  const std::vector<Part> parts = SplitParts(normal);
  if (whole < bytes.size() || parts.size() > UINT16_MAX) {
    token->kind = Kind::kBytes;
  } else if (parts.size() > 1) {
    token->kind = Kind::kParts;
    token->first = static_cast<uint32_t>(parts_.size());
    token->length = static_cast<uint16_t>(parts.size());
    parts_.insert(parts_.end(), parts.begin(), parts.end());
  } else {
    token->kind = Kind::kPart;
    if (parts.empty()) return;
    token->hash = parts[0].hash;
    token->length = static_cast<uint16_t>(parts[0].length);
    token->breaks = parts[0].breaks;
  }
}

std::vector<GramFinder::Part> GramFinder::SplitParts(std::string_view normal) const {
  std::vector<Part> parts;
  for (size_t begin = 0; begin < normal.size();) {
    const bool breaks = normal[begin] == WordRules::kBreak;
    begin = std::min(normal.find_first_not_of(WordRules::kBreak, begin), normal.size());
    size_t end = std::min(normal.find(WordRules::kBreak, begin), normal.size());
    end = std::min(end, begin + kLongestPart);
    const std::string_view letters = normal.substr(begin, end - begin);
    parts.push_back({WordHash::OfPart(letters), static_cast<uint32_t>(letters.size()), breaks});
    begin = end;
  }
  return parts;
}

template <typename T>
void GramFinder::ScanBlock(const TokenBlock& block, std::vector<Match>* matches) const {
  const T* tokens = block.tokens<T>();
  const auto outside = static_cast<uint32_t>(vocabulary_->size());
  const int64_t size = block.num_tokens();
  uint32_t largest = 0;
  for (int64_t i = 0; i < size; ++i) largest = std::max<uint32_t>(largest, tokens[i]);
  if (largest >= outside) {
    int64_t i = 0;
    while (tokens[i] < outside) ++i;
    block.RefuseToken(i, vocabulary_->size());
  }
  Reader<T> reader(*this, matches);
  for (int64_t document = 0; document < block.num_documents(); ++document) {
    const int64_t begin = block.begins[document];
    reader.Read(tokens + begin, block.begins[document + 1] - begin,
                block.first_document + document);
  }
}

std::vector<GramFinder::Match> GramFinder::Find(const TokenCorpus& corpus, int64_t first,
                                                int64_t last, int64_t threads) const {
  const auto scan = [&](const TokenBlock& block, std::vector<Match>* matches) {
    if (block.shard->type() == TokenType::kUint16) {
      ScanBlock<uint16_t>(block, matches);
    } else {
      ScanBlock<uint32_t>(block, matches);
    }
  };
  return ScanDocuments<Match>(corpus, first, last, threads, scan);
}

}  // namespace megatron_ettin
