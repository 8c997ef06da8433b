// One block of threads at a time on the CPU, each thread a fiber, see build.py.
#include <cuda_runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <vector>

// Saves the registers that a call keeps on the stack, the stack's place in *from, and goes on where `to` had stopped.
extern "C" void host_switch(void** from, void* to);
asm(R"(
.text
.globl host_switch
host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace host {

uint3 thread_idx, block_idx;
dim3 block_dim, grid_dim;

namespace {

constexpr size_t kStack = 128 << 10;
constexpr int kMostThreads = 1024;
constexpr size_t kMostShared = 48 << 10;

enum State { kRun, kExchange, kBarrier, kDone };

struct Fiber {
  void* stack_at = nullptr;
  char* stack = nullptr;
  State state = kDone;
  uint3 index;
  int warp, lane;
  Exchange op;
  int argument, line;
  unsigned mask;
  uint64_t value, result;
};

Fiber fibers[kMostThreads];
Fiber* current = nullptr;
void* scheduler = nullptr;
const std::function<void()>* kernel = nullptr;
const char* kernel_name = "";
int num_threads = 0;
std::set<void*> begun;  // shared arrays that this block has seen
unsigned char* dynamic = nullptr;
std::mt19937_64 random_numbers(1);

void wait(State state) {
  current->state = state;
  host_switch(&current->stack_at, scheduler);
}

extern "C" __attribute__((noinline)) void host_entry() {
  (*kernel)();
  wait(kDone);
  std::abort();  // nobody resumes a fiber that is done
}

void start(int thread, dim3 block) {
  Fiber& f = fibers[thread];
  if (!f.stack) {
    f.stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  }
  void** top = reinterpret_cast<void**>(f.stack + kStack - 64);
  *--top = nullptr;                               // keeps the stack aligned at the entry
  *--top = reinterpret_cast<void*>(&host_entry);  // where the first switch returns to
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.stack_at = top;
  f.state = kRun;
  f.index = {thread % block.x, thread / block.x % block.y, thread / block.x / block.y};
  f.warp = thread / 32, f.lane = thread % 32;
}

// What the threads of a block that does not go on are waiting for.
std::string states() {
  static const char* names[] = {"running", "in an exchange", "at a barrier", "done"};
  std::string text;
  for (int t = 0; t < num_threads; ++t) {
    if (t && fibers[t].state == fibers[t - 1].state && fibers[t].line == fibers[t - 1].line) continue;
    text += "; from thread " + std::to_string(t) + ": " + names[fibers[t].state];
    if (fibers[t].state != kDone) text += ", line " + std::to_string(fibers[t].line);
  }
  return text;
}

// All threads of a block, until they are done.
void run_block(std::vector<int>& order, bool shuffled) {
  for (size_t left = order.size(); left;) {
    if (shuffled) std::shuffle(order.begin(), order.end(), random_numbers);
    bool moved = false;
    for (int t : order) {
      if (fibers[t].state != kRun) continue;
      current = &fibers[t], thread_idx = current->index;
      host_switch(&scheduler, current->stack_at);
      moved = true;
      left -= fibers[t].state == kDone;
    }
    if (moved || !left) continue;
    uint64_t sum = 0;
    for (int t = 0; t < num_threads; ++t) {
      const Fiber& f = fibers[t];
      if (f.state != kBarrier || f.line != fibers[0].line) fail("threads wait for ever, or at different barriers" + states());
      sum += f.value;
    }
    for (int t = 0; t < num_threads; ++t) fibers[t].result = sum, fibers[t].state = kRun;
  }
}

}  // namespace

void fail(const std::string& what) {
  std::fprintf(stderr, "%s: %s\n", kernel_name, what.c_str());
  std::abort();  // the stacks of the block cannot be unwound
}

uint64_t exchange(Exchange op, unsigned mask, uint64_t value, int argument, int line) {
  Fiber& me = *current;
  if (!(mask >> me.lane & 1)) fail("a lane is not in its own mask, line " + std::to_string(line));
  me.op = op, me.mask = mask, me.value = value, me.argument = argument, me.line = line;
  Fiber* warp = fibers + me.warp * 32;
  me.state = kExchange;
  uint64_t ballot = 0;
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    const Fiber& f = warp[l];
    const bool same = me.warp * 32 + l < num_threads && f.state == kExchange && f.mask == mask && f.op == op && f.line == line;
    if (!same) {  // whoever comes last answers for all
      wait(kExchange);
      return me.result;
    }
    ballot |= f.value << l;
  }
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    const int from = op == kShuffle ? warp[l].argument & 31 : op == kShuffleXor ? l ^ warp[l].argument : l;
    if (from > 31 || !(mask >> from & 1)) fail("a shuffle from a lane beyond the mask, line " + std::to_string(line));
    warp[l].result = op == kBallot ? ballot : warp[from].value;
  }
  for (int l = 0; l < 32; ++l) {
    if (mask >> l & 1) warp[l].state = kRun;
  }
  return me.result;
}

int barrier(int value, int line) {
  current->value = value, current->line = line;
  wait(kBarrier);
  return int(current->result);
}

void begin_shared(void* at, size_t size) {
  if (begun.insert(at).second) std::memset(at, 0xff, size);
}

void* dynamic_shared() { return dynamic; }

void run(const char* name, dim3 grid, dim3 block, size_t shared, const std::function<void()>& body) {
  kernel_name = name, kernel = &body, block_dim = block, grid_dim = grid;
  const int64_t threads = int64_t(block.x) * block.y * block.z;
  if (threads < 1 || threads > kMostThreads || block.z > 64) fail("a block of no possible size");
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    fail("a grid of no possible size");
  }
  if (shared > kMostShared) fail("too much shared memory");
  num_threads = int(threads);
  const std::unique_ptr<unsigned char, decltype(&std::free)> memory(
      static_cast<unsigned char*>(std::aligned_alloc(16, (shared + 16) / 16 * 16)), &std::free);
  dynamic = memory.get();
  const char* asked = std::getenv("KDMOS_HOST_ORDER");
  const std::string how = asked ? asked : "forward";
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  std::vector<int64_t> blocks(int64_t(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (how == "reverse") std::reverse(order.begin(), order.end()), std::reverse(blocks.begin(), blocks.end());
  if (how == "random") std::shuffle(blocks.begin(), blocks.end(), random_numbers);
  for (int64_t k : blocks) {
    block_idx = {unsigned(k % grid.x), unsigned(k / grid.x % grid.y), unsigned(k / grid.x / grid.y)};
    begun.clear();
    std::memset(dynamic, 0xff, shared);
    for (int t = 0; t < num_threads; ++t) start(t, block);
    run_block(order, how == "random");
  }
}

}  // namespace host
