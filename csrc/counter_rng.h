// The one source of randomness: SplitMix64 outputs addressed by counters. A draw is a pure function
// of (seed, purpose, words, index), so nothing in a run carries generator state. Specified in
// docs/order.md, section 1.
#ifndef MEGATRON_ETTIN_COUNTER_RNG_H_
#define MEGATRON_ETTIN_COUNTER_RNG_H_

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace megatron_ettin {

// Uses of a key. The values are part of the specification and never change their meaning; a new
// use takes a new number. Python sees them as native.Purpose, and docs/order.md lists them.
enum class Purpose : uint64_t {
  kPermutation = 1,
  kMask = 2,
  kNormalWeights = 3,
  kUniformWeights = 4,
  kDropout = 5,
  kUnseen = 6,
  kVerify = 7,
  kNoise = 8,
  kMixture = 9,
};

inline constexpr uint64_t kGamma = 0x9E3779B97F4A7C15ull;  // 2^64 / golden ratio

// Permutes 64-bit words: the output function of SplitMix64.
inline uint64_t Mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// Folds one more word into a key.
inline uint64_t AbsorbWord(uint64_t key, uint64_t word) { return Mix64((key ^ word) + kGamma); }

inline uint64_t CounterKey(uint64_t seed, uint64_t purpose, const uint64_t* words, size_t count) {
  uint64_t key = AbsorbWord(Mix64(seed + kGamma), purpose);
  for (size_t i = 0; i < count; ++i) key = AbsorbWord(key, words[i]);
  return key;
}

inline uint64_t CounterKey(uint64_t seed, Purpose purpose, std::initializer_list<uint64_t> words) {
  return CounterKey(seed, static_cast<uint64_t>(purpose), words.begin(), words.size());
}

// Output number `index` (from 0) of SplitMix64 started in state `key`.
inline uint64_t Draw(uint64_t key, uint64_t index) { return Mix64(key + (index + 1) * kGamma); }

inline uint64_t MultiplyHigh(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
}

// Maps a draw to [0, n) without a division or a rejection, so that a draw is used exactly once. The
// bias is below n / 2^64.
inline uint64_t Below(uint64_t draw, uint64_t n) { return MultiplyHigh(draw, n); }

// Maps a draw to the open interval (0, 1): 2^52 equally spaced midpoints, all exact in a double.
inline double OpenUnit(uint64_t draw) {
  return (static_cast<double>(draw >> 12) + 0.5) * 0x1.0p-52;
}

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_COUNTER_RNG_H_
