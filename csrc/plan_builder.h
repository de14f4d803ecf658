// Builds plan files with a pool of threads, in memory that does not grow with the corpus. Specified
// in docs/order.md, section 11.
#ifndef MEGATRON_ETTIN_PLAN_BUILDER_H_
#define MEGATRON_ETTIN_PLAN_BUILDER_H_

#include <cstdint>
#include <functional>
#include <string>

#include "row_rules.h"
#include "token_corpus.h"

namespace megatron_ettin {

struct PlanRequest {
  int64_t first_document;
  int64_t end_document;
  RowRules rules;
  bool bodies;  // false: the block table only; readers recompute the blocks they need
};

// Publishes the plan at `path` unless a file is there already; the bytes depend on the request and
// the lengths alone. threads = 0: one per processor. `tick(documents done)` is called now and then
// by the calling thread and may throw to give up. Throws std::invalid_argument that names the field
// or the document, IoError if the file system fails; nothing is left behind then.
void BuildRowPlan(const TokenCorpus& corpus, const std::string& path, const PlanRequest& request,
                  int64_t threads, const std::function<void(int64_t)>& tick);

}  // namespace megatron_ettin

#endif  // MEGATRON_ETTIN_PLAN_BUILDER_H_
