// Best-fit decreasing bin packing of integer sizes in O(1) per item: a counting sort, and open bins
// kept by their free space with a two-level bitmap to find the tightest fit. Specified in
// docs/order.md, section 5.
#ifndef MEGATRON_ETTIN_BEST_FIT_H_
#define MEGATRON_ETTIN_BEST_FIT_H_

#include <cstdint>
#include <vector>

namespace megatron_ettin {

class BestFitPacker {
 public:
  // Bins hold `capacity` < 2^32 in total and at most `max_items` items.
  BestFitPacker(int64_t capacity, int64_t max_items);

  // Packs items of 1 <= size <= capacity, the largest first, equal sizes in the given order. An
  // item goes into the open bin with the least free space that holds it (among equals, the bin that
  // reached that space last), else into a new bin. bin_of[i] becomes the bin of item i; returns the
  // number of bins. At most 65,536 items: their numbers and those of their bins have 16 bits.
  int64_t Pack(const std::vector<uint32_t>& sizes, std::vector<uint16_t>* bin_of);

 private:
  static constexpr uint32_t kNone = UINT32_MAX;

  void SortBySizeDescending(const std::vector<uint32_t>& sizes);
  uint32_t PopTightest(int64_t size);  // kNone if no open bin has that much free space
  void Push(uint32_t bin);
  void CloseAll();
  int64_t FindAtLeast(int64_t free) const;  // smallest occupied free space >= free, or -1

  int64_t capacity_;
  int64_t max_items_;
  // Each thread that builds a plan has a packer, so arrays that grow with the items are narrow.
  std::vector<uint16_t> order_;     // items, largest first
  std::vector<uint32_t> position_;  // counting sort: next position of each size
  std::vector<uint32_t> free_;      // per bin
  std::vector<uint32_t> items_;     // per bin
  std::vector<uint32_t> below_;     // per bin: the next bin in the stack of equal free space
  std::vector<uint32_t> top_;       // per free space: the stack of open bins
  std::vector<uint64_t> bits_;      // bit f: a bin of free space f is open
  std::vector<uint64_t> summary_;   // bit w: word w of bits_ is not zero, so a search skips 4,096
};

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_BEST_FIT_H_
