#include "digest.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace megatron_ettin {
namespace {

constexpr uint32_t kNotScored = 0xFFFFFFFF;

// Collects the bytes of one row, in memory that the next row uses again.
class RowBytes {
 public:
  void Clear() { size_ = 0; }

  template <typename T>
  void Add(T value) {
    std::memcpy(Grow(sizeof(T)), &value, sizeof(T));
  }

  // Room for `count` words, to be filled before the next call.
  char* AddWords(int64_t count) { return Grow(static_cast<size_t>(count) * sizeof(uint32_t)); }

  Hash128 Hash() const { return Xxh3_128(bytes_.data(), size_); }

 private:
  char* Grow(size_t size) {
    if (bytes_.size() < size_ + size) bytes_.resize(2 * (size_ + size));
    char* at = bytes_.data() + size_;
    size_ += size;
    return at;
  }

  std::vector<char> bytes_;
  size_t size_ = 0;
};

std::string NameRow(int64_t r, int64_t g) {
  return "row " + std::to_string(r) + " (g = " + std::to_string(g) + "): ";
}

[[noreturn]] void RefuseWord(const char* name, int64_t r, int64_t g, int64_t slot, int64_t value) {
  throw std::invalid_argument(NameRow(r, g) + name + " " + std::to_string(value) + " in slot " +
                              std::to_string(slot) + " is no token id");
}

// Writes ids as u32. Ids are checked together, so that the loop can run on vectors.
void NarrowIds(const char* name, int64_t r, int64_t g, const int64_t* ids, int64_t count,
               char* to) {
  int64_t all_bits = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto word = static_cast<uint32_t>(ids[i]);
    std::memcpy(to + i * sizeof(word), &word, sizeof(word));
    all_bits |= ids[i];
  }
  if (all_bits >= 0 && all_bits <= 0xFFFFFFFF) return;
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] > 0xFFFFFFFF) RefuseWord(name, r, g, i, ids[i]);
  }
}

// Writes an input and a label per slot as u32 each; false if one of them does not fit. No branches,
// for the sake of vectors and because masks are unpredictable.
bool PairIds(const int64_t* inputs, const int64_t* labels, const bool* scored, int64_t count,
             char* to) {
  uint64_t all_bits = 0;
  bool ambiguous = false;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t keep = -static_cast<uint64_t>(scored[i]);  // all ones where scored, else 0
    const auto input = static_cast<uint64_t>(inputs[i]);
    const uint64_t label = static_cast<uint64_t>(labels[i]) & keep;
    all_bits |= input | label;
    ambiguous |= label == kNotScored;
    // Little-endian: the input's four bytes come first.
    const uint64_t pair = input | (label | (~keep & kNotScored)) << 32;
    std::memcpy(to + i * sizeof(pair), &pair, sizeof(pair));
  }
  return all_bits <= 0xFFFFFFFF && !ambiguous;
}

[[noreturn]] void RefusePairs(int64_t g, int64_t r, const int64_t* inputs, const int64_t* labels,
                              const bool* scored, int64_t count) {
  int64_t i = 0;
  for (; i < count; ++i) {
    if (inputs[i] < 0 || inputs[i] > 0xFFFFFFFF) RefuseWord("input", r, g, i, inputs[i]);
    if (scored[i] && (labels[i] < 0 || labels[i] >= kNotScored)) break;
  }
  RefuseWord("label", r, g, i, labels[i]);
}

// Adds the weights of a row as float32, 0 where none is scored; nothing if all scored ones are 1.
void AddWeights(const float* weights, const bool* scored, int64_t count, RowBytes* bytes) {
  bool all_one = true;
  for (int64_t i = 0; i < count; ++i) all_one &= !scored[i] || weights[i] == 1.0f;
  if (all_one) return;
  char* to = bytes->AddWords(count);
  for (int64_t i = 0; i < count; ++i) {
    const float weight = scored[i] ? weights[i] : 0.0f;
    std::memcpy(to + i * sizeof(weight), &weight, sizeof(weight));
  }
}

void CheckNumTokens(const DigestedRows& rows, int64_t r) {
  if (rows.num_tokens[r] < 0 || rows.num_tokens[r] > rows.seq_length) {
    throw std::invalid_argument(NameRow(r, rows.g[r]) + std::to_string(rows.num_tokens[r]) +
                                " tokens in a row of " + std::to_string(rows.seq_length) +
                                " slots");
  }
}

