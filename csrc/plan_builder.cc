#include "plan_builder.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "block_packer.h"
#include "new_file.h"
#include "plan_file.h"

namespace megatron_ettin {
namespace {

constexpr int64_t kMaxThreads = 1024;
constexpr auto kTickPeriod = std::chrono::milliseconds(100);

// Threads take blocks in turn and pack them side by side. Each waits for the blocks before its own
// to know its place in the file, so a thread holds one packed block at a time.
class PlanBuilder {
 public:
  PlanBuilder(const TokenCorpus& corpus, const PlanRequest& request, NewFile* out)
      : corpus_(corpus),
        request_(request),
        out_(*out),
        header_(MakePlanHeader(request.rules, {request.first_document, request.end_document,
                                               corpus.num_documents(), corpus.num_tokens()})),
        body_end_(sizeof(PlanHeader)) {
    header_.has_bodies = request.bodies ? 1 : 0;
    table_.reserve(header_.num_blocks);
  }

  void PackBlocks(int64_t threads, const std::function<void(int64_t)>& tick);
  void WriteTable();

 private:
  void PackWaitingBlocks();
  // Returns false when there is no block left, or another thread failed.
  bool TakeBlock(int64_t* index);
  // Returns where the body goes, or -1 if another thread failed.
  int64_t ReserveBody(int64_t index, const BlockPacker& packer, uint64_t body_hash);
  void Fail(std::exception_ptr error);

  const TokenCorpus& corpus_;
  const PlanRequest& request_;
  NewFile& out_;

  std::mutex mutex_;
  std::condition_variable changed_;  // signals changes of the fields below, which mutex_ guards
  PlanHeader header_;
  std::vector<PlanBlock> table_;
  int64_t body_end_;
  int64_t next_block_ = 0;
  int64_t documents_done_ = 0;
  int64_t working_ = 0;  // threads
  bool failed_ = false;
  std::exception_ptr error_;
};

bool PlanBuilder::TakeBlock(int64_t* index) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (failed_ || next_block_ == header_.num_blocks) return false;
  *index = next_block_++;
  return true;
}

int64_t PlanBuilder::ReserveBody(int64_t index, const BlockPacker& packer, uint64_t body_hash) {
  std::unique_lock<std::mutex> lock(mutex_);
  // Bodies lie in the order of the blocks, so that the bytes do not depend on the threads.
  changed_.wait(lock, [&] { return failed_ || static_cast<int64_t>(table_.size()) == index; });
  if (failed_) return -1;
  const BlockShape& shape = packer.shape();
  PlanBlock block{};
  block.first_row = header_.counts.rows;
  block.body_begin = request_.bodies ? body_end_ : 0;
  block.full_rows = shape.full_rows;
  block.packed_rows = static_cast<uint32_t>(shape.packed_rows);
  block.tails = static_cast<uint32_t>(shape.tails);
  block.tokens = shape.tokens;
  block.body_hash = body_hash;
  block.lengths_hash = packer.lengths_hash();
  table_.push_back(block);
  header_.counts.Add(packer.counts());
  documents_done_ += shape.num_documents;
  body_end_ += request_.bodies ? shape.body_bytes() : 0;
  changed_.notify_all();
  return block.body_begin;
}

void PlanBuilder::Fail(std::exception_ptr error) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!failed_) error_ = std::move(error);
  failed_ = true;
  changed_.notify_all();
}

void PlanBuilder::PackWaitingBlocks() {
  try {
    BlockPacker packer(corpus_, request_.rules);
    int64_t index;
    while (TakeBlock(&index)) {
      const int64_t size = request_.rules.block_documents;
      const int64_t first = request_.first_document + index * size;
      const int64_t last = std::min(first + size, request_.end_document);
      packer.Pack(first, last);
      const std::vector<char>& body = packer.body();
      const int64_t begin = ReserveBody(index, packer, HashPlanBytes(body.data(), body.size()));
      if (begin < 0) break;
      if (request_.bodies) out_.WriteAt(body.data(), body.size(), begin);
    }
  } catch (...) {
    Fail(std::current_exception());
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  --working_;
  changed_.notify_all();
}

void PlanBuilder::PackBlocks(int64_t threads, const std::function<void(int64_t)>& tick) {
  if (threads == 0) threads = std::max(1u, std::thread::hardware_concurrency());
  threads = std::min(threads, header_.num_blocks);
  std::vector<std::thread> pool;
  // The threads must be joined even if this one throws.
  try {
    for (int64_t i = 0; i < threads; ++i) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        ++working_;
      }
      pool.emplace_back([this] { PackWaitingBlocks(); });
    }
    std::unique_lock<std::mutex> lock(mutex_);
    while (!changed_.wait_for(lock, kTickPeriod, [&] { return working_ == 0; })) {
      const int64_t done = documents_done_;
      lock.unlock();
      tick(done);
      lock.lock();
    }
  } catch (...) {
    Fail(std::current_exception());
  }
  for (std::thread& thread : pool) thread.join();
  if (error_) std::rethrow_exception(error_);
  tick(documents_done_);
}

void PlanBuilder::WriteTable() {
  header_.table_begin = body_end_;
  const auto table_bytes = static_cast<int64_t>(table_.size() * sizeof(PlanBlock));
  const PlanFooter footer{HashHeaderAndTable(header_, table_.data()),
                          body_end_ + table_bytes + static_cast<int64_t>(sizeof(PlanFooter))};
  out_.WriteAt(&header_, sizeof(header_), 0);
  out_.WriteAt(table_.data(), table_bytes, body_end_);
  out_.WriteAt(&footer, sizeof(footer), body_end_ + table_bytes);
}

}  // namespace

void BuildRowPlan(const TokenCorpus& corpus, const std::string& path, const PlanRequest& request,
                  int64_t threads, const std::function<void(int64_t)>& tick) {
  CheckRules(request.rules);
  CheckField("end_document", request.end_document, 0, corpus.num_documents());
  CheckField("first_document", request.first_document, 0, request.end_document);
  CheckField("threads", threads, 0, kMaxThreads);
  RemoveLeftovers(path);
  if (Exists(path)) return;
  {
    NewFile out(path);
    PlanBuilder builder(corpus, request, &out);
    builder.PackBlocks(threads, tick);
    builder.WriteTable();
    out.Publish();
  }
  RemoveLeftovers(path);
}

}  // namespace megatron_ettin
