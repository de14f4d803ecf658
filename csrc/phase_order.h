// The order of rows inside one phase: row number n of the phase -> (source, epoch, row of the
// source's pool), and back. Specified in docs/order.md, section 4.
#ifndef MEGATRON_ETTIN_PHASE_ORDER_H_
#define MEGATRON_ETTIN_PHASE_ORDER_H_

#include <cstdint>
#include <vector>

#include "blend_table.h"
#include "permutation.h"
#include "permutation_cache.h"

namespace megatron_ettin {

class PhaseOrder {
 public:
  struct Source {
    uint64_t id;    // enters the permutation key
    int64_t quota;  // rows per blend period
    int64_t rows;   // rows of the source's pool
    int64_t drawn;  // rows drawn from that pool before this phase
  };

  // Throws std::invalid_argument that names the source and the field.
  PhaseOrder(uint64_t seed, std::vector<Source> sources);

  int64_t num_sources() const { return blend_.num_sources(); }
  int64_t period() const { return blend_.period(); }

  // Writes the source index, the epoch and the row of each n[i] >= 0. Thread-safe.
  void Locate(const int64_t* n, int64_t count, int32_t* source_index, int64_t* epoch,
              int64_t* row) const;

  // Undoes Locate: writes the n at which (source index, epoch, row) is drawn, or -1 if that was
  // before this phase began. Thread-safe.
  void Find(const int32_t* source_index, const int64_t* epoch, const int64_t* row, int64_t count,
            int64_t* n) const;

  // Counts the rows drawn from each source's pool once the first n rows of this phase are consumed.
  std::vector<int64_t> CountDrawnAfter(int64_t n) const;

 private:
  // The permutation that a call used last, per source: one comparison per row.
  struct Current {
    int64_t epoch = -1;
    PermutationCache::Shared permutation;
  };

  const Permutation& GetPermutation(int64_t source, int64_t epoch, Current* current) const;

  uint64_t seed_;
  std::vector<Source> sources_;
  BlendTable blend_;
  mutable PermutationCache cache_;
};

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_PHASE_ORDER_H_
