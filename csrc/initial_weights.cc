#include "initial_weights.h"

#include <cmath>
#include <stdexcept>
#include <string>

#include "counter_rng.h"

namespace megatron_ettin {
namespace {

// M. J. Wichura, Algorithm AS 241: The Percentage Points of the Normal Distribution, Applied
// Statistics 37 (1988) 477-484. Constant term first; the denominators' constant term is 1.
constexpr double kCentral[8] = {3.3871328727963666080e0,  1.3314166789178437745e+2,
                                1.9715909503065514427e+3, 1.3731693765509461125e+4,
                                4.5921953931549871457e+4, 6.7265770927008700853e+4,
                                3.3430575583588128105e+4, 2.5090809287301226727e+3};
constexpr double kCentralBelow[8] = {1.0,
                                     4.2313330701600911252e+1,
                                     6.8718700749205790830e+2,
                                     5.3941960214247511077e+3,
                                     2.1213794301586595867e+4,
                                     3.9307895800092710610e+4,
                                     2.8729085735721942674e+4,
                                     5.2264952788528545610e+3};
constexpr double kMiddle[8] = {1.42343711074968357734e0,  4.63033784615654529590e0,
                               5.76949722146069140550e0,  3.64784832476320460504e0,
                               1.27045825245236838258e0,  2.41780725177450611770e-1,
                               2.27238449892691845833e-2, 7.74545014278341407640e-4};
constexpr double kMiddleBelow[8] = {1.0,
                                    2.05319162663775882187e0,
                                    1.67638483018380384940e0,
                                    6.89767334985100004550e-1,
                                    1.48103976427480074590e-1,
                                    1.51986665636164571966e-2,
                                    5.47593808499534494600e-4,
                                    1.05075007164441684324e-9};
constexpr double kFar[8] = {6.65790464350110377720e0,  5.46378491116411436990e0,
                            1.78482653991729133580e0,  2.96560571828504891230e-1,
                            2.65321895265761230930e-2, 1.24266094738807843860e-3,
                            2.71155556874348757815e-5, 2.01033439929228813265e-7};
constexpr double kFarBelow[8] = {1.0,
                                 5.99832206555887937690e-1,
                                 1.36929880922735805310e-1,
                                 1.48753612908506148525e-2,
                                 7.86869131145613259100e-4,
                                 1.84631831751005468180e-5,
                                 1.42151175831644588870e-7,
                                 2.04426310338993978564e-15};

double Polynomial(const double (&coefficients)[8], double x) {
  double value = coefficients[7];
  for (int i = 6; i >= 0; --i) value = value * x + coefficients[i];
  return value;
}

void CheckRange(int64_t begin, int64_t count) {
  if (begin < 0 || count < 0) {
    throw std::invalid_argument("begin and count must be >= 0, got " + std::to_string(begin) +
                                " and " + std::to_string(count));
  }
}

}  // namespace

uint64_t HashName(std::string_view name) {
  uint64_t hash = 0xCBF29CE484222325ull;
  for (char byte : name) {
    hash = (hash ^ static_cast<unsigned char>(byte)) * 0x00000100000001B3ull;
  }
  return Mix64(hash);
}

double NormalQuantile(double q) {
  if (std::fabs(q) <= 0.425) {
    const double r = 0.180625 - q * q;
    return q * Polynomial(kCentral, r) / Polynomial(kCentralBelow, r);
  }
  double r = std::sqrt(-std::log(0.5 - std::fabs(q)));
  double value;
  if (r <= 5.0) {
    r -= 1.6;
    value = Polynomial(kMiddle, r) / Polynomial(kMiddleBelow, r);
  } else {
    r -= 5.0;
    value = Polynomial(kFar, r) / Polynomial(kFarBelow, r);
  }
  return q < 0 ? -value : value;
}

void DrawTruncatedNormal(std::string_view name, uint64_t seed, int64_t begin, int64_t count,
                         double std, double cutoff_std, float* weights) {
  CheckRange(begin, count);
  if (!(std > 0.0 && std::isfinite(std))) {
    throw std::invalid_argument("std is " + std::to_string(std) + "; it must be > 0");
  }
  // Beyond 7 the probability inside rounds to 1 and the quantile could become infinite.
  if (!(cutoff_std > 0.0 && cutoff_std <= 7.0)) {
    throw std::invalid_argument("cutoff_std is " + std::to_string(cutoff_std) +
                                "; it must lie in (0, 7]");
  }
  // The probability inside the cut. A draw is mapped into it by the quantile, not rejected: element
  // i needs draw i and no other.
  const double inside = std::erf(cutoff_std / std::sqrt(2.0));
  const uint64_t key = CounterKey(seed, Purpose::kNormalWeights, {HashName(name)});
  for (int64_t i = 0; i < count; ++i) {
    const double u = OpenUnit(Draw(key, static_cast<uint64_t>(begin + i)));
    weights[i] = static_cast<float>(NormalQuantile((u - 0.5) * inside) * std);
  }
}

void DrawUniform(std::string_view name, uint64_t seed, int64_t begin, int64_t count, double low,
                 double high, float* weights) {
  CheckRange(begin, count);
  if (!(low <= high && std::isfinite(low) && std::isfinite(high))) {
    throw std::invalid_argument("low " + std::to_string(low) + " and high " + std::to_string(high) +
                                " must be finite with low <= high");
  }
  const uint64_t key = CounterKey(seed, Purpose::kUniformWeights, {HashName(name)});
  for (int64_t i = 0; i < count; ++i) {
    const double u = OpenUnit(Draw(key, static_cast<uint64_t>(begin + i)));
    weights[i] = static_cast<float>(low + u * (high - low));
  }
}

}  // namespace megatron_ettin
