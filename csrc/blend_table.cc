#include "blend_table.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace megatron_ettin {
namespace {

// Validates the quotas and returns their sum.
int64_t CheckedPeriod(const std::vector<int64_t>& quotas) {
  int64_t period = 0;
  for (size_t s = 0; s < quotas.size(); ++s) {
    if (quotas[s] < 1 || quotas[s] > BlendTable::kMaxPeriod) {
      throw std::invalid_argument("quotas[" + std::to_string(s) + "] is " +
                                  std::to_string(quotas[s]) + "; a quota lies in [1, 2^20]");
    }
    period += quotas[s];
    if (period > BlendTable::kMaxPeriod) break;
  }
  if (period < 1 || period > BlendTable::kMaxPeriod || (period & (period - 1)) != 0) {
    throw std::invalid_argument(
        "the quotas must sum to the period, a power of two <= 2^20; they sum to " +
        std::to_string(period) + (period > BlendTable::kMaxPeriod ? " or more" : ""));
  }
  return period;
}

}  // namespace

BlendTable::BlendTable(std::vector<int64_t> quotas) : quotas_(std::move(quotas)) {
  const int64_t period = CheckedPeriod(quotas_);
  source_.resize(period);
  rank_.resize(period);
  positions_.resize(period);
  position_begin_.assign(1, 0);
  for (int64_t quota : quotas_) position_begin_.push_back(position_begin_.back() + quota);

  // deficit[s] = quota * (j + 1) - period * count: the lag of source s behind its share, in rows
  // times the period, so that integers hold it exactly. The largest lag wins, ties go to the lowest
  // index.
  std::vector<int64_t> deficit(quotas_.size(), 0);
  std::vector<int32_t> count(quotas_.size(), 0);
  for (int64_t j = 0; j < period; ++j) {
    size_t best = 0;
    for (size_t s = 0; s < deficit.size(); ++s) {
      deficit[s] += quotas_[s];
      if (deficit[s] > deficit[best]) best = s;
    }
    deficit[best] -= period;
    source_[j] = static_cast<int32_t>(best);
    rank_[j] = count[best];
    positions_[position_begin_[best] + count[best]] = static_cast<int32_t>(j);
    ++count[best];
  }
}

int64_t BlendTable::CountBefore(int64_t source, int64_t j) const {
  const auto begin = positions_.begin() + position_begin_[source];
  const auto end = positions_.begin() + position_begin_[source + 1];
  return std::lower_bound(begin, end, j) - begin;
}

}  // namespace megatron_ettin
