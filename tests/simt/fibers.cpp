// Stacks, and switching between them: a thread of a kernel runs on a stack of its own until it goes back to the
// scheduler by itself.
#include <sys/mman.h>

#include <new>

#include "runtime.h"

// ---- switching stacks ----
#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
extern "C" void simt_switch(void** save, void* to);
asm(R"(
.text
.hidden simt_switch
.globl simt_switch
.type simt_switch, @function
simt_switch:
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
.size simt_switch, .-simt_switch
)");
#else
#include <ucontext.h>
#endif

namespace simt {
namespace {

constexpr size_t kStackBytes = 64 << 10, kStacksPerChunk = 64;
constexpr uint64_t kCanary = 0x5afe57ac5afe57acull;

std::vector<void*> free_stacks;
void* scheduler_context = nullptr;

}  // namespace

void* take_stack() {
  if (free_stacks.empty()) {
    const size_t bytes = kStackBytes * kStacksPerChunk;
    void* chunk = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (chunk == MAP_FAILED) abandon("no memory for the threads' stacks", cudaErrorMemoryAllocation);
    madvise(chunk, bytes, MADV_NOHUGEPAGE);
    for (size_t i = 0; i < kStacksPerChunk; ++i) free_stacks.push_back(static_cast<char*>(chunk) + i * kStackBytes);
  }
  void* stack = free_stacks.back();
  free_stacks.pop_back();
  *static_cast<uint64_t*>(stack) = kCanary;
  return stack;
}

void give_stack(void* stack) { free_stacks.push_back(stack); }

bool stack_intact(const Thread& t) { return *static_cast<const uint64_t*>(t.stack) == kCanary; }

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
void make_context(Thread& t) {
  void** top = reinterpret_cast<void**>(static_cast<char*>(t.stack) + kStackBytes);
  *--top = nullptr;  // where thread_main would return to; keeps its frame aligned
  *--top = reinterpret_cast<void*>(&thread_main);
  t.context = top - 6;
}
void to_thread(Thread& t) { simt_switch(&scheduler_context, t.context); }
void to_scheduler() { simt_switch(&current->context, scheduler_context); }
#else
void make_context(Thread& t) {
  auto* context = new (static_cast<char*>(t.stack) + sizeof(kCanary) * 2) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = context + 1;
  context->uc_stack.ss_size = kStackBytes - sizeof(kCanary) * 2 - sizeof(*context);
  makecontext(context, thread_main, 0);
  t.context = context;
}
void to_thread(Thread& t) {
  static ucontext_t own;
  scheduler_context = &own;
  swapcontext(&own, static_cast<ucontext_t*>(t.context));
}
void to_scheduler() {
  swapcontext(static_cast<ucontext_t*>(current->context), static_cast<ucontext_t*>(scheduler_context));
}
#endif

}  // namespace simt
