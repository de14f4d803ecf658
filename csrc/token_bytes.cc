#include "token_bytes.h"

#include <stdexcept>

namespace megatron_ettin {

TokenBytes::TokenBytes(const std::vector<std::optional<std::string>>& tokens) {
  if (tokens.empty() || tokens.size() > INT32_MAX) {
    throw std::invalid_argument("tokens must have 1 to 2^31 - 1 entries, not " +
                                std::to_string(tokens.size()));
  }
  begins_.reserve(tokens.size() + 1);
  is_text_.reserve(tokens.size());
  for (const std::optional<std::string>& token : tokens) {
    begins_.push_back(pool_.size());
    is_text_.push_back(token.has_value());
    pool_ += token.value_or("");
  }
  begins_.push_back(pool_.size());
}

}  // namespace megatron_ettin
