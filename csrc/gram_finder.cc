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

// Reads the words of documents, one after the other.
template <typename T>
class GramFinder::Reader {
 public:
  explicit Reader(const GramFinder& finder) : finder_(finder) {}

  // Reads tokens up to the next one that is no text, or the end. Returns the token after them.
  int64_t Read(const T* tokens, int64_t begin, int64_t end) {
    hashes_.clear();
    ranges_.clear();
    utf8_.Reset();
    tokens_ = tokens;
    for (; begin < end; ++begin) {
      const Token& token = finder_.tokens_[tokens[begin]];
      if (token.kind == Kind::kPart) {
        utf8_.Reset();
        AddPart({token.hash, token.length, token.breaks}, begin, begin);
      } else if (token.kind == Kind::kParts) {
        utf8_.Reset();
        const Part* parts = finder_.parts_.data() + token.first;
        for (int64_t i = 0; i < token.length; ++i) AddPart(parts[i], begin, begin);
      } else if (token.kind == Kind::kBytes) {
        AddBytes(begin);
      } else {
        break;
      }
    }
    EndWord();
    return begin;
  }

  // Words of the last Read(): their hashes, and their tokens [begin, end).
  const std::vector<uint64_t>& hashes() const { return hashes_; }
  int64_t begin(int64_t word) const { return ranges_[word].first; }
  int64_t end(int64_t word) const { return ranges_[word].second; }

 private:
  // The letters are in tokens [first, last].
  void AddPart(const Part& part, int64_t first, int64_t last) {
    if (part.breaks) EndWord();
    if (part.length == 0) return;
    if (length_ == 0) first_ = first;
    length_ += part.length;
    hash_ = hash_ * finder_.powers_[part.length] + part.hash;
    last_ = last;
  }

  void AddBytes(int64_t at) {
    for (const char byte : (*finder_.vocabulary_)[tokens_[at]]) {
      const bool is_whole = utf8_.Take(static_cast<uint8_t>(byte));
      if (utf8_.has_begun()) character_first_ = at;
      if (!is_whole) continue;
      normal_.clear();
      finder_.rules_->Append(utf8_.character(), &normal_);
      for (const Part& part : finder_.SplitParts(normal_)) AddPart(part, character_first_, at);
    }
  }

  void EndWord() {
    if (length_ == 0) return;
    hashes_.push_back(GramHash::Mix(hash_));
    ranges_.emplace_back(first_, last_ + 1);
    hash_ = 0;
    length_ = 0;
  }

  const GramFinder& finder_;
  const T* tokens_ = nullptr;
  std::vector<uint64_t> hashes_;
  std::vector<std::pair<int64_t, int64_t>> ranges_;
  // The word that has not ended yet.
  uint64_t hash_ = 0;
  uint64_t length_ = 0;
  int64_t first_ = 0;
  int64_t last_ = 0;
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
  Reader<T> reader(*this);
  for (int64_t document = 0; document < block.num_documents(); ++document) {
    const int64_t end = block.begins[document + 1];
    for (int64_t i = block.begins[document]; i < end; ++i) {
      i = reader.Read(tokens, i, end);
      LookUp(block, document, reader, matches);
    }
  }
}

template <typename T>
void GramFinder::LookUp(const TokenBlock& block, int64_t document, const Reader<T>& reader,
                        std::vector<Match>* matches) const {
  GramHash hash(grams_.n());
  const auto words = static_cast<int64_t>(reader.hashes().size());
  for (int64_t word = 0; word < words; ++word) {
    const uint64_t of_last_n = hash.Add(reader.hashes().data(), word);
    if (grams_.IsAbsent(of_last_n) || word < grams_.n() - 1) continue;
    const int64_t begin = reader.begin(word - grams_.n() + 1);
    const int64_t end = reader.end(word);
    const int64_t gram = FindGram(block.tokens<T>(), begin, end, of_last_n);
    if (gram < 0) continue;
    const int64_t first = block.begins[document];
    matches->push_back({block.first_document + document, gram, begin - first, end - first});
  }
}

// Returns the sequence with a hash whose words are in tokens [begin, end), or -1.
template <typename T>
int64_t GramFinder::FindGram(const T* tokens, int64_t begin, int64_t end, uint64_t hash) const {
  std::string words;
  return grams_.Find(hash, [&](std::string_view gram) {
    if (words.empty()) {
      std::string bytes;
      for (int64_t i = begin; i < end; ++i) bytes += (*vocabulary_)[tokens[i]];
      // The first and the last of these tokens may have parts of other words.
      words = ' ' + rules_->Normalise(bytes) + ' ';
    }
    return words.find(' ' + std::string(gram) + ' ') != std::string::npos;
  });
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
