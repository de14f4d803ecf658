// Initial weights as a function of (seed, parameter name, element), so that they do not depend on
// how a model is laid out over processes. Specified in docs/order.md, section 8.
#ifndef MEGATRON_ETTIN_INITIAL_WEIGHTS_H_
#define MEGATRON_ETTIN_INITIAL_WEIGHTS_H_

#include <cstdint>
#include <string_view>

namespace megatron_ettin {

// Returns the 64-bit FNV-1a hash of the UTF-8 bytes, finished by Mix64.
uint64_t HashName(std::string_view name);

// Returns the standard normal quantile of 0.5 + q, for |q| < 0.5 (algorithm AS 241, PPND16).
double NormalQuantile(double q);

// Draws elements [begin, begin + count) from a normal distribution cut at +-cutoff_std, then scales
// them by std without a correction of the variance. Throws std::invalid_argument for a bad std or
// cutoff.
void DrawTruncatedNormal(std::string_view name, uint64_t seed, int64_t begin, int64_t count,
                         double std, double cutoff_std, float* weights);

// Draws elements [begin, begin + count) from the uniform distribution on [low, high].
void DrawUniform(std::string_view name, uint64_t seed, int64_t begin, int64_t count, double low,
                 double high, float* weights);

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_INITIAL_WEIGHTS_H_
