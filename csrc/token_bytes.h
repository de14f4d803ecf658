// The bytes of each token of a vocabulary whose texts are the concatenated bytes of their tokens.
#ifndef MEGATRON_ETTIN_TOKEN_BYTES_H_
#define MEGATRON_ETTIN_TOKEN_BYTES_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace megatron_ettin {

class TokenBytes {
 public:
  // An entry is empty for an id that stands for no text: a special token, or a hole. Throws
  // std::invalid_argument for an empty vocabulary, or one of more than 2^31 ids.
  explicit TokenBytes(const std::vector<std::optional<std::string>>& tokens);

  int64_t size() const { return static_cast<int64_t>(is_text_.size()); }
  bool IsText(int64_t id) const { return is_text_[id]; }
  std::string_view operator[](int64_t id) const {
    return {pool_.data() + begins_[id], begins_[id + 1] - begins_[id]};
  }

 private:
  std::string pool_;
  std::vector<size_t> begins_;  // of each token in the pool, then their end
  std::vector<bool> is_text_;
};

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_TOKEN_BYTES_H_
