// A periodic table of the source of each row of a blend: integer quotas per period, spread as
// evenly as integers allow. Specified in docs/order.md, section 3.
#ifndef MEGATRON_ETTIN_BLEND_TABLE_H_
#define MEGATRON_ETTIN_BLEND_TABLE_H_

#include <cstdint>
#include <vector>

namespace megatron_ettin {

class BlendTable {
 public:
  static constexpr int64_t kMaxPeriod = int64_t{1} << 20;

  // The period is the sum of the quotas. Throws std::invalid_argument unless every quota is >= 1
  // and the period is a power of two <= kMaxPeriod.
  explicit BlendTable(std::vector<int64_t> quotas);

  int64_t period() const { return static_cast<int64_t>(source_.size()); }
  int64_t num_sources() const { return static_cast<int64_t>(quotas_.size()); }
  int64_t quota(int64_t source) const { return quotas_[source]; }

  // The source at position j of the period, and the number of earlier positions with that source.
  int32_t SourceAt(int64_t j) const { return source_[j]; }
  int32_t RankAt(int64_t j) const { return rank_[j]; }

  // The position that holds the rank-th row of the source: the inverse of (SourceAt, RankAt).
  int64_t PositionOf(int64_t source, int64_t rank) const {
    return positions_[position_begin_[source] + rank];
  }

  // Counts the positions [0, j) that belong to the source.
  int64_t CountBefore(int64_t source, int64_t j) const;

 private:
  std::vector<int64_t> quotas_;
  std::vector<int32_t> source_;
  std::vector<int32_t> rank_;
  std::vector<int32_t> positions_;       // positions of source 0 ascending, then of source 1, ...
  std::vector<int64_t> position_begin_;  // first entry of a source in positions_, plus the end
};

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_BLEND_TABLE_H_