// Adds the number of a row's pieces and the length of each; `boundary` points to the row's
// first entry of cu_seqlens.
void AddPieceLengths(const DigestedRows& rows, int64_t r, const int32_t* boundary,
                     int64_t segments_per_row, RowBytes* bytes) {
  const int64_t begin = r * rows.seq_length;
  const int64_t end = begin + rows.num_tokens[r];
  uint32_t pieces = 0;
  int64_t at = begin;
  bool agrees = boundary[0] == begin && boundary[segments_per_row] == begin + rows.seq_length;
  for (int64_t k = 1; agrees && k <= segments_per_row; ++k) {
    agrees = boundary[k] >= boundary[k - 1];
    if (boundary[k] > boundary[k - 1] && boundary[k] <= end) {
      ++pieces;
      at = boundary[k];
    }
  }
  if (!agrees || at != end) {
    throw std::invalid_argument(NameRow(r, rows.g[r]) +
                                "its segments in cu_seqlens do not end where its " +
                                std::to_string(rows.num_tokens[r]) + " tokens and its slots do");
  }
  bytes->Add(pieces);
  for (int64_t k = 1; k <= segments_per_row && boundary[k] <= end; ++k) {
    if (boundary[k] > boundary[k - 1])
      bytes->Add(static_cast<uint32_t>(boundary[k] - boundary[k - 1]));
  }
}

const OrderedSource& FindSource(const std::vector<OrderedSource>& sources,
                                const RowOrigins& origins, int64_t r) {
  const int64_t index = origins.source_index[r];
  if (index < 0 || index >= static_cast<int64_t>(sources.size())) {
    throw std::invalid_argument(NameRow(r, origins.g[r]) + "no source index " +
                                std::to_string(index));
  }
  if (origins.epoch[r] < 0) {
    throw std::invalid_argument(NameRow(r, origins.g[r]) + "epoch " +
                                std::to_string(origins.epoch[r]) + " is < 0");
  }
  return sources[index];
}

}  // namespace

void DigestOrder(const std::vector<OrderedSource>& sources, const RowOrigins& origins,
                 int64_t num_rows, Hash128* values) {
  std::vector<Piece> pieces;
  RowBytes bytes;
  for (int64_t r = 0; r < num_rows; ++r) {
    values[r] = {0, 0};
    if (origins.g[r] < 0) continue;
    const OrderedSource& source = FindSource(sources, origins, r);
    source.plan->ListPieces(origins.row[r], &pieces);
    bytes.Clear();
    bytes.Add(origins.g[r]);
    bytes.Add(source.id);
    bytes.Add(origins.epoch[r]);
    bytes.Add(origins.row[r]);
    bytes.Add(static_cast<uint32_t>(pieces.size()));
    for (const Piece& piece : pieces) {
      bytes.Add(piece.document);
      bytes.Add(piece.offset);
      bytes.Add(piece.length);
      bytes.Add(static_cast<uint8_t>(piece.cls | piece.sep << 1 | piece.ends_document << 2));
    }
    values[r] = bytes.Hash();
  }
}

void DigestTokens(const DigestedRows& rows, const int64_t* tokens, const int32_t* cu_seqlens,
                  int64_t segments_per_row, Hash128* values) {
  RowBytes bytes;
  for (int64_t r = 0; r < rows.count; ++r) {
    values[r] = {0, 0};
    if (rows.g[r] < 0) continue;
    CheckNumTokens(rows, r);
    bytes.Clear();
    bytes.Add(rows.g[r]);
    AddPieceLengths(rows, r, cu_seqlens + r * segments_per_row, segments_per_row, &bytes);
    NarrowIds("token", r, rows.g[r], tokens + r * rows.seq_length, rows.num_tokens[r],
              bytes.AddWords(rows.num_tokens[r]));
    values[r] = bytes.Hash();
  }
}

void DigestMasks(const DigestedRows& rows, const int64_t* inputs, const int64_t* labels,
                 const bool* loss_mask, const float* weights, uint64_t* values) {
  RowBytes bytes;
  for (int64_t r = 0; r < rows.count; ++r) {
    values[r] = 0;
    if (rows.g[r] < 0) continue;
    CheckNumTokens(rows, r);
    const int64_t begin = r * rows.seq_length;
    const int64_t count = rows.num_tokens[r];
    bytes.Clear();
    bytes.Add(rows.g[r]);
    if (!PairIds(inputs + begin, labels + begin, loss_mask + begin, count,
                 bytes.AddWords(2 * count))) {
      RefusePairs(rows.g[r], r, inputs + begin, labels + begin, loss_mask + begin, count);
    }
    if (weights != nullptr) AddWeights(weights + begin, loss_mask + begin, count, &bytes);
    values[r] = bytes.Hash().low;
  }
}

}  // namespace megatron_ettin
