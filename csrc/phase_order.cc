#include "phase_order.h"

#include <stdexcept>
#include <string>
#include <utility>

namespace megatron_ettin {
namespace {

// Far above any run, far below overflow of the sums of counters.
constexpr int64_t kMaxCount = int64_t{1} << 61;

// Checks entry i of an array of arguments; the message is built only on failure.
void CheckEntry(const char* name, int64_t i, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return;
  throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) + "] is " +
                              std::to_string(value) + "; it must lie in [" + std::to_string(low) +
                              ", " + std::to_string(high) + "]");
}

std::vector<int64_t> Quotas(const std::vector<PhaseOrder::Source>& sources) {
  std::vector<int64_t> quotas;
  for (const PhaseOrder::Source& source : sources) quotas.push_back(source.quota);
  return quotas;
}

}  // namespace

PhaseOrder::PhaseOrder(uint64_t seed, std::vector<Source> sources)
    : seed_(seed), sources_(std::move(sources)), blend_(Quotas(sources_)) {
  for (size_t s = 0; s < sources_.size(); ++s) {
    CheckEntry("rows", s, sources_[s].rows, 1, kMaxCount);
    CheckEntry("drawn", s, sources_[s].drawn, 0, kMaxCount);
  }
}

const Permutation& PhaseOrder::GetPermutation(int64_t source, int64_t epoch,
                                              Current* current) const {
  if (current->epoch != epoch) {
    const Source& of = sources_[source];
    const uint64_t key = PermutationKey(seed_, of.id, static_cast<uint64_t>(epoch));
    current->permutation = cache_.Get(static_cast<uint64_t>(of.rows), key);
    current->epoch = epoch;
  }
  return *current->permutation;
}

void PhaseOrder::Locate(const int64_t* n, int64_t count, int32_t* source_index, int64_t* epoch,
                        int64_t* row) const {
  std::vector<Current> current(sources_.size());
  for (int64_t i = 0; i < count; ++i) {
    CheckEntry("n", i, n[i], 0, kMaxCount);
    const int64_t turn = n[i] / blend_.period();
    const int64_t position = n[i] & (blend_.period() - 1);  // the period is a power of two
    const int32_t source = blend_.SourceAt(position);
    const Source& of = sources_[source];
    // Rows drawn from the source's pool before this one; epochs run on over phases.
    const int64_t drawn = of.drawn + turn * of.quota + blend_.RankAt(position);
    source_index[i] = source;
    epoch[i] = drawn / of.rows;
    const uint64_t index = static_cast<uint64_t>(drawn % of.rows);
    row[i] =
        static_cast<int64_t>(GetPermutation(source, epoch[i], &current[source]).Forward(index));
  }
}

void PhaseOrder::Find(const int32_t* source_index, const int64_t* epoch, const int64_t* row,
                      int64_t count, int64_t* n) const {
  std::vector<Current> current(sources_.size());
  for (int64_t i = 0; i < count; ++i) {
    CheckEntry("source_index", i, source_index[i], 0, num_sources() - 1);
    const int64_t source = source_index[i];
    const Source& of = sources_[source];
    CheckEntry("epoch", i, epoch[i], 0, kMaxCount / of.rows);
    CheckEntry("row", i, row[i], 0, of.rows - 1);
    const Permutation& permutation = GetPermutation(source, epoch[i], &current[source]);
    const auto index = static_cast<int64_t>(permutation.Inverse(static_cast<uint64_t>(row[i])));
    const int64_t since_start = epoch[i] * of.rows + index - of.drawn;
    if (since_start < 0) {
      n[i] = -1;
      continue;
    }
    const int64_t turn = since_start / of.quota;
    if (turn > kMaxCount / blend_.period()) {
      throw std::invalid_argument("epoch[" + std::to_string(i) + "] is beyond row 2^61 of a phase");
    }
    n[i] = turn * blend_.period() + blend_.PositionOf(source, since_start % of.quota);
  }
}

std::vector<int64_t> PhaseOrder::CountDrawnAfter(int64_t n) const {
  if (n < 0 || n > kMaxCount) {
    throw std::invalid_argument("n is " + std::to_string(n) + "; it must lie in [0, 2^61]");
  }
  std::vector<int64_t> drawn;
  for (int64_t s = 0; s < num_sources(); ++s) {
    drawn.push_back(sources_[s].drawn + n / blend_.period() * blend_.quota(s) +
                    blend_.CountBefore(s, n & (blend_.period() - 1)));
  }
  return drawn;
}

}  // namespace megatron_ettin
